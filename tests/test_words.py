"""Rules of words: the field's terms in names and prose, and docstrings that begin with a noun or a verb."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import memtx

ROOT = Path(memtx.__file__).parent.parent
SOURCES = sorted(path for folder in ("memtx", "scripts", "tests") for path in (ROOT / folder).rglob("*.py"))
PAGES = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "README.md", ROOT / "scripts" / "README.md"]

# Names with a better-known term (glossary of CHANGELOG.md): nothing may define them again.
OLD_NAMES = {
    "allocator": "malloc",
    "answering": "base_predictor",
    "asking": "write_tokens",
    "beside": "extra_memories, ModelComparison",
    "Beside": "ModelComparison",
    "born": "visible_from",
    "by_layer": "uses_layer_projections",
    "carried": "state, past_length",
    "checkpointing": "activation_checkpointing",
    "complain": "print_error",
    "cure": "hint",
    "cut_matters": "depends_on_segmentation",
    "drawn": "sampled",
    "Edge": "EvictedBlocks",
    "episodes": "synthetic_tasks",
    "erase": "delta_rule",
    "eval_rows": "eval_batch_size",
    "exhaustion": "oom",
    "expires": "visible_until",
    "FullError": "SessionLimitError",
    "gated": "gated_memory",
    "head_norm": "qk_norm",
    "horizon": "bptt_segments",
    "Inbox": "TokenQueue",
    "judge": "loss_fn",
    "Kept": "PretrainedModel",
    "knows_globals": "supports_global_attention",
    "lasting": "unbounded",
    "launched": "launcher",
    "Layout": "RingLayout",
    "longest": "max_length",
    "meter": "measure_memory_gain",
    "Mountable": "add_memory",
    "narrowed": "pca_init",
    "native": "needs_gate (negated), cpp",
    "Once": "Memo",
    "once": "memo",
    "OutOfTimeError": "DeadlineExceededError",
    "parted": "split_bank",
    "per_call": "compress_per_segment",
    "permuted": "xlnet",
    "Places": "EntryPositions",
    "randomness": "rng_state",
    "redealt": "elastic_resume",
    "resident": "max_in_memory",
    "restarts": "state_reset_prob",
    "return_hidden": "return_hidden_states",
    "same_layer": "ernie_doc",
    "sealed": "checksummed_zip",
    "Seen": "DecodePlan",
    "settle": "on_layer_output",
    "shelf": "session_store",
    "shown": "model_outputs",
    "Sizes": "ModelDims",
    "specs": "class_config",
    "starts": "document_starts",
    "state_of": "join_state",
    "summary_form": "summary_prompt",
    "surprise": "surprisal",
    "tick": "offset",
    "ticks": "offsets",
    "Trace": "LayerActivations",
    "tracing": "nonfinite_trace",
    "turned_by": "rotary_angles",
    "unfilled": "skip_init",
    "Window": "EncodedExample",
    "worth": "memory_gain",
}
# Names that say nothing: a name is a noun of the thing.
VAGUE_NAMES = {"asked", "found", "given", "here", "kept", "made", "one", "own", "place", "places"}
VAGUE_NAMES |= {"said", "theirs", "there", "told", "wanted", "whole"}
# Names with a better-known term that are right in some files: the rows of a table.
OLD_NAMES_ELSEWHERE = {"rows": "batch_size, batch"}
FILES_WITH_TABLES = ("memtx/data/sources/tables.py", "memtx/cli/evaluate.py", "scripts/", "tests/test_scripts.py")
# Words of prose with a better-known term, and words that no page of this field uses.
OLD_WORDS = re.compile(
    r"\b(horizons?|ticks?|likewise|lifetimes?|surprise[sd]?|asunder|anew|whosoever|whoever|hitherto|thereof|therein"
    r"|as few as|as many as may|in the midst|to be had|gone on with|of no)\b",
    re.IGNORECASE,
)
OPENING = r"(what|which|who|whom|whose|how|where|when|whether|why|of|likewise|that)\b"
DESCRIPTION = re.compile(r"^\s{4,}[\w*`/., ]+: " + OPENING, re.IGNORECASE | re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and name of each function, class, parameter, variable and attribute that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.Module | ast.ClassDef | ast.FunctionDef, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, text  # type: ignore[misc]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the comments and strings of a Python file, or the lines of another."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), start=1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_names_are_the_terms_of_the_field(path: Path) -> None:
    if path == Path(__file__):
        return
    old = dict(OLD_NAMES) | (OLD_NAMES_ELSEWHERE if not relative(path).startswith(FILES_WITH_TABLES) else {})
    mistakes = [
        f"line {line}: {name} ({old.get(name.strip('_'), 'name the thing')})"
        for line, name in defined_names(parse(path))
        if name.strip("_") in old or name.strip("_") in VAGUE_NAMES
    ]
    assert not mistakes


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_docstrings_begin_with_a_noun_or_a_verb(path: Path) -> None:
    for node, text in docstrings(parse(path)):
        name = getattr(node, "name", "the module")
        assert not re.match(OPENING, text, re.IGNORECASE), f"{name}: {text.splitlines()[0]}"
        assert not (match := DESCRIPTION.search(text)), f"{name}: {match[0].strip()}"


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=relative)
def test_prose_uses_plain_words(path: Path) -> None:
    if path == Path(__file__):
        return
    mistakes = [f"line {line}: {match[0]}" for line, text in prose(path) for match in OLD_WORDS.finditer(text)]
    assert not mistakes


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "memtx")], ids=relative)
def test_documented_arguments_exist(path: Path) -> None:
    tree = parse(path)
    for node, text in docstrings(tree):
        section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
        if not section or isinstance(node, ast.Module):
            continue
        names = {
            name.strip("*`")
            for group in re.findall(r"^    ([\w*`]+(?:, [\w*`]+)*): ", section[1], re.MULTILINE)
            for name in group.split(", ")
        }
        assert names <= _parameters(node), f"{node.name} has no parameter {names - _parameters(node)}"


def _parameters(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    """Return the parameters of a function or a constructor."""
    function = node
    if isinstance(node, ast.ClassDef):
        constructors = [child for child in node.body if getattr(child, "name", "") == "__init__"]
        if not constructors:
            fields = {child.target for child in node.body if isinstance(child, ast.AnnAssign)}
            return {field.id for field in fields if isinstance(field, ast.Name)}
        function = constructors[0]  # type: ignore[assignment]
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return {argument.arg for argument in (*named, arguments.vararg, arguments.kwarg) if argument}
