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
from memtx.cli.lightning_cli import MemtxCLI, get_data_options
from memtx.data.tokenized_corpus import TokenizedCorpus, is_tokenized_corpus
from memtx.errors import MemtxError
from memtx.ops.cpu.cpu_info import choose_precision
from memtx.training import cost
from memtx.training.callbacks.accumulation import AccumulationSchedule
from memtx.training.callbacks.progress import format_duration
from memtx.training.callbacks.throughput import matmul_dtype
from memtx.training.language import LanguageModule

DEFAULT_MFU = {2: 0.3, 4: 0.6, 8: 0.6}
"""Model FLOPs utilization of training by bytes per number, as scripts/bench_step.py measures it on a CPU."""

SHARDED_STRATEGIES = ("fsdp", "modelparallel", "deepspeed")
"""Substrings of the names of strategies that shard weights over devices."""


class _PlanCLI(MemtxCLI):
    """CLI that builds module and data, but no trainer and no run."""

    def before_instantiate_classes(self) -> None:
        """Skip the checks of data and checkpoint; a config without texts uses the embedded texts."""
        self._checkpoint = None
        data_options = get_data_options(self.config["fit"])
        if data_options.get("root", "") is None:
            data_options.root = "embedded"

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build no trainer."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _count_parameters_and_flops(module: LanguageModule) -> dict[str, Any]:
    parameters, flops = cost.count_parameters(module.model), cost.count_flops(module.model, module.segment_length)
    return {
        "parameters": parameters,
        "num_parameters": sum(parameters.values()),
        "num_trainable_parameters": sum(weight.numel() for weight in module.model.parameters() if weight.requires_grad),
        "flops_per_token": {"forward": flops.forward, "training": flops.training},
        "flops_include_attention": flops.includes_attention,
    }


def _estimate_memory(module: LanguageModule, plan: dict[str, Any], num_shards: int) -> dict[str, Any]:
    """Return the bytes per device, by use and in total."""
    model, batch_size, precision = module.model, plan["batch_size"], plan["precision"]
    is_half = matmul_dtype(precision).itemsize == 2
    num_bytes = 2 if is_half and precision.endswith("true") else 4
    memory = {
        "weights": num_bytes * plan["num_parameters"] // num_shards,
        "gradients": num_bytes * plan["num_trainable_parameters"] // num_shards,
        "optimizer": cost.optimizer_bytes(model, module.make_optimizer) * num_bytes // 4 // num_shards,
        "activations": cost.activation_bytes(
            model, batch_size, module.segment_length, plan["bptt_segments"], replay=module.replay, bf16=is_half
        ),
        "state": 2 * batch_size * model.init_state(1).nbytes,  # the old and the new one
    }
    return {
        "memory_bytes": memory,
        "memory_bytes_total": sum(memory.values()),
        "state_bytes_per_stream": memory["state"] // (2 * batch_size),
        "activation_bytes_per_stream": memory["activations"] // batch_size,
    }


def _estimate_speed(arguments: argparse.Namespace, plan: dict[str, Any]) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = matmul_dtype(plan["precision"])
    peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else cost.measure_peak_flops(device, dtype, 2048)
    mfu = arguments.mfu or DEFAULT_MFU[dtype.itemsize]
    return {
        "peak_flops": peak,
        "peak_flops_is_measured": arguments.peak_tflops is None,
        "mfu": mfu,
        "tokens_per_second": plan["devices"] * mfu * peak / plan["flops_per_token"]["training"],
    }


def _count_batches(trainer: Any, num_steps: int) -> int:
    """Return the batches of the first optimizer steps of a run, given the trainer's options."""
    for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else ():
        if callback.class_path.endswith(f".{AccumulationSchedule.__name__}"):
            return AccumulationSchedule(**callback.init_args.as_dict()).count_batches(num_steps)
    return num_steps * (trainer.accumulate_grad_batches or 1)


def build_plan(arguments: argparse.Namespace, fit_arguments: list[str]) -> dict[str, Any]:
    """Return all figures of the plan from the options of ``memtx plan`` and of ``memtx fit``."""
    configs = [argument for path in arguments.config for argument in ("--config", path)]
    with torch.device("meta"):
        cli = _PlanCLI.from_arguments(["fit", *configs, *fit_arguments], "memtx plan", save_config_callback=None)
    module, data, trainer = cli.model, cli.datamodule, cli.config["fit"].trainer
    if not isinstance(module, LanguageModule):
        message = f"{type(module).__name__} is not a LanguageModule."
        raise MemtxError(message, "Only training of language models can be planned.")
    devices = arguments.devices or (trainer.devices if isinstance(trainer.devices, int) else 1)
    precision = str(trainer.precision or "32-true")
    if arguments.peak_tflops is None:  # for this machine
        precision = choose_precision(precision, str(trainer.accelerator))
    batch_size = int(data.batch_size)
    bptt_segments = int(getattr(data, "bptt_segments", getattr(data, "num_segments", 1)))
    tokens_per_batch = devices * batch_size * module.segment_length * bptt_segments
    plan: dict[str, Any] = {
        "devices": devices,
        "batch_size": batch_size,
        "segment_length": module.segment_length,
        "bptt_segments": bptt_segments,
        "precision": precision,
        "tokens_per_step": tokens_per_batch * (trainer.accumulate_grad_batches or 1),
    }
    is_sharded = any(name in str(trainer.strategy).lower() for name in SHARDED_STRATEGIES)
    plan |= _count_parameters_and_flops(module)
    plan |= _estimate_memory(module, plan, devices if is_sharded else 1)
    plan |= _estimate_speed(arguments, plan)
    corpus_tokens = arguments.tokens
    if corpus_tokens is None and is_tokenized_corpus(root := str(getattr(data, "root", ""))):
        corpus_tokens = TokenizedCorpus(root).splits["train"]["tokens"]
    run_tokens = _count_batches(trainer, max(trainer.max_steps or 0, 0)) * tokens_per_batch or None
    for name, tokens in (("run", run_tokens), ("corpus", corpus_tokens)):
        seconds = tokens / plan["tokens_per_second"] if tokens else None
        plan |= {f"{name}_tokens": tokens, f"{name}_seconds": seconds}
    return plan


def _format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.1f} MiB"


def format_plan(plan: dict[str, Any]) -> str:
    """Return a plan as text."""
    parts = ", ".join(f"{name} {number / 1e6:,.2f}" for name, number in plan["parameters"].items())
    batch = f"batch of {plan['batch_size']} x {plan['bptt_segments']} segments of {plan['segment_length']} tokens"
    step = f"{plan['devices']} devices, {plan['tokens_per_step']:,} tokens per optimizer step"
    activations, state = (_format_bytes(plan[f"{name}_bytes_per_stream"]) for name in ("activation", "state"))
    forward, training = (f"{plan['flops_per_token'][name] / 1e6:,.1f} M" for name in ("forward", "training"))
    attention = "" if plan["flops_include_attention"] else ", excluding attention scores"
    peak = f"{plan['peak_flops'] / 1e12:,.2f} TFLOP/s per device"
    measured = ", measured here" if plan["peak_flops_is_measured"] else ""
    lines = [
        ("parameters", f"{plan['num_parameters'] / 1e6:,.2f} M ({parts})"),
        ("trainable", f"{plan['num_trainable_parameters'] / 1e6:,.2f} M"),
        ("per device", f"{batch}, {plan['precision']}; {step}"),
        *((f"  {name}", _format_bytes(num_bytes)) for name, num_bytes in plan["memory_bytes"].items()),
        ("  total", f"{_format_bytes(plan['memory_bytes_total'])} excluding the process itself"),
        ("  per stream", f"{activations} activations, {state} state"),
        ("operations", f"{forward} per token in reading, {training} in training{attention}"),
        ("speed", f"{plan['tokens_per_second']:,.0f} tokens/s at {plan['mfu']:.0%} of {peak}{measured}"),
    ]
    for label, name in (("run", "run"), ("one epoch", "corpus")):
        if tokens := plan[f"{name}_tokens"]:
            seconds = plan[f"{name}_seconds"]
            duration = format_duration(seconds) if seconds < 2 * 86_400 else f"{seconds / 86_400:,.1f} days"
            lines.append((label, f"{duration} for {tokens:,.0f} tokens"))
    return "".join(f"{name:<16} {value}\n" for name, value in lines)


def _plan(arguments: argparse.Namespace, fit_arguments: list[str]) -> int:
    try:
        plan = build_plan(arguments, fit_arguments)
    except SystemExit as error:  # the parser of `memtx fit` has printed the reason
        return error.code if isinstance(error.code, int) else EXIT_USAGE_ERROR
    sys.stdout.write(json.dumps(plan) + "\n" if arguments.json else format_plan(plan))
    configs = [word for path in arguments.config for word in ("--config", path)]
    options.print_next_command("Train with", "fit", *configs, *fit_arguments, is_data=arguments.json)
    return 0


def main(argv: list[str]) -> int:
    """Run ``memtx plan``."""
    parser = options.Parser(
        "memtx plan",
        "Estimate parameters, memory per device, operations, tokens per second and days of a training run. Trains "
        "nothing and reads no text. Also takes the options of `memtx fit`, such as --data.batch_size 16.",
    )
    add, positive_float = parser.add_argument, options.positive_float
    add("--config", "-c", action="append", required=True, metavar="FILE", help="as in `memtx fit`")
    add("--devices", type=options.positive_int, metavar="N", help="number of devices; defaults to the config's, or 1")
    add("--tokens", type=positive_float, metavar="N", help="training tokens; defaults to a prepared folder's")
    add("--peak-tflops", type=positive_float, metavar="X", help="peak TFLOP/s of a device; measured here by default")
    add("--mfu", type=positive_float, metavar="X", help="fraction of the peak reached (default: 0.6; 16 bits: 0.3)")
    add("--json", action="store_true", help="print all figures as JSON")
    install_warning_filters()
    arguments, fit_arguments = parser.parse_known_args(argv)
    return run(lambda: _plan(arguments, fit_arguments), traceback=arguments.traceback)
