"""Stories of bAbI in book text as episodes for training, as in BABILong (Kuratov et al. 2024, section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from memtx.data.babi import FORMAT_HINT, Story, load_tasks
from memtx.data.batch import IGNORE_INDEX, Batch, check_options
from memtx.data.episodes import TEST, TRAINING, VALIDATION, EpisodeDataModule, NumSegments, make_generator
from memtx.data.haystack import Haystack, TokenIds, encode_ids
from memtx.data.sources.base import SPLITS
from memtx.data.sources.corpus import open_corpus
from memtx.data.tokenizers import ByteTokenizer, Tokenizer, tokenizer_from_json
from memtx.errors import CheckpointError, DataError

VALIDATION_INTERVAL = 10
"""One training story of this many is for validation."""

TOKENIZER_TEXTS = 64
"""Number of books that a tokenizer is trained on, beside the stories."""


class BabilongDataModule(EpisodeDataModule):
    """Stories hidden in book text, each with a question at the end, whose answer alone is learned.

    Training reads the training stories in training books; test reads the test stories in test books. An episode is
    a document that ends with the answer, so its length is the number of segments times their length exactly.
    ``memtx evaluate --task babilong`` measures the model at other lengths. Raises DataError if a number is out of
    range, files are missing, or no story fits into an episode.

    Args:
        babi_dir: Folder of the bAbI tasks, with files such as ``qa1_..._train.txt``.
        root: Texts to hide facts in: ``embedded``, or a folder as for ``BookDataModule``.
        tasks: Numbers of the tasks. Defaults to qa1.
        tokenizer: Tokenizer; without a vocabulary of its own it is trained on stories and books. Defaults to
            ByteTokenizer.
        segment_length: Tokens of a segment. At least 1.
        batch_size: Episodes of a batch on each device. At least 1.
        num_segments: Segments of an episode; or a curriculum, as for :class:`~memtx.data.episodes.EpisodeDataModule`.
        seed: Seed of the episodes.
        steps_per_epoch: Batches of an epoch; each epoch has new episodes.
        eval_batch_size: Episodes of a batch in evaluation. None uses ``batch_size``.
        eval_steps: Batches of validation and of test. At least 1.
        shorter_episodes: Fraction of batches with fewer segments than the curriculum's current number.
        max_trailing: Maximum tokens of book text after the answer, a random number in every episode. With 0 the answer
            ends the episode, so a memory that knows positions within a segment (RMT) reads its length off the
            question's place, and fails at other places.
    """

    def __init__(
        self,
        babi_dir: str | None = None,
        root: str = "embedded",
        tasks: tuple[int, ...] = (1,),
        tokenizer: Tokenizer | None = None,
        segment_length: int = 512,
        batch_size: int = 16,
        num_segments: NumSegments = 1,
        seed: int = 0,
        steps_per_epoch: int = 1000,
        eval_batch_size: int | None = None,
        eval_steps: int = 4,
        shorter_episodes: float = 0.0,
        max_trailing: int = 0,
    ) -> None:
        super().__init__(batch_size, num_segments, seed, steps_per_epoch, eval_batch_size, eval_steps, shorter_episodes)
        check_options(1, segment_length=segment_length, **{"number of tasks": len(tasks)})
        check_options(0, max_trailing=max_trailing)
        self.max_trailing = max_trailing
        self.babi_dir, self.root, self.tasks, self.segment_length = babi_dir, root, tuple(tasks), segment_length
        self.tokenizer: Tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self._haystacks: dict[int, Haystack] = {}
        self._encoded: dict[int, list[_EncodedStory]] = {}

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Vocabulary size; known before any text is read."""
        return self.tokenizer.vocab_size

    @cached_property
    def _stories(self) -> dict[int, list[Story]]:
        """Stories by purpose."""
        training = self._select_tasks("train")
        # Spread over the file, so that each task has its share.
        held_out = training[::VALIDATION_INTERVAL]
        del training[::VALIDATION_INTERVAL]
        return {TRAINING: training, VALIDATION: held_out, TEST: self._select_tasks("test")}

    def _select_tasks(self, split: str) -> list[Story]:
        if self.babi_dir is None:
            raise DataError("data.babi_dir is not set, expected the folder of the bAbI tasks.", FORMAT_HINT)
        tasks = load_tasks(self.babi_dir, split)
        if missing := [number for number in self.tasks if number not in tasks]:
            available = ", ".join(map(str, tasks))
            message = f"'{self.babi_dir}' has no {split} file of task {missing[0]}; it has {available}."
            raise DataError(message, "Change --data.tasks.")
        return [story for number in self.tasks for story in tasks[number]]

    def prepare_data(self) -> None:
        """Train the tokenizer, if it is not trained."""
        self._train_tokenizer()

    def setup(self, stage: str | None = None) -> None:
        """Open the texts; a fit begins at the start of the data unless a checkpoint is restored later."""
        super().setup(stage)
        self._train_tokenizer()

    def _train_tokenizer(self) -> None:
        if not self.tokenizer.is_trained:
            documents = open_corpus(self.root).get_split("train")
            self.tokenizer.train(self._iter_tokenizer_texts(islice(documents, TOKENIZER_TEXTS)))

    def _iter_tokenizer_texts(self, documents: Iterator[Any]) -> Iterator[str]:
        for story in self._select_tasks("train"):
            yield f" {' '.join(story.facts)} {story.question} {story.answer}."
        for document in documents:
            yield document.read()

    def _get_haystack(self, purpose: int) -> Haystack:
        """Return the texts of the split of a purpose, or of an earlier split if there are none."""
        if purpose not in self._haystacks:
            parts = open_corpus(self.root).split_parts
            split = next(split for split in (*SPLITS[purpose::-1], *SPLITS) if parts.get(split))
            self._haystacks[purpose] = Haystack(list(parts[split]), self.tokenizer)
        return self._haystacks[purpose]

    def _get_stories(self, purpose: int) -> list[_EncodedStory]:
        if purpose not in self._encoded:
            self._encoded[purpose] = [_EncodedStory(story, self.tokenizer) for story in self._stories[purpose]]
        return self._encoded[purpose]

    def sample_batch(self, batch_size: int, num_segments: int, seed: tuple[int, ...]) -> Batch:
        """Return whole episodes; a label is the next token of an answer. An episode counts as one word.

        Every episode has a story of its own, with its facts in order at random positions between sentences.
        """
        generator, purpose = make_generator(seed), seed[1]
        haystack, length = self._get_haystack(purpose), num_segments * self.segment_length
        num_reserved = len(self.tokenizer.bos_token_ids)
        stories = [story for story in self._get_stories(purpose) if story.num_tokens <= length - num_reserved]
        if not stories:
            shortest = min(story.num_tokens for story in self._get_stories(purpose)) + num_reserved
            message = f"No story fits into {num_segments} segments of {self.segment_length} tokens."
            raise DataError(message, f"An episode needs {shortest} tokens: raise --data.segment_length.")
        tokens = np.zeros((batch_size, length), dtype=np.int64)
        labels = np.full_like(tokens, IGNORE_INDEX)
        num_bytes = torch.zeros(batch_size, dtype=torch.int64)
        for row in range(batch_size):
            story = stories[int(torch.randint(len(stories), (), generator=generator))]
            trailing = 0
            if self.max_trailing:
                num_tokens = int(torch.randint(self.max_trailing + 1, (), generator=generator))
                trailing = min(num_tokens, length - num_reserved - story.num_tokens)
            context_length = length - trailing - num_reserved - len(story.question) - len(story.answer)
            context = haystack.hide_in_order(story.facts, context_length, generator)
            assert context is not None
            parts = [np.asarray(self.tokenizer.bos_token_ids, dtype=np.int64), context, story.question, story.answer]
            if trailing:
                parts += haystack.sample_filler(trailing, generator)
            tokens[row] = np.concatenate(parts)
            end = length - trailing - 1
            labels[row, end - len(story.answer) : end] = story.answer
            num_bytes[row] = story.num_answer_bytes
        document_starts = torch.zeros(batch_size, length, dtype=torch.bool)
        document_starts[:, 0] = True
        num_words = torch.ones(batch_size, dtype=torch.int64)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), document_starts, num_words, num_bytes)

    def _describe_episodes(self) -> dict[str, Any]:
        """Return the tasks, the segment length and the tokenizer, as JSON text."""
        tokenizer = self.tokenizer.to_json() if self.tokenizer.is_trained else None
        options = {"max_trailing": self.max_trailing} if self.max_trailing else {}
        return {"tasks": list(self.tasks), "segment_length": self.segment_length, "tokenizer": tokenizer, **options}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's position and, in evaluation, its tokenizer; raises CheckpointError."""
        self._train_tokenizer()
        text = state_dict.get("tokenizer")
        if text != self.tokenizer.to_json() and isinstance(text, str):
            saved = tokenizer_from_json(text)
            if self.trainer is not None and self.trainer.training:
                message = f"The checkpoint has another tokenizer, of {saved.vocab_size} tokens."
                raise CheckpointError(message, "Use the config saved beside the checkpoint.")
            self.tokenizer = saved
            self._haystacks.clear()
            self._encoded.clear()
        super().load_state_dict(state_dict)


class _EncodedStory:
    """The tokens of a story: facts, question and answer, each after a space, the answer with a full stop."""

    def __init__(self, story: Story, tokenizer: Tokenizer) -> None:
        self.facts: list[TokenIds] = [encode_ids(tokenizer, f" {fact}") for fact in story.facts]
        self.question = encode_ids(tokenizer, f" {story.question}")
        self.answer = encode_ids(tokenizer, f" {story.answer}.")
        self.num_answer_bytes = len(story.answer.encode()) + 2
        self.num_tokens = sum(map(len, self.facts)) + len(self.question) + len(self.answer)
