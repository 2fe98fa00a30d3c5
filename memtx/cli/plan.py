"""``memtx plan``: what a config's training takes, before any of it: parameters, memory, operations, speed, days."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from memtx.cli.class_config_cli import BASE_CLASSES, ClassPathCLI
from memtx.cli.fit import MemtxCLI, OneLineParser, uses_class_paths
from memtx.cli.options import EXIT_USAGE_ERROR, Parser, run
from memtx.cli.warning_filters import install_warning_filters
from memtx.data.books import BookDataModule
from memtx.data.tokenized_corpus import TokenizedCorpus, is_tokenized_corpus
from memtx.errors import MemtxError, check_positive
from memtx.ops.cpu import cpu_info
from memtx.training import cost
from memtx.training.callbacks.progress import format_duration
from memtx.training.callbacks.throughput import matmul_dtype
from memtx.training.language import LanguageModule

DEFAULT_MFU = {2: 0.3, 4: 0.6, 8: 0.6}
"""The share of the matrix peak that training reaches, by bytes of a number; scripts/bench_step.py's on a CPU."""

SHARDED_STRATEGIES = ("fsdp", "modelparallel", "deepspeed")
"""In the names of strategies that split weights over the devices."""


def _build_parser() -> Parser:
    parser = Parser(
        "memtx plan",
        "Say what the training of a config takes: parameters, memory of a device, operations, tokens per second, days. "
        "Nothing is trained and no text is read. Further options are those of `memtx fit`, such as "
        "--data.batch_size 16.",
    )
    parser.add_argument("--config", "-c", action="append", required=True, metavar="FILE", help="as of `memtx fit`")
    parser.add_argument("--devices", type=int, metavar="N", help="the config's own number by default, else 1")
    parser.add_argument("--tokens", type=float, metavar="N", help="to train on; a prepared folder's by default")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="of a device's matrix products; by default measured on this machine",
    )
    parser.add_argument(
        "--mfu", type=float, metavar="FRACTION", help="of that, which training reaches; else 0.6, in 16 bits 0.3"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


class _ConfigOnlyMixin:
    """A CLI that makes module and data, and neither a trainer nor a run."""

    def check_data_config(self, config: Any) -> None:
        """Need no texts."""

    def before_instantiate_classes(self) -> None:
        """Look for no checkpoint; texts that are not named yet may be any."""
        self._checkpoint = None
        data = self.config["fit"].data  # type: ignore[attr-defined]
        for settings in (data, data.get("init_args") or {}):
            if "root" in settings and settings["root"] is None:
                settings["root"] = "embedded"

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """Make none."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class _PlanCLI(_ConfigOnlyMixin, MemtxCLI):  # type: ignore[misc]
    pass


class _ClassPathPlanCLI(_ConfigOnlyMixin, ClassPathCLI):  # type: ignore[misc]
    pass


def _instantiate_cli(argv: list[str]) -> Any:
    """Return the CLI that made what ``memtx fit`` would make of its arguments, the weights without numbers."""
    parts = uses_class_paths(argv)
    module, data = BASE_CLASSES if parts else (LanguageModule, BookDataModule)
    with torch.device("meta"):
        made = (_ClassPathPlanCLI if parts else _PlanCLI)(
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


def build_plan(arguments: argparse.Namespace, fit_arguments: list[str]) -> dict[str, Any]:
    """Return all figures of a plan."""
    numbers = {name: getattr(arguments, name) for name in ("devices", "tokens", "peak_tflops", "mfu")}
    check_positive(**{name: value for name, value in numbers.items() if value is not None})
    configs = [part for path in arguments.config for part in ("--config", path)]
    made = _instantiate_cli(["fit", *configs, *fit_arguments])
    module, data, trainer = made.model, made.datamodule, made.config["fit"].trainer
    devices = arguments.devices or (trainer.devices if isinstance(trainer.devices, int) else 1)
    model, precision = module.model, str(trainer.precision or "32-true")
    if arguments.peak_tflops is None:  # of this machine
        precision = cpu_info.choose_precision(precision, str(trainer.accelerator))
    kind = matmul_dtype(precision)
    half = kind.itemsize == 2
    rows, horizon = int(data.batch_size), int(getattr(data, "bptt_segments", getattr(data, "num_segments", 1)))
    parameters = cost.count_parameters(model)
    total, learning = sum(parameters.values()), sum(one.numel() for one in model.parameters() if one.requires_grad)
    split = devices if any(one in str(trainer.strategy).lower() for one in SHARDED_STRATEGIES) else 1
    width = 2 if precision.endswith("true") and half else 4
    state = model.init_state(1).nbytes
    memory = {
        "weights": width * total // split,
        "gradients": width * learning // split,
        "optimizer": cost.optimizer_bytes(model, module.make_optimizer) * width // 4 // split,
        "activations": cost.activation_bytes(
            model, rows, module.segment_length, horizon, replay=module.replay, bf16=half
        ),
        # The one that is read and the one that is made.
        "state": 2 * rows * state,
    }
    operations = cost.count_flops(model, module.segment_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else cost.measure_peak_flops(device, kind, 2048)
    share = arguments.mfu or DEFAULT_MFU[kind.itemsize]
    rate = devices * share * peak / operations.training
    step = devices * rows * module.segment_length * horizon * (trainer.accumulate_grad_batches or 1)
    corpus = arguments.tokens
    if corpus is None and is_tokenized_corpus(root := str(getattr(data, "root", ""))):
        corpus = TokenizedCorpus(root).splits["train"]["tokens"]
    run_tokens = trainer.max_steps * step if trainer.max_steps and trainer.max_steps > 0 else None
    return {
        "parameters": parameters,
        "num_parameters": total,
        "num_trainable_parameters": learning,
        "memory_bytes": memory,
        "memory_bytes_total": sum(memory.values()),
        "state_bytes_per_stream": state,
        "activation_bytes_per_stream": memory["activations"] // rows,
        "flops_per_token": {"forward": operations.forward, "training": operations.training},
        "flops_include_attention": operations.includes_attention,
        "devices": devices,
        "batch_size": rows,
        "segment_length": module.segment_length,
        "bptt_segments": horizon,
        "precision": precision,
        "tokens_per_step": step,
        "peak_flops": peak,
        "peak_flops_is_measured": arguments.peak_tflops is None,
        "mfu": share,
        "tokens_per_second": rate,
        "run_tokens": run_tokens,
        "run_seconds": run_tokens / rate if run_tokens else None,
        "corpus_tokens": corpus,
        "corpus_seconds": corpus / rate if corpus else None,
    }


def _format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.1f} MiB"


def _format_duration(seconds: float) -> str:
    return format_duration(seconds) if seconds < 2 * 86_400 else f"{seconds / 86_400:,.1f} days"


def format_plan(plan: dict[str, Any]) -> str:
    """Return a plan as text."""
    parts = ", ".join(f"{name} {number / 1e6:,.2f}" for name, number in plan["parameters"].items())
    learning = plan["num_trainable_parameters"] / 1e6
    lines = [
        ("parameters", f"{plan['num_parameters'] / 1e6:,.2f} M ({parts})"),
        ("that learn", f"{learning:,.2f} M"),
        (
            "a device",
            f"{plan['batch_size']} rows of {plan['bptt_segments']} x {plan['segment_length']} tokens, "
            f"{plan['precision']}; {plan['devices']} of them, {plan['tokens_per_step']:,} tokens an optimiser step",
        ),
        *((f"  {name}", _format_bytes(size)) for name, size in plan["memory_bytes"].items()),
        ("  together", f"{_format_bytes(plan['memory_bytes_total'])} beside the programs themselves"),
        (
            "  of a row",
            f"{_format_bytes(plan['activation_bytes_per_stream'])} of them, "
            f"{_format_bytes(plan['state_bytes_per_stream'])} state",
        ),
        (
            "operations",
            f"{plan['flops_per_token']['forward'] / 1e6:,.1f} M a token read, "
            f"{plan['flops_per_token']['training'] / 1e6:,.1f} M trained on"
            + ("" if plan["flops_include_attention"] else ", without attention's pairs"),
        ),
        (
            "speed",
            f"{plan['tokens_per_second']:,.0f} tokens/s, at {plan['mfu']:.0%} of "
            f"{plan['peak_flops'] / 1e12:,.2f} TFLOP/s a device"
            + (", measured here" if plan["peak_flops_is_measured"] else ""),
        ),
    ]
    if plan["run_tokens"]:
        lines.append(("the run", f"{_format_duration(plan['run_seconds'])} for {plan['run_tokens']:,} tokens"))
    if plan["corpus_tokens"]:
        lines.append(
            ("the texts", f"{_format_duration(plan['corpus_seconds'])} for {plan['corpus_tokens']:,.0f} tokens once")
        )
    return "".join(f"{name:<16} {value}\n" for name, value in lines)


def main(argv: list[str]) -> int:
    """Run ``memtx plan`` with its arguments and return the exit code."""
    parser = _build_parser()
    install_warning_filters()

    def body() -> int:
        arguments, further = parser.parse_known(argv)
        try:
            found = build_plan(arguments, further)
        except SystemExit as stopped:  # the parser of `memtx fit` has said why
            return stopped.code if isinstance(stopped.code, int) else EXIT_USAGE_ERROR
        sys.stdout.write(json.dumps(found) + "\n" if arguments.json else format_plan(found))
        return 0

    return run(body, traceback="--traceback" in argv)
