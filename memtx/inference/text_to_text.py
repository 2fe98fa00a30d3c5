"""Predictor of published encoder-decoders: summaries and other texts made from a text, with the folder's options."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Self

import torch

from memtx import files
from memtx.checkpoint.load import load
from memtx.data.hf_tokenizers import HFTokenizer, hf_tokenizer_from_json
from memtx.data.tasks.base import build_inputs, keep_newest
from memtx.data.tasks.examples import SummaryExample
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.inference.deadline import acquire_before
from memtx.inference.predictor import BasePredictor, PredictInput
from memtx.inference.sampling import SamplingParams, SamplingRow, TokenCounts, sample_batch
from memtx.models.beam_search import BeamSearchOptions, ChooseTokens, generate_targets
from memtx.models.encoder_decoder import EncoderDecoder

logger = logging.getLogger("memtx.inference")

DEFAULT_MAX_LENGTH = 256
"""Tokens of a target where the folder's files name no ``max_length``."""
TRAINED_NUM_BEAMS = 4
"""Hypotheses of models that were trained here."""


SEARCH_OPTIONS = ("num_beams", "max_length", "min_length", "length_penalty", "no_repeat_ngram_size", "early_stopping")
"""Options of the search that a request may change, by their names in :class:`BeamSearchOptions`."""


class Generation(NamedTuple):
    """Options of the search, those of sampling (None searches), and the seed of samples."""

    search: BeamSearchOptions
    sampling_params: SamplingParams | None = None
    seed: int | None = None

    def changed(self, seed: int | None = None, **changes: Any) -> Generation:
        """Return other options.

        Args:
            seed: Seed of the samples.
            **changes: Options in ``SEARCH_OPTIONS`` and of :class:`SamplingParams`; ``repetition_penalty`` alone
                changes the greedy choice. ``num_beams`` defaults to 1 if there are options of sampling, and other
                numbers of beams have no samples.

        Raises:
            MemtxError: A number is out of range, or several beams were to be sampled.
        """
        search = {name: changes.pop(name) for name in SEARCH_OPTIONS if name in changes}
        params = self.sampling_params
        if not math.isfinite(penalty := search.get("length_penalty", 0.0)):
            raise MemtxError(f"length_penalty is {penalty}.", "Give a finite number.")
        if changes:
            is_greedy = changes.keys() == {"repetition_penalty"} and params is None
            params = replace(params or SamplingParams(), **{"greedy": is_greedy, **changes})
            search = {"num_beams": 1, **search}
        elif "num_beams" in search:
            params = None
        options = replace(self.search, **search)
        if options.num_beams > 1 and changes:
            names = ", ".join(changes)
            message = f"num_beams is {options.num_beams}, but a single target is sampled ({names})."
            raise MemtxError(message, f"Give num_beams 1, or remove {names}.")
        return Generation(options, params, seed)


class TextToText(BasePredictor):
    """Makes a text from a text; the first token is global, and the model is put into eval mode.

    Args:
        model: Model.
        tokenizer: Its tokenizer.
        options: Options of the search.
        max_source_length: Maximum tokens of a text, with special tokens.
        sampling_params: Options of sampling, or of penalties alone if greedy. None searches without them.
        seed: Seed of the sampled targets, each of which depends on it and its text alone. None draws new ones.

    Attributes:
        generation: Options of generation, which :meth:`predict` may be given others of.
    """

    task_name = "summary"
    model: EncoderDecoder

    def __init__(
        self,
        model: EncoderDecoder,
        tokenizer: HFTokenizer,
        options: BeamSearchOptions,
        max_source_length: int,
        sampling_params: SamplingParams | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.generation = Generation(options, sampling_params, seed)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_source_length = max_source_length

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load a checkpoint or run folder; raises CheckpointError if it is damaged or was not trained so."""
        checkpoint = load(path)
        try:
            limits = json.loads(checkpoint.sidecars["text_to_text"])
            tokenizer = hf_tokenizer_from_json(checkpoint.sidecars["tokenizer"])
            options = BeamSearchOptions(TRAINED_NUM_BEAMS, int(limits["max_target_length"]) + 1)
            max_source_length = int(limits["max_length"])
        except (KeyError, ValueError, TypeError) as error:
            message = f"'{checkpoint.path}' was not trained to make texts from texts."
            raise CheckpointError(message, "Give a run that was.") from error
        return cls(checkpoint.model_as(EncoderDecoder), tokenizer, options, max_source_length)

    def to_example(self, raw_input: PredictInput) -> SummaryExample:
        """Convert a raw text, or ``{"text": ...}``, to an example."""
        return SummaryExample.parse({"text": raw_input} if isinstance(raw_input, str) else raw_input, False)

    def predict(
        self, inputs: Sequence[PredictInput], *, deadline: float | None = None, generation: Generation | None = None
    ) -> list[dict[str, Any]]:
        """Return the ``summary`` of each input, or the ``response`` to a dialogue.

        ``generation`` defaults to the predictor's. ``complete`` is False if the text was cut at the maximum length. Of
        a dialogue that is too long only the end is read; ``truncated`` is then True.
        """
        sources = self._map_inputs(inputs, lambda raw_input: self._encode(self.to_example(raw_input)))
        with acquire_before(deadline, self._lock):
            options = generation or self.generation
            return [self._predict(name, ids, options, deadline) | extra for name, ids, extra in sources]

    def _encode(self, example: SummaryExample) -> tuple[str, torch.Tensor, dict[str, bool]]:
        (encoding,) = self.tokenizer.encode_with_offsets([example.text])
        ids, *_ = build_inputs(self.tokenizer, encoding.ids)
        extra: dict[str, bool] = {}
        if len(ids) > self.max_source_length:
            if not example.is_dialogue:
                message = f"The text has {len(ids)} tokens, the model reads {self.max_source_length} at once."
                raise DataError(message, "Send less text.")
            ids, extra = keep_newest(ids, self.max_source_length), {"truncated": True}
        return example.output_name, torch.from_numpy(ids), extra

    def _predict(self, name: str, ids: torch.Tensor, generation: Generation, deadline: float | None) -> dict[str, Any]:
        self._check_active(deadline)
        tokens = ids[None].to(self.model.logits_bias.device)
        is_global = torch.zeros_like(tokens)
        is_global[:, 0] = 1
        eos_token_ids = self.tokenizer.eos_token_ids or {self.tokenizer.sep_token_id}
        (target,) = generate_targets(
            self.model, tokens, None, is_global, options=generation.search, eos_token_ids=eos_token_ids,
            choose=None if (params := generation.sampling_params) is None else make_sampler([params], generation.seed),
            before_step=lambda: self._check_active(deadline),
        )  # fmt: skip
        self.num_tokens_read += len(ids)
        is_complete = len(target) > 1 and target[-1] in eos_token_ids
        text = self.tokenizer.decode(target[1 : -1 if is_complete else None])
        return {name: text.strip(), "complete": is_complete}


def make_sampler(params: Sequence[SamplingParams], seed: int | None = None) -> ChooseTokens:
    """Return the function that samples the next token of each text by its options."""
    batch: list[SamplingRow] = []

    def choose(logits: torch.Tensor, prefixes: Sequence[list[int]]) -> list[int]:
        if not batch:
            batch.extend(
                SamplingRow(row_params, Random(seed), TokenCounts(prefix))
                for row_params, prefix in zip(params, prefixes, strict=True)
            )
        tokens = []
        for row, sampled in zip(batch, sample_batch(logits, batch, logits.shape[1]), strict=True):
            if isinstance(sampled, MemtxError):
                raise sampled
            row.counts.add(sampled.token)
            tokens.append(sampled.token)
        return tokens

    return choose


def read_sampling_params(values: Mapping[str, Any], num_beams: int) -> SamplingParams | None:
    """Return the options of sampling in generation_config.json, with the library's defaults; None if it searches.

    Beam search has no samples.
    """
    names = {field.name for field in fields(SamplingParams)} - {"greedy", "logit_bias"}
    params = {name: value for name, value in values.items() if name in names and value is not None}
    if num_beams > 1:
        if values.get("do_sample"):
            logger.warning("do_sample is not used: the %d beams are searched, not sampled.", num_beams)
        return None
    if values.get("do_sample"):
        return SamplingParams(**{"top_k": 50, **params})
    penalty = params.get("repetition_penalty", 1.0)
    return SamplingParams(greedy=True, repetition_penalty=penalty) if penalty != 1.0 else None


def load_text_to_text(model: EncoderDecoder, tokenizer: HFTokenizer, folder: Path) -> TextToText:
    """Return the predictor of a published folder; raises CheckpointError if an option of its files is invalid.

    The options of the search are those of generation_config.json, or of config.json, with the library's defaults; the
    maximum length is at most the decoder's, and 256 if none is given.
    """
    names = {field.name for field in fields(BeamSearchOptions)}
    values: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (path := folder / name).is_file() and isinstance(content := files.read_json(path), dict):
            values |= {key: value for key, value in content.items() if value is not None}
    options = {key: value for key, value in values.items() if key in names}
    limit = model.position_embeddings.num_embeddings
    options["max_length"] = min(options.get("max_length", DEFAULT_MAX_LENGTH), limit)
    try:
        search = BeamSearchOptions(**options)
        sampling_params = read_sampling_params(values, search.num_beams)
    except (MemtxError, TypeError) as error:
        raise CheckpointError(f"'{folder}' has options that cannot be used: {error}", "Restore its files.") from error
    source_positions = model.encoder.embedding.position_embeddings.num_embeddings
    return TextToText(model, tokenizer, search, source_positions, sampling_params)
