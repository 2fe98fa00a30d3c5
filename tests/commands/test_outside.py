"""A memory class in a file of the user, in a stack, named by class_path: trained, saved, resumed and evaluated."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

import tests.third_party_memory
from tests.commands.program import Program
from tests.commands.runs import changed, write, write_books

STACK = [
    [
        {"class_path": "memtx.RecurrentMemory", "init_args": {"window": 8}},
        {"class_path": "their_memory.RunningMean", "init_args": {"gain": 0.5}},
    ]
]
MEMORIES = ("model", "model", "init_args", "memories")


def test_a_memory_class_of_the_user_is_trained_and_evaluated(program: Program, tmp_path: Path) -> None:
    shutil.copy(tests.third_party_memory.__file__, tmp_path / "their_memory.py")
    write_books(tmp_path / "books")
    write(tmp_path, changed(MEMORIES, STACK))
    result = program("fit", "--config", "c.yaml", "--trainer.max_steps", "2", cwd=tmp_path)
    assert result.code == 0, result.err
    result = program("fit", "--config", "run/config.yaml", "--ckpt_path", "last", cwd=tmp_path)
    assert result.code == 0, result.err
    printed = program("fit", "--config", "run/config.yaml", "--print_config", cwd=tmp_path)
    assert printed.code == 0, printed.err
    ((first, second),) = yaml.safe_load(printed.out)["model"]["model"]["init_args"]["memories"]
    assert (first["class_path"], second["class_path"]) == ("memtx.RecurrentMemory", "their_memory.RunningMean")
    assert second["init_args"] == {"gain": 0.5}
    (tmp_path / "text.txt").write_text("It was a dark and stormy night.\n", encoding="utf-8")
    result = program("test", "--run_dir", "run", cwd=tmp_path)
    assert result.code == 0, result.err


def test_an_error_in_a_stack_is_one_line(program: Program, tmp_path: Path) -> None:
    write_books(tmp_path / "books")
    for options, expected in (({"windw": 8}, "windw"), ({"window": 0}, "window is 0")):
        stack = [[{"class_path": "memtx.RecurrentMemory", "init_args": options}]]
        write(tmp_path, changed(MEMORIES, stack))
        result = program("fit", "--config", "c.yaml", cwd=tmp_path)
        assert result.code == 2
        assert result.err.count("\n") == 1
        assert expected in result.err, result.err
