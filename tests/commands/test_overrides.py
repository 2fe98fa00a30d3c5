"""Overrides of Hydra and of sweep tools on the command line of fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from memtx.cli.overrides import expand_variables, to_options
from memtx.errors import MemtxError
from tests.commands.program import Program
from tests.commands.runs import write, write_books

FIT = ("fit", "--config", "c.yaml")


@pytest.mark.parametrize(
    ("argument", "option"),
    [
        ("trainer.max_steps=4", "--trainer.max_steps=4"),
        ("+data.root=a=b c", "--data.root=a=b c"),
        ("++seed_everything=1", "--seed_everything=1"),
        ("trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=LearningRateMonitor"),
        ("model.compression_rates=[2,4]", "--model.compression_rates=[2,4]"),
        ("data.root='my books'", "--data.root=my books"),
        ("model.optimizer={class_path:torch.optim.SGD,init_args:{lr:0.1}}",
         "--model.optimizer={class_path: torch.optim.SGD,init_args: {lr: 0.1}}"),
        ("data.source={path:s3://bucket/a}", "--data.source={path: s3://bucket/a}"),
        ("trainer.logger=None", "--trainer.logger=null"),
        ("--trainer.logger=None", "--trainer.logger=null"),
        ("run_dir=", "--run_dir="),
    ],
)  # fmt: skip
def test_an_override_is_an_option(argument: str, option: str) -> None:
    assert to_options([*FIT, argument, "--traceback", argument]) == [*FIT, option, "--traceback", option]


def test_values_of_options_are_no_overrides() -> None:
    argv = ["fit", "--data.root", "a=b", "--trainer.logger", "None", "-c", "x=1.yaml"]
    assert to_options(argv) == ["fit", "--data.root", "a=b", "--trainer.logger", "null", "-c", "x=1.yaml"]


@given(st.lists(st.from_regex(r"--[a-z.]{1,9}(=[a-z]{0,4})?|[a-z/. ]{1,9}", fullmatch=True)))
def test_other_arguments_stay(argv: list[str]) -> None:
    assert to_options(["fit", *argv]) == ["fit", *argv]


def sweep_arguments() -> dict[str, list[str]]:
    """Return the arguments of W&B's agent in each of its forms, by their names in a sweep's `command`."""
    values: dict[str, Any] = {
        "trainer.max_steps": 2, "model.optimizer.init_args.lr": 1e-05, "trainer.gradient_clip_val": None,
        "model.model.init_args.dim": 24, "model.measure_memory_gain": False,
    }  # fmt: skip
    flags = [f"{name}={value}" for name, value in values.items()]
    return {
        "args": [f"--{flag}" for flag in flags],
        "args_no_hyphens": flags,
        "args_no_equals": [word for name, value in values.items() for word in (f"--{name}", str(value))],
        "args_append_hydra": [f"+{flag}" for flag in flags],
        "args_override_hydra": [f"++{flag}" for flag in flags],
    }


def test_the_forms_are_those_of_the_agent() -> None:
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="wandb is not installed")
    values = (flag.removeprefix("--").split("=", 1) for flag in sweep_arguments()["args"])
    command = {"args": {name: {"value": value} for name, value in values}}
    actual = sweeps.create_sweep_command_args(command)
    for name, arguments in sweep_arguments().items():
        assert actual.get(name, arguments) == arguments


def test_a_sweep_sets_options_in_every_form(program: Program, tmp_path: Path) -> None:
    write_books(tmp_path / "books")
    write(tmp_path)
    options = {name: to_options([*FIT, *arguments]) for name, arguments in sweep_arguments().items()}
    joined = [*FIT, *map("=".join, zip(*[iter(options.pop("args_no_equals")[3:])] * 2, strict=True))]
    assert list(options.values()) == [joined] * 4
    result = program(*FIT, *sweep_arguments()["args_no_hyphens"], "--print_config", cwd=tmp_path)
    assert result.code == 0, result.err
    config = yaml.safe_load(result.out)
    assert config["trainer"]["max_steps"] == 2
    assert config["trainer"]["gradient_clip_val"] is None
    assert config["model"]["optimizer"]["init_args"]["lr"] == 1e-5
    assert config["model"]["model"]["init_args"]["dim"] == 24
    assert config["model"]["measure_memory_gain"] is False


def test_each_trial_has_a_folder_of_its_own(program: Program, tmp_path: Path) -> None:
    write_books(tmp_path / "books")
    write(tmp_path)
    arguments = (*FIT, "run_dir=runs/$WANDB_RUN_ID", "trainer.max_steps=1", "trainer.limit_val_batches=0")
    result = program(*arguments, cwd=tmp_path, environment={"WANDB_RUN_ID": "abc"})
    assert result.code == 0, result.err
    assert (tmp_path / "runs" / "abc" / "metrics.csv").is_file()
    for argument, message in (
        ("run_dir=runs/$NOT_SET_ANYWHERE", "needs the environment variable NOT_SET_ANYWHERE, which is not set"),
        ("~trainer.logger", "would remove a key, which is not supported. Set it: trainer.logger=null"),
        ("trainer.max_stps=1", "Did you mean '--trainer.max_steps'?"),
    ):
        result = program(*FIT, argument, cwd=tmp_path)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert message in result.err


def test_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN", "7")
    assert expand_variables("runs/$RUN-${RUN}") == "runs/7-7"
    assert expand_variables("runs/a") == "runs/a"
    with pytest.raises(MemtxError, match="MISSING_NAME"):
        expand_variables("${MISSING_NAME}")
