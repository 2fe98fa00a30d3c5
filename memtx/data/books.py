"""Books for training and evaluation: texts, tokenizer, token stores and streams behind Lightning's data hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from memtx.data.shards import TokenStore
from memtx.data.sources.corpus import Corpus, open_corpus
from memtx.data.sources.manifest import SPLITS, CorpusManifest, TextSource
from memtx.data.streams import DocumentStreams, EvaluationStreams
from memtx.data.tokenized_corpus import (
    TokenizedCorpus,
    compute_fingerprint,
    is_tokenized_corpus,
    open_store,
    tokenize_corpus,
)
from memtx.data.tokenizer_training import train_tokenizer
from memtx.data.tokenizers import ByteTokenizer, Tokenizer, tokenizer_from_json
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.files import default_cache_dir

_SPLITS_BY_STAGE: dict[str, tuple[str, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


class BookDataModule(LightningDataModule):
    """Long documents as endless streams, tokenised once; the position in them is in the checkpoint.

    Args:
        root: ``embedded`` (Python's help texts, no download), ``embedded+sources``, a folder that ``memtx prepare``
            made, a folder in the PG-19 layout (train/ validation/ test/ of <id>.txt), any other folder of text files,
            or one text file.
        tokenizer: a ByteTokenizer (the default), or for example ``BytePairTokenizer`` with ``vocab_size``, trained on
            the training split and kept in the cache. A prepared folder has its own.
        source: where texts come from instead of ``root``, such as ``memtx.data.sources.hub.HubDataset``; all of them
            are encoded into the cache first.
        batch_size: streams read side by side on each device, at least 1.
        segment_length: tokens a stream gives the model in one call, at least 1.
        bptt_segments: segments of a batch, so of one truncated backward pass, at least 1.
        eval_batch_size: streams in evaluation; null for as many as in training. No effect on the figures.
        eval_tokens: validate on about this many tokens only, an equal share of every stream; null for all. Tests always
            read all.
        seed: of the order of documents.
        cache_dir: folder of token stores and trained tokenizers; null for ~/.cache/memtx.
        num_workers: processes that tokenise; null for one a core.

    Raises:
        DataError: a number is out of its range, or a prepared folder is damaged or has another tokenizer.
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
        numbers = {
            "batch_size": batch_size,
            "segment_length": segment_length,
            "bptt_segments": bptt_segments,
            "eval_batch_size": eval_batch_size,
        }
        numbers |= {"eval_tokens": eval_tokens, "num_workers": num_workers}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}, expected at least 1.", f"Change --data.{name}.")
        if seed < 0:
            raise DataError(f"seed is {seed}, expected at least 0.", "Change --data.seed.")
        self.root, self.batch_size, self.segment_length, self.bptt_segments = (
            root,
            batch_size,
            segment_length,
            bptt_segments,
        )
        self.eval_batch_size, self.eval_tokens = eval_batch_size or batch_size, eval_tokens
        self.seed, self.cache_dir, self.num_workers = seed, cache_dir, num_workers
        self.source = source
        self._corpus: Corpus | None = None
        self._tokenized_corpus: TokenizedCorpus | None = None
        if source is None and is_tokenized_corpus(root):
            self._tokenized_corpus = TokenizedCorpus(Path(root).expanduser())
            self.tokenizer: Tokenizer = self._tokenized_corpus.resolve_tokenizer(tokenizer)
        else:
            self.tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self._token_stores: dict[str, TokenStore] = {}
        self._streams: DocumentStreams | None = None
        self._restored_position: dict[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs; known before any text was read."""
        return self.tokenizer.vocab_size

    @property
    def length(self) -> int:
        """Tokens of a stream in a batch: segment_length * bptt_segments."""
        return self.segment_length * self.bptt_segments

    @property
    def corpus(self) -> Corpus:
        """The documents of every split, listed when first asked for; of texts that are not prepared."""
        if self._corpus is None:
            self._corpus = open_corpus(self.root)
        return self._corpus

    def _open_tokenized_corpus(self) -> TokenizedCorpus | None:
        """Return the folder that holds every split; None where each is encoded when it is needed."""
        if self._tokenized_corpus is None and self.source is not None:
            source = self.source.scan()
            self.tokenizer = train_tokenizer(self.tokenizer, source, self._cache_path)
            place = self._cache_path / f"texts-{compute_fingerprint(source, self.tokenizer)[:16]}"
            self._tokenized_corpus = tokenize_corpus(place, source, self.tokenizer, num_workers=self.num_workers)
        return self._tokenized_corpus

    @property
    def _cache_path(self) -> Path:
        return Path(self.cache_dir).expanduser() if self.cache_dir is not None else default_cache_dir()

    def has_split(self, split: str) -> bool:
        """Return whether there are documents for a split."""
        whole = self._open_tokenized_corpus()
        return bool(self.corpus.splits.get(split)) if whole is None else split in whole.splits

    def token_store(self, split: str) -> TokenStore:
        """Return the tokens of a split, encoding it where that was not done yet.

        Raises:
            DataError: no such split, or a text that cannot be used.
        """
        if split not in self._token_stores and (whole := self._open_tokenized_corpus()) is not None:
            self._token_stores[split] = whole.open_split(split)
        elif split not in self._token_stores:
            documents = self.corpus.get_split(split)
            self._train_tokenizer()
            self._token_stores[split] = open_store(
                documents, self.tokenizer, cache_dir=self.cache_dir, split=split, num_workers=self.num_workers
            )
        return self._token_stores[split]

    def prepare_data(self) -> None:
        """Train the tokenizer and encode the splits that the run needs (all, without a trainer), each once."""
        names = _SPLITS_BY_STAGE.get(self._trainer_fn or "", SPLITS)
        for name in names:
            if self.has_split(name):
                self.token_store(name)

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage needs; a fit begins at the start of the data unless a checkpoint says otherwise.

        Args:
            stage: fit, validate, test, predict; None for all.
        """
        # Opening is all that is left after prepare_data, which ran on one process only.
        self._train_tokenizer()
        if stage in ("fit", None) and self._streams is not None:
            self._streams = None
            self._restored_position = None

    def train_dataloader(self) -> DocumentStreams:
        """Return this rank's streams: batches of (batch, segment_length * bptt_segments), going on from the position.

        Raises:
            CheckpointError: the restored position is one in other data.
        """
        rank, world_size, steps = 0, 1, None
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            # Lightning's own limit would leave a short rest at the end of each pass, and a half accumulation with it.
            limit = getattr(self.trainer, "overfit_batches", 0) or self.trainer.limit_train_batches
            steps = limit if isinstance(limit, int) and limit > 0 else None
        store = self.token_store("train")
        if steps is not None:
            steps = min(steps, len(DocumentStreams(store, self.batch_size, self.length, self.seed, rank, world_size)))
        streams = DocumentStreams(store, self.batch_size, self.length, self.seed, rank, world_size, steps)
        if self._streams is not None:  # asked again within a run
            streams.load_state_dict(self._streams.state_dict())
        elif self._restored_position is not None:
            self._resume(streams, self._restored_position)
        self._streams, self._restored_position = streams, None
        return streams

    def token_indices(self) -> Tensor:
        """Return (batch, length) int64, which token of the training store each of the newest batch is."""
        assert self._streams is not None
        return self._streams.token_indices(self._streams.position - 1)

    def val_dataloader(self) -> EvaluationStreams | list[Any]:
        """Return the validation split in streams; an empty list where training data has none."""
        if self._trainer_fn == "fit" and not self.has_split("validation"):
            return []
        return self._evaluation_streams("validation", self.eval_tokens)

    def test_dataloader(self) -> EvaluationStreams:
        """Return the whole test split in streams."""
        return self._evaluation_streams("test", None)

    def predict_dataloader(self) -> EvaluationStreams:
        """Return the whole test split in streams."""
        return self._evaluation_streams("test", None)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, what it is a position in, and the tokenizer as JSON text."""
        if self._streams is not None:
            position = self._streams.state_dict()
        else:
            position = self._restored_position or {"position": 0, "seed": self.seed}
        return {**position, "tokenizer": self.tokenizer.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position (checked when training data is opened) and its tokenizer.

        In evaluation the checkpoint's tokenizer is used whatever text is read: the model knows no other.

        Raises:
            CheckpointError: in training, the tokenizer is another one.
        """
        if not self.tokenizer.is_trained:
            self._train_tokenizer()
        text = state_dict.get("tokenizer")
        if text != self.tokenizer.to_json():
            self._restore_tokenizer(text)
        self._restored_position = {key: value for key, value in state_dict.items() if key != "tokenizer"}
        if self._streams is not None:
            self._resume(self._streams, self._restored_position)
            self._restored_position = None

    def _resume(self, streams: DocumentStreams, position: dict[str, Any]) -> None:
        stride = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        streams.load_state_dict(position, stride)
        if streams.resume_message:
            rank_zero_info(streams.resume_message)

    def _restore_tokenizer(self, text: Any) -> None:
        try:
            saved = tokenizer_from_json(text)
        except (TypeError, MemtxError) as error:
            raise CheckpointError(
                f"The checkpoint's data part has no whole tokenizer ({error}).", "Restore it from a copy."
            ) from error
        if self._trainer_fn in ("fit", None):
            raise CheckpointError(
                f"The checkpoint was trained with another tokenizer ({saved.fingerprint[:12]} of "
                f"{saved.vocab_size} tokens, this run has {self.tokenizer.fingerprint[:12]} of "
                f"{self.tokenizer.vocab_size}).",
                "Give its tokenizer and its texts by --data.tokenizer and --data.root.",
            )
        self.tokenizer = (
            saved
            if self.source is not None or self._tokenized_corpus is None
            else self._tokenized_corpus.resolve_tokenizer(saved)
        )
        self._token_stores.clear()
        if self.source is not None:
            self._tokenized_corpus = None

    @property
    def _trainer_fn(self) -> str | None:
        """What the trainer was called for; None without one."""
        function = self.trainer.state.fn if self.trainer is not None else None
        return function.value if isinstance(function, TrainerFn) else None

    def _evaluation_streams(self, split: str, limit_tokens: int | None) -> EvaluationStreams:
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return EvaluationStreams(
            self.token_store(split), self.eval_batch_size, self.length, rank, world_size, limit_tokens
        )

    def _train_tokenizer(self) -> None:
        """Train the tokenizer on the training split, or read the one that an earlier run trained on it."""
        if not self.tokenizer.is_trained and self._open_tokenized_corpus() is None:
            source = CorpusManifest(self.root, {"train": self.corpus.get_split("train")})
            self.tokenizer = train_tokenizer(self.tokenizer, source, self._cache_path)
