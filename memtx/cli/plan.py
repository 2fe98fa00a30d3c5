"""``memtx plan``: what a config's training takes, before any of it: parameters, memory, operations, speed, days."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from memtx.cli.common import MISTAKE, Parser, run
from memtx.cli.fit import MemtxCLI, OneLineParser, names_parts
from memtx.cli.parts import PARTS, PartsCLI
from memtx.cli.quiet import quiet
from memtx.data.books import BookDataModule
from memtx.data.prepared import Prepared, is_prepared
from memtx.errors import MemtxError, positive
from memtx.ops import bf16
from memtx.training import cost
from memtx.training.callbacks.progress import duration
from memtx.training.callbacks.throughput import operand
from memtx.training.language import LanguageModule

UTILISATION = {2: 0.3, 4: 0.6, 8: 0.6}
"""The share of the matrix peak that training reaches, by bytes of a number; scripts/bench_step.py's on a CPU."""

SHARDED = ("fsdp", "modelparallel", "deepspeed")
"""In the names of strategies that split weights over the devices."""


def _parser() -> Parser:
    parser = Parser(
        "memtx plan",
        "Say what the training of a config takes: parameters, memory of a device, operations, tokens per second, days. "
        "Nothing is trained and no text is read. Further options are those of `memtx fit`, such as --data.rows 16.",
    )
    parser.add_argument("--config", "-c", action="append", required=True, metavar="FILE", help="as of `memtx fit`")
    parser.add_argument("--devices", type=int, metavar="N", help="the config's own number by default, else 1")
    parser.add_argument("--tokens", type=float, metavar="N", help="to train on; a prepared folder's by default")
    parser.add_argument(
        "--tflops", type=float, metavar="X", help="of a device's matrix products; by default measured on this machine"
    )
    parser.add_argument(
        "--utilisation", type=float, metavar="SHARE", help="of that, which training reaches; else 0.6, in 16 bits 0.3"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


class _Unstarted:
    """A CLI that makes module and data, and neither a trainer nor a run."""

    def check_data(self, settings: Any) -> None:
        """Need no texts."""

    def before_instantiate_classes(self) -> None:
        """Look for no checkpoint; texts that are not named yet may be any."""
        self._content = None
        data = self.config["fit"].data  # type: ignore[attr-defined]
        for settings in (data, data.get("init_args") or {}):
            if "root" in settings and settings["root"] is None:
                settings["root"] = "embedded"

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """Make none."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class _Books(_Unstarted, MemtxCLI):  # type: ignore[misc]
    pass


class _Parts(_Unstarted, PartsCLI):  # type: ignore[misc]
    pass


def _made(argv: list[str]) -> Any:
    """Return the CLI that made what ``memtx fit`` would make of its arguments, the weights without numbers."""
    parts = names_parts(argv)
    module, data = PARTS if parts else (LanguageModule, BookDataModule)
    with torch.device("meta"):
        made = (_Parts if parts else _Books)(
            module,
            data,
            save_config_callback=None,
            parser_class=OneLineParser,
            parser_kwargs={"prog": "memtx plan"},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            subclass_mode_model=parts,
            subclass_mode_data=parts,
            args=argv,
        )
    if not isinstance(made.model, LanguageModule):
        raise MemtxError(
            f"A {type(made.model).__name__} is no LanguageModule.", "Only training through time can be planned yet."
        )
    return made


def planned(arguments: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    """Return all figures of a plan."""
    numbers = {name: getattr(arguments, name) for name in ("devices", "tokens", "tflops", "utilisation")}
    positive(**{name: value for name, value in numbers.items() if value is not None})
    configs = [part for path in arguments.config for part in ("--config", path)]
    made = _made(["fit", *configs, *further])
    module, data, trainer = made.model, made.datamodule, made.config["fit"].trainer
    devices = arguments.devices or (trainer.devices if isinstance(trainer.devices, int) else 1)
    model, precision = module.model, str(trainer.precision or "32-true")
    if arguments.tflops is None:  # of this machine
        precision = bf16.instead(precision, str(trainer.accelerator))
    kind = operand(precision)
    half = kind.itemsize == 2
    rows, horizon = int(data.rows), int(getattr(data, "horizon", getattr(data, "segments", 1)))
    parameters = cost.by_part(model)
    total, learning = sum(parameters.values()), sum(one.numel() for one in model.parameters() if one.requires_grad)
    split = devices if any(one in str(trainer.strategy).lower() for one in SHARDED) else 1
    width = 2 if precision.endswith("true") and half else 4
    state = model.init_state(1).nbytes
    memory = {
        "weights": width * total // split,
        "gradients": width * learning // split,
        "optimiser": cost.optimizer_bytes(model, module.make_optimizer) * width // 4 // split,
        "activations": cost.activation_bytes(model, rows, module.segment, horizon, replay=module.replay, half=half),
        # The one that is read and the one that is made.
        "carried state": 2 * rows * state,
    }
    operations = cost.operations(model, module.segment)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = arguments.tflops * 1e12 if arguments.tflops else cost.matrix_peak(device, kind, 2048)
    share = arguments.utilisation or UTILISATION[kind.itemsize]
    rate = devices * share * peak / operations.training
    step = devices * rows * module.segment * horizon * (trainer.accumulate_grad_batches or 1)
    corpus = arguments.tokens
    if corpus is None and is_prepared(root := str(getattr(data, "root", ""))):
        corpus = Prepared(root).splits["train"]["tokens"]
    run_tokens = trainer.max_steps * step if trainer.max_steps and trainer.max_steps > 0 else None
    return {
        "parameters": parameters,
        "parameters_total": total,
        "parameters_learning": learning,
        "memory_bytes": memory,
        "memory_bytes_total": sum(memory.values()),
        "state_bytes_per_row": state,
        "activation_bytes_per_row": memory["activations"] // rows,
        "flops_per_token": {"reading": operations.forward, "training": operations.training},
        "flops_count_attention": operations.scores,
        "devices": devices,
        "rows": rows,
        "segment": module.segment,
        "horizon": horizon,
        "precision": precision,
        "tokens_per_step": step,
        "peak_flops": peak,
        "peak_measured": arguments.tflops is None,
        "utilisation": share,
        "tokens_per_second": rate,
        "run_tokens": run_tokens,
        "run_seconds": run_tokens / rate if run_tokens else None,
        "corpus_tokens": corpus,
        "corpus_seconds": corpus / rate if corpus else None,
    }


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"


def _long(seconds: float) -> str:
    return duration(seconds) if seconds < 2 * 86_400 else f"{seconds / 86_400:,.1f} days"


def table(found: dict[str, Any]) -> str:
    """Return a plan as text."""
    parts = ", ".join(f"{name} {number / 1e6:,.2f}" for name, number in found["parameters"].items())
    learning = found["parameters_learning"] / 1e6
    lines = [
        ("parameters", f"{found['parameters_total'] / 1e6:,.2f} M ({parts})"),
        ("that learn", f"{learning:,.2f} M"),
        (
            "a device",
            f"{found['rows']} rows of {found['horizon']} x {found['segment']} tokens, {found['precision']}; "
            f"{found['devices']} of them, {found['tokens_per_step']:,} tokens an optimiser step",
        ),
        *((f"  {name}", _size(size)) for name, size in found["memory_bytes"].items()),
        ("  together", f"{_size(found['memory_bytes_total'])} beside the programs themselves"),
        (
            "  of a row",
            f"{_size(found['activation_bytes_per_row'])} of them, {_size(found['state_bytes_per_row'])} state",
        ),
        (
            "operations",
            f"{found['flops_per_token']['reading'] / 1e6:,.1f} M a token read, "
            f"{found['flops_per_token']['training'] / 1e6:,.1f} M trained on"
            + ("" if found["flops_count_attention"] else ", without attention's pairs"),
        ),
        (
            "speed",
            f"{found['tokens_per_second']:,.0f} tokens/s, at {found['utilisation']:.0%} of "
            f"{found['peak_flops'] / 1e12:,.2f} TFLOP/s a device"
            + (", measured here" if found["peak_measured"] else ""),
        ),
    ]
    if found["run_tokens"]:
        lines.append(("the run", f"{_long(found['run_seconds'])} for {found['run_tokens']:,} tokens"))
    if found["corpus_tokens"]:
        lines.append(("the texts", f"{_long(found['corpus_seconds'])} for {found['corpus_tokens']:,.0f} tokens once"))
    return "".join(f"{name:<16} {value}\n" for name, value in lines)


def main(argv: list[str]) -> int:
    """Run ``memtx plan`` with its arguments and return the exit code."""
    parser = _parser()
    quiet()

    def body() -> int:
        arguments, further = parser.parse_some(argv)
        try:
            found = planned(arguments, further)
        except SystemExit as stopped:  # the parser of `memtx fit` has said why
            return stopped.code if isinstance(stopped.code, int) else MISTAKE
        sys.stdout.write(json.dumps(found) + "\n" if arguments.json else table(found))
        return 0

    return run(body, traceback="--traceback" in argv)
