"""``memtx plan``: estimate parameters, memory, operations, speed and duration of a training run before it starts."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from memtx.cli import options
from memtx.cli.errors import EXIT_USAGE_ERROR, run
from memtx.cli.fit import install_warning_filters
from memtx.cli.lightning_cli import MemtxCLI
from memtx.data.tokenized_corpus import TokenizedCorpus, is_tokenized_corpus
from memtx.errors import MemtxError
from memtx.ops.cpu.cpu_info import choose_precision
from memtx.training import cost
from memtx.training.callbacks.progress import format_duration
from memtx.training.callbacks.throughput import matmul_dtype
from memtx.training.language import LanguageModule

DEFAULT_MFU = {2: 0.3, 4: 0.6, 8: 0.6}
"""Model FLOPs utilization of training by bytes per number, as scripts/bench_step.py measures it on a CPU."""

SHARDED_STRATEGIES = ("fsdp", "modelparallel", "deepspeed")
"""Parts of the names of strategies that shard weights over devices."""


def _build_parser() -> options.Parser:
    parser = options.Parser(
        "memtx plan",
        "Estimate parameters, memory per device, operations, tokens per second and days of a training run. Trains "
        "nothing and reads no text. Takes the options of `memtx fit` as well, such as --data.batch_size 16.",
    )
    add = parser.add_argument
    add("--config", "-c", action="append", required=True, metavar="FILE", help="as in `memtx fit`")
    add("--devices", type=options.positive_int, metavar="N", help="number of devices; defaults to the config's, or 1")
    add("--tokens", type=options.positive_float, metavar="N", help="training tokens; defaults to a prepared folder's")
    add("--peak-tflops", type=options.positive_float, metavar="X", help="peak of a device; measured here by default")
    add(
        "--mfu",
        type=options.positive_float,
        metavar="X",
        help="reached fraction of the peak (default: 0.6; 16 bits: 0.3)",
    )
    add("--json", action="store_true", help="print all figures as JSON")
    return parser


class _PlanCLI(MemtxCLI):
    """CLI that builds module and data, but no trainer and no run."""

    def before_instantiate_classes(self) -> None:
        """Skip the checks of data and checkpoint; a config without texts gets the embedded ones."""
        self._checkpoint = None
        data = self.config["fit"].data
        settings = data.get("init_args", data)
        if settings.get("root", "") is None:
            settings.root = "embedded"

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build none."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _instantiate_cli(argv: list[str]) -> _PlanCLI:
    """Build the objects of ``memtx fit``, with weights on the meta device."""
    with torch.device("meta"):
        cli = _PlanCLI.from_arguments(argv, "memtx plan", save_config_callback=None)
    if not isinstance(cli.model, LanguageModule):
        raise MemtxError(
            f"{type(cli.model).__name__} is not a LanguageModule.", "Only training of language models can be planned."
        )
    return cli


def _estimate_memory(
    module: LanguageModule, *, num_shards: int, batch_size: int, bptt_segments: int, dtype: torch.dtype, precision: str
) -> dict[str, int]:
    """Return the bytes per device by their use."""
    model, is_half = module.model, dtype.itemsize == 2
    num_bytes = 2 if is_half and precision.endswith("true") else 4
    parameters = list(model.parameters())
    return {
        "weights": num_bytes * sum(cost.count_parameters(model).values()) // num_shards,
        "gradients": num_bytes * sum(weight.numel() for weight in parameters if weight.requires_grad) // num_shards,
        "optimizer": cost.optimizer_bytes(model, module.make_optimizer) * num_bytes // 4 // num_shards,
        "activations": cost.activation_bytes(
            model, batch_size, module.segment_length, bptt_segments, replay=module.replay, bf16=is_half
        ),
        "state": 2 * batch_size * model.init_state(1).nbytes,  # the old and the new one
    }


def build_plan(arguments: argparse.Namespace, fit_arguments: list[str]) -> dict[str, Any]:
    """Return all figures of the plan.

    Args:
        arguments: Options of ``memtx plan``.
        fit_arguments: Further options, those of ``memtx fit``.
    """
    configs = [argument for path in arguments.config for argument in ("--config", path)]
    cli = _instantiate_cli(["fit", *configs, *fit_arguments])
    module, data, trainer = cli.model, cli.datamodule, cli.config["fit"].trainer
    devices = arguments.devices or (trainer.devices if isinstance(trainer.devices, int) else 1)
    precision = str(trainer.precision or "32-true")
    if arguments.peak_tflops is None:  # for this machine
        precision = choose_precision(precision, str(trainer.accelerator))
    dtype = matmul_dtype(precision)
    batch_size = int(data.batch_size)
    bptt_segments = int(getattr(data, "bptt_segments", getattr(data, "num_segments", 1)))
    is_sharded = any(name in str(trainer.strategy).lower() for name in SHARDED_STRATEGIES)
    memory = _estimate_memory(
        module,
        num_shards=devices if is_sharded else 1,
        batch_size=batch_size,
        bptt_segments=bptt_segments,
        dtype=dtype,
        precision=precision,
    )
    parameters, flops = cost.count_parameters(module.model), cost.count_flops(module.model, module.segment_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else cost.measure_peak_flops(device, dtype, 2048)
    mfu = arguments.mfu or DEFAULT_MFU[dtype.itemsize]
    tokens_per_second = devices * mfu * peak / flops.training
    accumulation = trainer.accumulate_grad_batches or 1
    tokens_per_step = devices * batch_size * module.segment_length * bptt_segments * accumulation
    corpus_tokens = arguments.tokens
    if corpus_tokens is None and is_tokenized_corpus(root := str(getattr(data, "root", ""))):
        corpus_tokens = TokenizedCorpus(root).splits["train"]["tokens"]
    run_tokens = trainer.max_steps * tokens_per_step if trainer.max_steps and trainer.max_steps > 0 else None
    return {
        "parameters": parameters,
        "num_parameters": sum(parameters.values()),
        "num_trainable_parameters": sum(p.numel() for p in module.model.parameters() if p.requires_grad),
        "memory_bytes": memory,
        "memory_bytes_total": sum(memory.values()),
        "state_bytes_per_stream": memory["state"] // (2 * batch_size),
        "activation_bytes_per_stream": memory["activations"] // batch_size,
        "flops_per_token": {"forward": flops.forward, "training": flops.training},
        "flops_include_attention": flops.includes_attention,
        "devices": devices,
        "batch_size": batch_size,
        "segment_length": module.segment_length,
        "bptt_segments": bptt_segments,
        "precision": precision,
        "tokens_per_step": tokens_per_step,
        "peak_flops": peak,
        "peak_flops_is_measured": arguments.peak_tflops is None,
        "mfu": mfu,
        "tokens_per_second": tokens_per_second,
        "run_tokens": run_tokens,
        "run_seconds": run_tokens / tokens_per_second if run_tokens else None,
        "corpus_tokens": corpus_tokens,
        "corpus_seconds": corpus_tokens / tokens_per_second if corpus_tokens else None,
    }


def _format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.1f} MiB"


def _format_duration(seconds: float) -> str:
    return format_duration(seconds) if seconds < 2 * 86_400 else f"{seconds / 86_400:,.1f} days"


def format_plan(plan: dict[str, Any]) -> str:
    """Return a plan as text."""
    parts = ", ".join(f"{name} {number / 1e6:,.2f}" for name, number in plan["parameters"].items())
    flops, measured = plan["flops_per_token"], ", measured here" if plan["peak_flops_is_measured"] else ""
    attention = "" if plan["flops_include_attention"] else ", without the scores of attention"
    lines = [
        ("parameters", f"{plan['num_parameters'] / 1e6:,.2f} M ({parts})"),
        ("trainable", f"{plan['num_trainable_parameters'] / 1e6:,.2f} M"),
        (
            "per device",
            f"batch of {plan['batch_size']} x {plan['bptt_segments']} segments of {plan['segment_length']} tokens, "
            f"{plan['precision']}; {plan['devices']} devices, {plan['tokens_per_step']:,} tokens per optimizer step",
        ),
        *((f"  {name}", _format_bytes(num_bytes)) for name, num_bytes in plan["memory_bytes"].items()),
        ("  total", f"{_format_bytes(plan['memory_bytes_total'])} without the programs themselves"),
        (
            "  per stream",
            f"{_format_bytes(plan['activation_bytes_per_stream'])} activations, "
            f"{_format_bytes(plan['state_bytes_per_stream'])} state",
        ),
        (
            "operations",
            f"{flops['forward'] / 1e6:,.1f} M per token in reading, {flops['training'] / 1e6:,.1f} M in training"
            f"{attention}",
        ),
        (
            "speed",
            f"{plan['tokens_per_second']:,.0f} tokens/s at {plan['mfu']:.0%} of {plan['peak_flops'] / 1e12:,.2f} "
            f"TFLOP/s per device{measured}",
        ),
    ]
    if plan["run_tokens"]:
        lines.append(("run", f"{_format_duration(plan['run_seconds'])} for {plan['run_tokens']:,} tokens"))
    if plan["corpus_tokens"]:
        duration = _format_duration(plan["corpus_seconds"])
        lines.append(("one epoch", f"{duration} for {plan['corpus_tokens']:,.0f} tokens"))
    return "".join(f"{name:<16} {value}\n" for name, value in lines)


def main(argv: list[str]) -> int:
    """Run ``memtx plan``."""
    parser = _build_parser()
    install_warning_filters()

    def body() -> int:
        arguments, fit_arguments = parser.parse_known_args(argv)
        try:
            plan = build_plan(arguments, fit_arguments)
        except SystemExit as error:  # the parser of `memtx fit` has printed the reason
            return error.code if isinstance(error.code, int) else EXIT_USAGE_ERROR
        sys.stdout.write(json.dumps(plan) + "\n" if arguments.json else format_plan(plan))
        return 0

    return run(body, traceback="--traceback" in argv)
