"""What an evaluation of answers comes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationResult:
    """The share of right answers under one condition.

    Attributes:
        name: the condition, such as a task's or a depth's name.
        distance: tokens.
        accuracy: from 0 to 1; None where nothing could be asked.
        chance: that of guessing, or of always giving the most frequent answer where they are not equally frequent.
    """

    name: str
    distance: int
    accuracy: float | None
    chance: float


def average_by_distance(name: str, results: list[EvaluationResult]) -> list[EvaluationResult]:
    """Return the mean of the conditions that could be asked, a distance each, in the distances' order."""
    made = []
    for distance in dict.fromkeys(one.distance for one in results):
        same = [one for one in results if one.distance == distance]
        asked = [one for one in same if one.accuracy is not None] or same
        shares = [one.accuracy for one in asked if one.accuracy is not None]
        chance = sum(one.chance for one in asked) / len(asked)
        made.append(EvaluationResult(name, distance, sum(shares) / len(shares) if shares else None, chance))
    return made
