"""Make the examples of the task configs that have no published folder of JSON lines.

    python scripts/make_tasks.py TASK FOLDER [--data FOLDER] [--seed 0]

Writes train.jsonl, validation.jsonl and test.jsonl for configs/TASK.yaml. `multiple-choice`, `dialogue` and
`dialogue-replies` are drawn at random, and a perfect model has a score of 1. `retrieval` and `multi-label` are made
from real texts: the answerable questions of DATA/squad2 with their paragraphs, and the sentences of DATA/conll2000 with
their chunk types.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarking import add_data_option

NUM_EXAMPLES = {"train": 2000, "validation": 200, "test": 500}
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jane".split()  # noqa: SIM905
ROOMS = "kitchen garden office hallway bathroom cellar attic stable".split()  # noqa: SIM905
CITIES = "Rome Paris Oslo Lima Cairo Tokyo Quito Delhi".split()  # noqa: SIM905
THINGS = "cat dog boat horse car parrot house pony".split()  # noqa: SIM905
TITLES = "Argo Bella Comet Daisy Echo Flint Ginger Hector Iris Juno Kiwi Luna Milo Nova Otto Pearl".split()  # noqa: SIM905
REMARKS = (
    "Let me think about it", "That sounds good", "It may rain tomorrow", "I am not in a hurry", "Thank you so far",
    "The weather is fine", "I have some time left", "My sister likes to travel", "It was a long week",
)  # fmt: skip


def make_choice(draw: random.Random) -> dict[str, Any]:
    """Return a story in which people move, a question on the last move of one, and three rooms that are not in it."""
    rooms = draw.sample(ROOMS, len(ROOMS))
    people = draw.sample(NAMES, 3)
    moves = [(draw.choice(people), draw.choice(rooms[3:])) for _ in range(draw.randint(2, 4))]
    name, _ = draw.choice(moves)
    answer = next(room for person, room in reversed(moves) if person == name)
    text = " ".join(f"{person} went to the {room}." for person, room in moves)
    return {
        "text": text,
        "question": f"Where is {name}?",
        "choices": draw.sample([answer, *rooms[:3]], 4),
        "label": answer,
    }


def make_dialogue(draw: random.Random) -> dict[str, Any]:
    """Return a dialogue in which a user names the city to label, and an agent other cities."""
    label, *others = draw.sample(CITIES, 4)
    turns = []
    num_turns = draw.randint(2, 7) * 2
    wish = draw.randrange(0, num_turns, 2)
    for index in range(num_turns):
        role = "agent" if index % 2 else "user"
        if index == wish:
            content = f"I want to go to {label}"
        elif role == "agent" and draw.random() < 0.5:
            content = f"Many people go to {draw.choice(others)}"
        else:
            content = draw.choice(REMARKS)
        turns.append({"role": role, "content": content})
    return {"turns": turns, "label": label}


def make_dialogue_reply(draw: random.Random) -> dict[str, Any]:
    """Return a dialogue in which a user names things, and asks for the name of one at the end."""
    things = draw.sample(THINGS, 3)
    names = dict(zip(things, draw.sample(TITLES, 3), strict=True))
    turns = []
    contents = [f"My {thing} is called {name}" for thing, name in names.items()]
    contents += draw.choices(REMARKS, k=draw.randint(1, 5))
    for content in draw.sample(contents, len(contents)):
        turns.append({"role": "user", "content": content})
        turns.append({"role": "assistant", "content": "I see"})
    thing = draw.choice(things)
    turns.append({"role": "user", "content": f"Tell me about my {thing}"})
    return {"turns": turns, "response": f"Your {thing} is called {names[thing]}"}


MAKERS = {"multiple-choice": make_choice, "dialogue": make_dialogue, "dialogue-replies": make_dialogue_reply}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def convert_squad2(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the answerable questions with their paragraphs."""
    for record in read_lines(path):
        if not record["is_impossible"]:
            yield {"query": record["question"], "positive": record["context"]}


def convert_conll2000(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the sentences with the types of their chunks."""
    for record in read_lines(path):
        labels = sorted({tag[2:] for tag in record["tags"] if tag != "O"})
        yield {"text": " ".join(record["tokens"]), "labels": labels}


CONVERTERS = {"retrieval": ("squad2", convert_squad2), "multi-label": ("conll2000", convert_conll2000)}


def make_examples(task: str, split: str, data: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the examples of a split."""
    if task in MAKERS:
        draw = random.Random(f"{seed} {split}")
        for _ in range(NUM_EXAMPLES[split]):
            yield MAKERS[task](draw)
    else:
        name, convert = CONVERTERS[task]
        yield from convert(data / name / f"{split}.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*MAKERS, *CONVERTERS])
    parser.add_argument("folder", type=Path, help="folder of the examples to write")
    add_data_option(parser, "--data", text="a folder with squad2 and conll2000")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for split in NUM_EXAMPLES:
        records = make_examples(arguments.task, split, arguments.data, arguments.seed)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (arguments.folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
