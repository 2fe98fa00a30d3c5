"""Rules of layout: imports point downward, files are short, and only the command line prints."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import memtx

PACKAGE = Path(memtx.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_SOURCES = sorted(path for name in ("memtx", "scripts", "tests") for path in (ROOT / name).rglob("*.py"))
PAGES = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "README.md", ROOT / "scripts" / "README.md"]

# A file imports from lower rows only; the longest prefix of its name determines its row.
ROWS = [
    ("errors",),
    ("files", "memo", "word_measure"),
    ("class_config", "metrics", "plots", "state_compression"),
    ("task_plots",),
    ("state", "segment"),
    ("ops", "data"),
    ("memory",),
    ("layers", "checkpoint"),
    ("models",),
    ("hf",),
    ("checkpoint.load", "checkpoint.convert", "checkpoint.hf_export", "checkpoint.model_card"),
    ("export",),
    ("checkpoint.training", "checkpoint.async_io", "checkpoint.trainer_state", "checkpoint.whole_step"),
    ("training", "inference"),
    ("hf.memory_cache", "hf.transformers_model"),
    ("serving", "evaluation"),
    ("cli", "__main__"),
]
HEIGHTS = {name: height for height, row in enumerate(ROWS) for name in row}
# Data imports no model code; only code that trains on text, reads it or measures with it imports data.
IMPORTABLE_BY_DATA = {"data", "errors", "files", "class_config", "metrics", "plots"}
IMPORTERS_OF_DATA = {
    "data",
    "training",
    "inference",
    "evaluation",
    "serving",
    "cli",
    "checkpoint.load",
    "checkpoint.convert",
    "export",
    "checkpoint.hf_export",
}
FORBIDDEN = {("serving", "training"), ("training", "inference")}
# Importing Lightning takes seconds, so only these files do.
LIGHTNING_IMPORTERS = (
    "training",
    "checkpoint/training.py",
    "checkpoint/async_io.py",
    "checkpoint/trainer_state.py",
    "checkpoint/whole_step.py",
    "data/books.py",
    "data/tasks/data_module.py",
    "data/episodes.py",
    "data/stream_module.py",
    "data/babilong.py",
    "cli/config_reference.py",
    "data/series/data_module.py",
    "cli/fit.py",
    "cli/lightning_cli.py",
    "cli/one_line_parser.py",
)
MAX_LINES = 400
MAX_MEDIAN_LINES = 200
MAX_FILES = 375
MAX_TOTAL_LINES = 56_000
# Names with a better-known term (glossary of CHANGELOG.md): nothing may define them again.
OLD_NAMES = {
    "absolute": "absolute_positions",
    "allocator": "malloc",
    "answering": "base_predictor",
    "apart": "apply_relative",
    "asking": "write_tokens",
    "background": "async_checkpoint",
    "beside": "extra_memories, ModelComparison",
    "Beside": "ModelComparison",
    "block_attention": "bigbird",
    "born": "visible_from",
    "by_layer": "uses_layer_projections",
    "by_products": "bf16_backward",
    "carried": "state, past_length",
    "checkpointing": "activation_checkpointing",
    "chunk_attention": "reformer",
    "complain": "print_error",
    "cost": "write_penalty",
    "cure": "hint",
    "cut_matters": "depends_on_segmentation",
    "drawn": "sampled",
    "Edge": "EvictedBlocks",
    "episodes": "synthetic_tasks",
    "erase": "delta_rule",
    "eval_rows": "eval_batch_size",
    "exhaustion": "oom",
    "expires": "visible_until",
    "forget": "reset",
    "FullError": "SessionLimitError",
    "fused_blocks": "gathered_blocks",
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
    "logs": "csv_logger",
    "longest": "max_length",
    "measures": "metrics",
    "meter": "measure_memory_gain",
    "Mountable": "add_memory",
    "mounting": "add_memory",
    "narrowed": "pca_init",
    "native": "needs_gate (negated), cpp",
    "offset_tokenizers": "hf_tokenizers",
    "Once": "Memo",
    "once": "memo",
    "OutOfTimeError": "DeadlineExceededError",
    "parted": "split_bank",
    "Pattern": "SparsePattern",
    "per_call": "compress_per_segment",
    "permuted": "xlnet",
    "Places": "EntryPositions",
    "plans": "packing",
    "processor": "cpu_info",
    "promises": "invariants",
    "randomness": "rng_state",
    "redealt": "elastic_resume",
    "remember": "save_init_args",
    "replies": "responses",
    "resident": "max_in_memory",
    "restarts": "state_reset_prob",
    "return_hidden": "return_hidden_states",
    "same_layer": "ernie_doc",
    "sealed": "checksummed_zip",
    "Section": "KeyRange",
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
    "window_attention": "longformer",
    "worth": "memory_gain",
}
# Stems of files that have another name now.
OLD_FILES = {
    "allocator", "answering", "answers", "background", "beside", "by_products", "cached", "calls", "complain",
    "compiled", "continuation", "drawn", "edge", "embedded", "encoding", "exhaustion", "finite", "fitting", "folder",
    "fused", "kinds", "launched", "logs", "measured", "measures", "meter", "moments", "mounting", "names", "narrowed",
    "native", "offset_tokenizers", "once", "own", "permuted", "pieces", "places", "plans", "prepared", "problems",
    "processor", "promises", "quiet", "randomness", "reading", "readouts", "redealt", "replies", "requeue", "ring",
    "same_layer", "scored", "sealed", "shelf", "shown", "specs", "start", "stored", "theirs", "tracing", "trained",
    "turned_by", "unfilled", "weights", "worth",
}  # fmt: skip
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


def row_name(module: str) -> str:
    """Return the longest prefix of a module's name, without the package's, that has a row."""
    parts = module.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in HEIGHTS), parts[0])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path) -> Iterator[str]:
    """Yield the absolute name of each import in a file, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def may_import(importer: str, imported: str) -> bool:
    """Return whether files of one row name may import those of another."""
    same_package = importer.partition(".")[0] == imported.partition(".")[0]
    if importer == "__main__" or (same_package and HEIGHTS[importer] == HEIGHTS[imported]):
        return True
    if importer == "data":
        return imported in IMPORTABLE_BY_DATA
    if imported == "data":
        return importer in IMPORTERS_OF_DATA
    return HEIGHTS[imported] < HEIGHTS[importer] and (importer, imported) not in FORBIDDEN


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_downward(path: Path) -> None:
    importer = row_name(module_name(path))
    if importer == "__init__":
        return
    assert importer in HEIGHTS, f"{importer} has no row in ROWS"
    for name in imported_names(path):
        package, _, module = name.partition(".")
        if package == "memtx" and module and module != "__version__":
            imported = row_name(module)
            # A public class imported by its short name would hide its row.
            assert imported in HEIGHTS, f"{path}: import {name} from the file that defines it"
            assert may_import(importer, imported), f"{path}: {importer} may not import {module}"
        if package in ("lightning", "pytorch_lightning"):
            assert str(path.relative_to(PACKAGE)).startswith(LIGHTNING_IMPORTERS), f"{path} may not import Lightning"


def test_rows_forbid_upward_imports() -> None:
    assert may_import("memory", "ops")
    assert not may_import("ops", "memory")
    assert not may_import("models", "data")
    assert not may_import("models", "hf")
    assert not may_import("data", "ops")
    assert not may_import("training", "inference")
    assert not may_import("state", "segment")


def test_files_are_short_and_few() -> None:
    num_lines = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    too_long = {name: count for name, count in num_lines.items() if count > MAX_LINES}
    assert not too_long, f"a file of more than {MAX_LINES} lines has two subjects"
    counts = sorted(count for name, count in num_lines.items() if not name.endswith("__init__.py"))
    assert counts[len(counts) // 2] < MAX_MEDIAN_LINES
    assert len(SOURCES) <= MAX_FILES
    assert sum(num_lines.values()) <= MAX_TOTAL_LINES


def test_no_module_has_a_catch_all_name() -> None:
    for path in SOURCES:
        names = (*path.relative_to(PACKAGE).parts[:-1], path.stem)
        assert not {"utils", "util", "helpers", "misc", "common"}.intersection(names), path


def test_only_the_command_line_prints() -> None:
    for path in SOURCES:
        if row_name(module_name(path)) != "cli":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path


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


@pytest.mark.parametrize("path", ALL_SOURCES, ids=relative)
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


def test_files_have_the_terms_of_the_field() -> None:
    assert not [relative(path) for path in ALL_SOURCES if path.stem.removeprefix("test_") in OLD_FILES]


@pytest.mark.parametrize("path", ALL_SOURCES, ids=relative)
def test_docstrings_begin_with_a_noun_or_a_verb(path: Path) -> None:
    for node, text in docstrings(parse(path)):
        name = getattr(node, "name", "the module")
        assert not re.match(OPENING, text, re.IGNORECASE), f"{name}: {text.splitlines()[0]}"
        assert not (match := DESCRIPTION.search(text)), f"{name}: {match[0].strip()}"


@pytest.mark.parametrize("path", [*ALL_SOURCES, *PAGES], ids=relative)
def test_prose_uses_plain_words(path: Path) -> None:
    if path == Path(__file__):
        return
    mistakes = [f"line {line}: {match[0]}" for line, text in prose(path) for match in OLD_WORDS.finditer(text)]
    assert not mistakes


@pytest.mark.parametrize("path", SOURCES, ids=relative)
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


TOLERANCES = {"atol", "rtol", "abs", "rel", "abs_tol", "rel_tol", "tolerance"}


def loose_tolerances(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the calls and comparisons of a test with a tolerance above 1e-5."""
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call):
            values = [keyword.value for keyword in node.keywords if keyword.arg in TOLERANCES]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt | ast.LtE):
            calls = [part for part in ast.walk(node.left) if isinstance(part, ast.Call)]
            if any((getattr(call.func, "id", "") or getattr(call.func, "attr", "")) == "abs" for call in calls):
                values = [node.comparators[0]]
        numbers = [part.value for value in values for part in ast.walk(value) if isinstance(part, ast.Constant)]
        if any(isinstance(number, float) and 1e-5 < number < 0.5 for number in numbers):
            yield node


@pytest.mark.parametrize("path", [path for path in ALL_SOURCES if "tests" in path.parts], ids=relative)
def test_a_tolerance_above_1e_5_has_its_reason(path: Path) -> None:
    """The reason is a comment on the line, or on the line before it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in loose_tolerances(parse(path)):
        first, last = node.lineno, node.end_lineno  # type: ignore[attr-defined]
        is_explained = lines[first - 2].lstrip().startswith("#") or any("#" in line for line in lines[first - 1 : last])
        assert is_explained, f"line {first}: {lines[first - 1].strip()}"
