"""Long texts for training and evaluation: source, tokenizer, token stores and streams as a Lightning data module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from memtx.data.batch import check_options, limit_epochs, rank_and_world_size
from memtx.data.hf_tokenizers import HFTokenizer
from memtx.data.shards import TokenStore
from memtx.data.sources.base import SPLITS, Corpus, CorpusManifest, TextSource
from memtx.data.sources.corpus import open_corpus
from memtx.data.sources.files import FileSource, is_table
from memtx.data.sources.splits import SPLIT_HINT
from memtx.data.stream_module import StreamDataModule
from memtx.data.streams import DocumentStreams, EvaluationStreams
from memtx.data.tokenized_corpus import (
    TokenizedCorpus,
    compute_fingerprint,
    is_tokenized_corpus,
    open_store,
    tokenize_corpus,
    train_tokenizer,
)
from memtx.data.tokenizers import MASK_TOKENS, BackendTokenizer, ByteTokenizer, Tokenizer, tokenizer_from_json
from memtx.errors import CheckpointError, MemtxError
from memtx.files import default_cache_dir

M = TypeVar("M", bound=CorpusManifest)

SENTINEL_TOKENS = [f"<extra_id_{index}>" for index in range(1000)]
"""Spellings of the tokens that stand for removed spans (T5)."""

_SPLITS_BY_STAGE = {"fit": SPLITS[:2], "validate": SPLITS[1:2], "test": SPLITS[2:], "predict": SPLITS[2:]}


class BookDataModule(StreamDataModule[DocumentStreams]):
    """Long documents as endless streams, tokenized once; the checkpoint holds the position in them.

    Raises DataError if a number is out of range, or a prepared folder is damaged or has another tokenizer.

    Args:
        root: ``embedded`` (Python's help texts, no download), ``embedded+sources``, a folder that ``memtx prepare``
            wrote, a folder in the PG-19 layout (train/ validation/ test/ of <id>.txt), any other folder of text files
            in splits that names give (see ``memtx.data.sources.files.FileSource``), or one file of text or a table with
            a column "text".
        tokenizer: Tokenizer, such as ``BytePairTokenizer`` with ``vocab_size``, which is trained on the training split
            and kept in the cache. Defaults to ByteTokenizer, or to that of a prepared folder.
        source: Source of the texts instead of ``root``, such as ``memtx.data.sources.hub.HubDataset``; all splits are
            encoded into the cache first.
        batch_size: Streams per device. At least 1.
        segment_length: Tokens per stream in one call of the model. At least 1.
        bptt_segments: Segments per batch, so per truncated backward pass. At least 1.
        eval_batch_size: Streams per device in evaluation; no effect on the results. None uses ``batch_size``.
        eval_tokens: Number of tokens to validate on, about, in equal shares of every stream. None uses all. Tests
            always read all.
        seed: Seed of the order of documents.
        cache_dir: Folder of token stores and trained tokenizers. None uses ~/.cache/memtx.
        num_workers: Processes that tokenize. None uses one per core.
    """

    def __init__(
        self,
        root: str = "embedded",
        tokenizer: Tokenizer | None = None,
        source: TextSource | None = None,
        batch_size: int = 4,
        segment_length: int = 512,
        bptt_segments: int = 1,
        eval_batch_size: int | None = None,
        eval_tokens: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        check_options(1, batch_size=batch_size, segment_length=segment_length, bptt_segments=bptt_segments)
        check_options(1, eval_batch_size=eval_batch_size, eval_tokens=eval_tokens, num_workers=num_workers)
        check_options(0, seed=seed)
        if source is None and is_table(root) and not Path(root).expanduser().is_dir():
            source = FileSource([root])
        self.root, self.source, self.seed = root, source, seed
        self.batch_size, self.segment_length, self.bptt_segments = batch_size, segment_length, bptt_segments
        self.length = segment_length * bptt_segments  # tokens of a stream in a batch
        self.eval_batch_size, self.eval_tokens = eval_batch_size or batch_size, eval_tokens
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        self.num_workers = num_workers
        self._tokenized_corpus: TokenizedCorpus | None = None
        if source is None and is_tokenized_corpus(root):
            self._tokenized_corpus = TokenizedCorpus(Path(root).expanduser())
            self.tokenizer: Tokenizer = self._tokenized_corpus.resolve_tokenizer(tokenizer)
        else:
            self.tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self._token_stores: dict[str, TokenStore] = {}
        self._epoch_shape = batch_size, self.length  # whose batches an epoch has
        self._before_batch: Callable[[], None] | None = None

    def change_batches(self, batch_size: int, segment_length: int) -> None:
        """Change the next training batches to other numbers of streams and of tokens per segment.

        Documents go on where they are, as when a run resumes with other numbers; an epoch keeps its number of batches.
        """
        self.batch_size, self.segment_length = batch_size, segment_length
        self.length = segment_length * self.bptt_segments
        if self._streams is not None:
            self._streams.resize(batch_size, self.length)

    def on_next_batch(self, before_batch: Callable[[], None]) -> None:
        """Call a function before each training batch is read; it may call :meth:`change_batches`."""
        self._before_batch = before_batch

    @property
    def vocab_size(self) -> int:
        """Vocabulary size; known before any text is read, except that of a tokenizer that keeps all words."""
        if not self.tokenizer.knows_vocab_size:
            self._train_tokenizer()
        return self.tokenizer.vocab_size

    @property
    def mask_token_id(self) -> int | None:
        """Id of the mask token of a tokenizer that has one, such as BERT's or RoBERTa's; None for others."""
        return next(iter(self._find_tokens(MASK_TOKENS)), None)

    @property
    def sentinel_token_ids(self) -> list[int]:
        """Ids of the tokenizer's sentinels of spans in their order, T5's ``<extra_id_0>`` and so on; empty for none."""
        return self._find_tokens(SENTINEL_TOKENS)

    def _find_tokens(self, spellings: Sequence[str]) -> list[int]:
        if isinstance(self.tokenizer, HFTokenizer):
            self._train_tokenizer()
        tokenizer = self.tokenizer
        return (
            tokenizer.find_tokens(spellings) if isinstance(tokenizer, BackendTokenizer) and tokenizer.is_trained else []
        )

    @cached_property
    def corpus(self) -> Corpus:
        """Documents of every split of ``root``, listed on first use; says what is left out."""
        return self._with_notes(open_corpus(self.root))

    @staticmethod
    def _with_notes(manifest: M) -> M:
        for note in manifest.notes:
            rank_zero_info(note)
        return manifest

    def _open_tokenized_corpus(self) -> TokenizedCorpus | None:
        """Return the folder that holds every split, or None if each split is encoded when it is needed."""
        if self._tokenized_corpus is None and self.source is not None:
            manifest = self._with_notes(self.source.scan())
            self.tokenizer = train_tokenizer(self.tokenizer, manifest, self.cache_dir)
            folder = self.cache_dir / f"texts-{compute_fingerprint(manifest, self.tokenizer)[:16]}"
            self._tokenized_corpus = tokenize_corpus(folder, manifest, self.tokenizer, num_workers=self.num_workers)
        return self._tokenized_corpus

    def _train_tokenizer(self) -> None:
        """Train the tokenizer on the training split, or read the one that an earlier run trained on it."""
        if not self.tokenizer.is_trained and self._open_tokenized_corpus() is None:
            training_texts = Corpus(self.root, {"train": self.corpus.get_split("train")})
            self.tokenizer = train_tokenizer(self.tokenizer, training_texts, self.cache_dir)

    def has_split(self, split: str) -> bool:
        """Return whether there are documents in a split."""
        return split in (self._open_tokenized_corpus() or self.corpus).splits

    def token_store(self, split: str) -> TokenStore:
        """Return the tokens of a split, encoded if needed; raises DataError for no such split or an unusable text."""
        if split not in self._token_stores:
            if (tokenized := self._open_tokenized_corpus()) is not None:
                self._token_stores[split] = tokenized.open_split(split)
            else:
                documents = self.corpus.get_split(split)
                self._train_tokenizer()
                self._token_stores[split] = open_store(
                    documents, self.tokenizer, cache_dir=self.cache_dir, split=split, num_workers=self.num_workers
                )
        return self._token_stores[split]

    def prepare_data(self) -> None:
        """Train the tokenizer and encode the splits that the run needs (all, without a trainer), each once."""
        for split in _SPLITS_BY_STAGE.get(self._trainer_fn or "", SPLITS):
            if self.has_split(split):
                self.token_store(split)

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage needs (None: all); a fit begins at the start unless a checkpoint is restored."""
        # Opening is all that is left after prepare_data, which ran on one process only.
        self._train_tokenizer()
        super().setup(stage)

    def train_dataloader(self) -> DocumentStreams:
        """Return this rank's streams, batches of ``(batch, segment_length * bptt_segments)`` from the position on.

        Raises CheckpointError if a restored position is in other data.
        """
        store, ranks = self.token_store("train"), rank_and_world_size(self.trainer)
        streams = DocumentStreams(store, *self._epoch_shape, self.seed, *ranks)
        limit_epochs(streams, self.trainer)
        streams.resize(self.batch_size, self.length)
        streams.before_batch = self._before_batch
        return self._continue_with(streams)

    def token_indices(self) -> Tensor:
        """Return the index in the training store of each token of the newest batch, ``(batch, length)`` int64."""
        assert self._streams is not None
        return self._streams.token_indices(self._streams.step_at(self._streams.position - 1))

    def val_dataloader(self) -> EvaluationStreams | list[Any]:
        """Return the validation split in streams; an empty list for training data without one."""
        if self._trainer_fn == "fit" and not self.has_split("validation"):
            rank_zero_info(f"'{self.root}' has no validation split, so there is no validation. {SPLIT_HINT}")
            return []
        return self._evaluation_streams("validation", self.eval_tokens)

    def test_dataloader(self) -> EvaluationStreams:
        """Return the whole test split in streams; also for prediction."""
        return self._evaluation_streams("test", None)

    predict_dataloader = test_dataloader

    def _evaluation_streams(self, split: str, limit_tokens: int | None) -> EvaluationStreams:
        store, ranks = self.token_store(split), rank_and_world_size(self.trainer)
        return EvaluationStreams(store, self.eval_batch_size, self.length, *ranks, limit_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, what identifies its data, and the tokenizer as JSON text."""
        return {**self._position_state(), "tokenizer": self.tokenizer.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's position, which is checked when the training data is opened, and its tokenizer.

        In evaluation the checkpoint's tokenizer encodes the texts: the model knows no other. In training, another
        tokenizer raises CheckpointError.
        """
        self._train_tokenizer()
        text = state_dict.get("tokenizer")
        if text != self.tokenizer.to_json():
            self._restore_tokenizer(text)
        self._restore_position({key: value for key, value in state_dict.items() if key != "tokenizer"})

    def _restore_tokenizer(self, text: Any) -> None:
        try:
            saved = tokenizer_from_json(text)
        except (TypeError, MemtxError) as error:
            message = f"The checkpoint's data part has no whole tokenizer ({error})."
            raise CheckpointError(message, "Restore it from a copy.") from error
        if self._trainer_fn in ("fit", None):
            raise CheckpointError(
                f"The checkpoint was trained with another tokenizer ({saved.fingerprint[:12]} of "
                f"{saved.vocab_size} tokens, this run has {self.tokenizer.fingerprint[:12]} of "
                f"{self.tokenizer.vocab_size}).",
                "Give its tokenizer and its texts by --data.tokenizer and --data.root.",
            )
        self._token_stores.clear()
        if self.source is not None:
            self._tokenized_corpus = None
        self.tokenizer = saved if self._tokenized_corpus is None else self._tokenized_corpus.resolve_tokenizer(saved)

    @property
    def _trainer_fn(self) -> str | None:
        """Function that the trainer runs (fit, test, ...); None without a trainer."""
        function = self.trainer.state.fn if self.trainer is not None else None
        return function.value if isinstance(function, TrainerFn) else None
