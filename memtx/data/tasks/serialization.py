"""Tasks as JSON text: what a checkpoint keeps of one, and the task made from it."""

from __future__ import annotations

import json

from memtx.data.tasks.base import Task
from memtx.data.tasks.classification import Classification, PairClassification
from memtx.data.tasks.question_answering import QuestionAnswering
from memtx.data.tasks.tagging import Tagging
from memtx.errors import DataError

FORMAT = "memtx.task"
FORMAT_VERSION = 2

_TASKS_BY_KIND: dict[str, type[Task]] = {
    kind.kind: kind for kind in (Classification, PairClassification, QuestionAnswering, Tagging)
}


def task_to_json(task: Task) -> str:
    """Return all there is to a task as JSON text."""
    return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **task.to_dict()}, ensure_ascii=False)


def task_from_json(text: str) -> Task:
    """Return the task that :func:`task_to_json` wrote down.

    Raises:
        DataError: the text is no such description, or of a version or kind that this release does not know.
    """
    try:
        value = json.loads(text)
        if value.pop("format") != FORMAT or value.pop("version") != FORMAT_VERSION:
            raise DataError("The task is of another release.", "Use the one that wrote it.")
        return _TASKS_BY_KIND[value.pop("kind")](**value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The text describes no task: {error}.", "Use one that memtx wrote.") from error
