"""Books for training and evaluation: texts, tokenizer, token stores and streams behind Lightning's data hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from memtx.data.documents import Corpus, open_corpus
from memtx.data.fitting import fitted
from memtx.data.prepared import Prepared, is_prepared, made_of, open_store, prepare
from memtx.data.shards import TokenStore
from memtx.data.source import SPLITS, Source, Texts
from memtx.data.streams import DocumentStreams, EvaluationStreams
from memtx.data.tokenizers import ByteTokenizer, Tokenizer, tokenizer_from_json
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.files import default_cache

_STAGES: dict[str, tuple[str, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


class BookDataModule(LightningDataModule):
    """Long documents as endless rows, tokenised once; the position in them is in the checkpoint.

    Args:
        root: ``embedded`` (Python's help texts, no download), ``embedded+sources``, a folder that ``memtx prepare``
            made, a folder in the PG-19 layout (train/ validation/ test/ of <id>.txt), any other folder of text files,
            or one text file.
        tokenizer: a ByteTokenizer (the default), or for example ``BytePairTokenizer`` with ``vocab_size``, trained on
            the training split and kept in the cache. A prepared folder has its own.
        texts: where texts come from instead of ``root``, such as ``memtx.data.sources.hub.HubDataset``; all of them
            are encoded into the cache first.
        rows: streams read side by side on each device, at least 1.
        segment: tokens a row gives the model in one call, at least 1.
        horizon: segments of a batch, so of one truncated backward pass, at least 1.
        eval_rows: rows in evaluation; null for as many as in training. No effect on the figures.
        eval_tokens: validate on about this many tokens only, an equal share of every row; null for all. Tests always
            read all.
        seed: of the order of documents.
        cache: folder of token stores and trained tokenizers; null for ~/.cache/memtx.
        workers: processes that tokenise; null for one a core.

    Raises:
        DataError: a number is out of its range, or a prepared folder is damaged or has another tokenizer.
    """

    def __init__(
        self,
        root: str = "embedded",
        tokenizer: Tokenizer | None = None,
        texts: Texts | None = None,
        rows: int = 4,
        segment: int = 512,
        horizon: int = 1,
        eval_rows: int | None = None,
        eval_tokens: int | None = None,
        seed: int = 0,
        cache: str | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        numbers = {"rows": rows, "segment": segment, "horizon": horizon, "eval_rows": eval_rows}
        numbers |= {"eval_tokens": eval_tokens, "workers": workers}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}, expected at least 1.", f"Change --data.{name}.")
        if seed < 0:
            raise DataError(f"seed is {seed}, expected at least 0.", "Change --data.seed.")
        self.root, self.rows, self.segment, self.horizon = root, rows, segment, horizon
        self.eval_rows, self.eval_tokens = eval_rows or rows, eval_tokens
        self.seed, self.cache, self.workers = seed, cache, workers
        self.texts = texts
        self._corpus: Corpus | None = None
        self._prepared: Prepared | None = None
        if texts is None and is_prepared(root):
            self._prepared = Prepared(Path(root).expanduser())
            self.tokenizer: Tokenizer = self._prepared.agreed(tokenizer)
        else:
            self.tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self._stores: dict[str, TokenStore] = {}
        self._streams: DocumentStreams | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs; known before any text was read."""
        return self.tokenizer.vocab_size

    @property
    def length(self) -> int:
        """Tokens of a row in a batch: segment * horizon."""
        return self.segment * self.horizon

    @property
    def corpus(self) -> Corpus:
        """The documents of every split, listed when first asked for; of texts that are not prepared."""
        if self._corpus is None:
            self._corpus = open_corpus(self.root)
        return self._corpus

    def _whole(self) -> Prepared | None:
        """Return the folder that holds every split; None where each is encoded when it is needed."""
        if self._prepared is None and self.texts is not None:
            source = self.texts.source()
            self.tokenizer = fitted(self.tokenizer, source, self._cached)
            place = self._cached / f"texts-{made_of(source, self.tokenizer)[:16]}"
            self._prepared = prepare(place, source, self.tokenizer, workers=self.workers)
        return self._prepared

    @property
    def _cached(self) -> Path:
        return Path(self.cache).expanduser() if self.cache is not None else default_cache()

    def has(self, split: str) -> bool:
        """Return whether there are documents for a split."""
        whole = self._whole()
        return bool(self.corpus.splits.get(split)) if whole is None else split in whole.splits

    def store(self, split: str) -> TokenStore:
        """Return the tokens of a split, encoding it where that was not done yet.

        Raises:
            DataError: no such split, or a text that cannot be used.
        """
        if split not in self._stores and (whole := self._whole()) is not None:
            self._stores[split] = whole.store(split)
        elif split not in self._stores:
            documents = self.corpus.split(split)
            self._fit_tokenizer()
            self._stores[split] = open_store(
                documents, self.tokenizer, cache=self.cache, name=split, workers=self.workers
            )
        return self._stores[split]

    def prepare_data(self) -> None:
        """Train the tokenizer and encode the splits that the run needs (all, without a trainer), each once."""
        names = _STAGES.get(self._function or "", SPLITS)
        for name in names:
            if self.has(name):
                self.store(name)

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage needs; a fit begins at the start of the data unless a checkpoint says otherwise.

        Args:
            stage: fit, validate, test, predict; None for all.
        """
        # Opening is all that is left after prepare_data, which ran on one process only.
        self._fit_tokenizer()
        if stage in ("fit", None) and self._streams is not None:
            self._streams = None
            self._restored = None

    def train_dataloader(self) -> DocumentStreams:
        """Return this rank's streams: batches of (rows, segment * horizon), going on from the position.

        Raises:
            CheckpointError: the restored position is one in other data.
        """
        rank, world_size, steps = 0, 1, None
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            # Lightning's own limit would leave a short rest at the end of each pass, and a half accumulation with it.
            limit = getattr(self.trainer, "overfit_batches", 0) or self.trainer.limit_train_batches
            steps = limit if isinstance(limit, int) and limit > 0 else None
        store = self.store("train")
        if steps is not None:
            steps = min(steps, len(DocumentStreams(store, self.rows, self.length, self.seed, rank, world_size)))
        streams = DocumentStreams(store, self.rows, self.length, self.seed, rank, world_size, steps)
        if self._streams is not None:  # asked again within a run
            streams.load_state_dict(self._streams.state_dict())
        elif self._restored is not None:
            self._go_on(streams, self._restored)
        self._streams, self._restored = streams, None
        return streams

    def places(self) -> Tensor:
        """Return (rows, length) int64, which token of the training store each of the newest batch is."""
        assert self._streams is not None
        return self._streams.places(self._streams.position - 1)

    def val_dataloader(self) -> EvaluationStreams | list[Any]:
        """Return the validation split in rows; an empty list where training data has none."""
        if self._function == "fit" and not self.has("validation"):
            return []
        return self._evaluation("validation", self.eval_tokens)

    def test_dataloader(self) -> EvaluationStreams:
        """Return the whole test split in rows."""
        return self._evaluation("test", None)

    def predict_dataloader(self) -> EvaluationStreams:
        """Return the whole test split in rows."""
        return self._evaluation("test", None)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, what it is a position in, and the tokenizer as JSON text."""
        if self._streams is not None:
            position = self._streams.state_dict()
        else:
            position = self._restored or {"position": 0, "seed": self.seed}
        return {**position, "tokenizer": self.tokenizer.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position (checked when training data is opened) and its tokenizer.

        In evaluation the checkpoint's tokenizer is used whatever text is read: the model knows no other.

        Raises:
            CheckpointError: in training, the tokenizer is another one.
        """
        if not self.tokenizer.fitted:
            self._fit_tokenizer()
        text = state_dict.get("tokenizer")
        if text != self.tokenizer.to_json():
            self._take_tokenizer(text)
        self._restored = {key: value for key, value in state_dict.items() if key != "tokenizer"}
        if self._streams is not None:
            self._go_on(self._streams, self._restored)
            self._restored = None

    def _go_on(self, streams: DocumentStreams, position: dict[str, Any]) -> None:
        stride = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        streams.load_state_dict(position, stride)
        if streams.redealt:
            rank_zero_info(streams.redealt)

    def _take_tokenizer(self, text: Any) -> None:
        try:
            saved = tokenizer_from_json(text)
        except (TypeError, MemtxError) as error:
            raise CheckpointError(
                f"The checkpoint's data part has no whole tokenizer ({error}).", "Restore it from a copy."
            ) from error
        if self._function in ("fit", None):
            raise CheckpointError(
                f"The checkpoint was trained with another tokenizer ({saved.fingerprint[:12]} of "
                f"{saved.vocab_size} tokens, this run has {self.tokenizer.fingerprint[:12]} of "
                f"{self.tokenizer.vocab_size}).",
                "Give its tokenizer and its texts by --data.tokenizer and --data.root.",
            )
        self.tokenizer = saved if self.texts is not None or self._prepared is None else self._prepared.agreed(saved)
        self._stores.clear()
        if self.texts is not None:
            self._prepared = None

    @property
    def _function(self) -> str | None:
        """What the trainer was called for; None without one."""
        function = self.trainer.state.fn if self.trainer is not None else None
        return function.value if isinstance(function, TrainerFn) else None

    def _evaluation(self, split: str, limit: int | None) -> EvaluationStreams:
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return EvaluationStreams(self.store(split), self.eval_rows, self.length, rank, world_size, limit)

    def _fit_tokenizer(self) -> None:
        """Train the tokenizer on the training split, or read the one that an earlier run trained on it."""
        if not self.tokenizer.fitted and self._whole() is None:
            source = Source(self.root, {"train": self.corpus.split("train")})
            self.tokenizer = fitted(self.tokenizer, source, self._cached)
