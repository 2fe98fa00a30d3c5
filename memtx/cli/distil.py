"""``memtx distil``: compare students with their teacher, or augment examples; to distil is to train (``memtx fit``)."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from memtx.cli import options
from memtx.data.sources.base import SPLITS
from memtx.errors import MemtxError

if TYPE_CHECKING:
    from memtx.evaluation.compare import ModelComparison
    from memtx.inference.predictor import Predictor


def _get_display_names(paths: list[str]) -> list[str]:
    """Return the last part of each path, or the full paths if two last parts are equal."""
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else paths


def _load_predictor(path: str) -> Predictor:
    from memtx.inference.predictor import Predictor
    from memtx.inference.published_tasks import get_published_task, load_published_predictor

    predictor = load_published_predictor(path) if get_published_task(path) else Predictor.load(path)
    if not isinstance(predictor, Predictor):
        raise MemtxError(f"'{path}' predicts no labels.", "Give models fine-tuned on the same examples.")
    return predictor


def _compare_task_models(arguments: argparse.Namespace, paths: list[str]) -> list[ModelComparison]:
    from memtx.data.tasks.examples import read_examples, split_path
    from memtx.evaluation.compare import REPEATS, ParsedRecord, compare_task_models

    predictors = [(name, _load_predictor(path)) for name, path in zip(_get_display_names(paths), paths, strict=True)]
    task, teacher_task = predictors[-1][1].task, predictors[0][1].task
    for name, predictor in predictors[1:]:
        # A published classifier reads single texts and pairs.
        kinds = {predictor.task.kind} if teacher_task.kind == "text_classification" else {teacher_task.kind}
        if predictor.task.kind not in kinds or set(predictor.task.labels) != set(teacher_task.labels):
            raise MemtxError(f"'{name}' and its teacher differ in task or labels.", "Give runs on the same examples.")
    path = split_path(arguments.data, arguments.split)
    records = read_examples(path, lambda record, labelled: ParsedRecord(dict(record), task.parse(record, labelled)))
    examples = [example for _, example in records[: arguments.limit]]
    placement = options.get_placement(arguments)
    for _, predictor in predictors:
        predictor.model.to(**placement)
    total = len(predictors) * (len(examples) + REPEATS * min(arguments.num_timed, len(examples)))
    with options.progress_bar("measuring", total) as advance:
        return compare_task_models(predictors, examples, num_timed=arguments.num_timed, on_progress=partial(advance, 1))


def _compare_language_models(arguments: argparse.Namespace, paths: list[str]) -> list[ModelComparison]:
    from memtx.checkpoint.load import load_model_and_tokenizer
    from memtx.evaluation.compare import REPEATS, TextBatch, compare_language_models

    names, loaded = _get_display_names(paths), [load_model_and_tokenizer(path) for path in paths]
    teacher_tokenizer = loaded[0][1]
    for name, (_, tokenizer) in zip(names, loaded, strict=True):
        if tokenizer.to_json() != teacher_tokenizer.to_json():
            message = f"'{name}' and its teacher have different tokenizers."
            raise MemtxError(message, "Give runs on the same texts and tokenizer.")
    documents = options.open_corpus(arguments.data).get_split(arguments.split)[: arguments.limit]
    texts = TextBatch.from_documents(documents, teacher_tokenizer, arguments.max_length)
    placement = options.get_placement(arguments)
    models = [(name, model.to(**placement)) for name, (model, _) in zip(names, loaded, strict=True)]
    total = len(models) * (-(-texts.tokens.shape[1] // arguments.segment_length) + REPEATS * arguments.num_timed)
    settings = {name: getattr(arguments, name) for name in ("segment_length", "min_position", "num_timed")}
    with options.progress_bar("measuring", total) as advance:
        return compare_language_models(models, texts, on_progress=partial(advance, 1), **settings)


def _compute_ratios(student: ModelComparison, teacher: ModelComparison) -> dict[str, float]:
    return {name: getattr(student, name)(teacher) for name in ("size_reduction", "speed_gain", "score_retention")}


def _print_comparisons(comparisons: list[ModelComparison], metric: str) -> None:
    teacher, cells = comparisons[0], []
    for model in comparisons:
        ratios = _compute_ratios(model, teacher).values()
        smaller, faster, retained = ("" if model is teacher else f"{ratio:.1%}" for ratio in ratios)
        size, latency = f"{model.num_parameters:,}", f"{model.latency_ms:.2f}"
        cells.append([model.name, size, smaller, latency, faster, f"{model.score:.4f}", retained])
    options.print_table(["", "parameters", "smaller", "ms per call", "faster", metric, "retained"], cells)


def _report(arguments: argparse.Namespace) -> None:
    if arguments.min_position >= arguments.max_length:
        message = f"--min-position ({arguments.min_position}) must be below --max-length ({arguments.max_length})."
        raise MemtxError(message, "Lower --min-position or raise --max-length.")
    with options.user_modules(arguments.modules):
        from memtx.inference.predictor import is_task_model
        from memtx.inference.published_tasks import get_published_task

        paths = [arguments.teacher, *arguments.student]
        are_task_models = {get_published_task(path) is not None or is_task_model(path) for path in paths}
        if len(are_task_models) > 1:
            raise MemtxError("Task models cannot be compared with language models.", "Compare models of the same kind.")
        compare = _compare_task_models if True in are_task_models else _compare_language_models
        comparisons = compare(arguments, paths)
    metric, teacher = comparisons[0].metric.replace("_", " "), comparisons[0]
    if arguments.json != "-":
        _print_comparisons(comparisons, metric)
    if arguments.plot:
        from memtx.plots import plot_model_comparison

        panels = {"parameters": [float(model.num_parameters) for model in comparisons]}
        panels["ms per call"] = [model.latency_ms for model in comparisons]
        panels[metric] = [model.score for model in comparisons]
        plot_model_comparison(arguments.plot, panels, [model.name for model in comparisons])
    students = [{**vars(student), **_compute_ratios(student, teacher)} for student in comparisons[1:]]
    options.write_json_output(arguments.json, {"teacher": vars(teacher), "students": students})
    words = ("serve", "--checkpoint", arguments.student[0])
    options.print_next_command("Serve the student with", *words, is_data=arguments.json == "-")


def main(argv: list[str]) -> int:
    """Run ``memtx distil``."""
    if argv[:1] == ["augment"]:
        from memtx.cli import augment

        return augment.main(argv[1:])
    parser = options.Parser(
        "memtx distil",
        "Compare students with their teacher: parameters, milliseconds per call, and the task's score or the texts' "
        "bits per byte. To distil, train with a teacher: memtx fit --config configs/distilbert.yaml, "
        "tinybert-general, tinybert-task or long-to-memory. `memtx distil augment --help` explains how examples are "
        "multiplied for tinybert-task.",
    )
    add = parser.add_argument
    add("action", choices=("report",), help="print the comparison")  # augment has its own
    add("--teacher", required=True, metavar="RUN", help="a run folder, a checkpoint or a model folder")
    add("--student", required=True, action="append", metavar="RUN", help="same as --teacher; repeatable")
    add("--data", required=True, metavar="FOLDER", help="folder of the task's examples, or of texts")
    add("--split", default="test", choices=SPLITS, help="split to read")
    add("--limit", type=options.positive_int, default=1000, help="maximum number of examples or texts")
    add("--max-length", type=options.number_range(int, 2), default=16384, help="maximum tokens per text")
    parser.add_model_options(checkpoint=False, segment_length=256)
    add("--min-position", type=options.non_negative_int, default=0, help="first scored position of a text")
    add("--num-timed", type=options.positive_int, default=20, help="number of inputs to time each model on")
    parser.add_output_options("the comparison")
    return parser.run(argv, _report)
