"""Predictor of published encoder-decoders: summaries and other texts made from a text, with the folder's options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from typing import Any, Self

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

DEFAULT_MAX_LENGTH = 256
"""Tokens of a target where the folder's files name no ``max_length``."""
TRAINED_NUM_BEAMS = 4
"""Hypotheses of models that were trained here."""


class TextToText(BasePredictor):
    """Makes a text from a text; the first token is global, and the model is put into eval mode.

    Args:
        model: Model.
        tokenizer: Its tokenizer.
        options: Options of the search.
        max_source_length: Maximum tokens of a text, with special tokens.
        sampling_params: Options of sampling, or of penalties alone if greedy. None searches without them.
        seed: Seed of the sampled targets, each of which depends on it and its text alone. None draws new ones.
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
        self.sampling_params, self.seed = sampling_params, seed
        self.model, self.tokenizer, self.options = model.eval(), tokenizer, options
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

    def change_generation(self, num_beams: int | None = None, seed: int | None = None, **sampling: float) -> None:
        """Change the folder's options of generation.

        Args:
            num_beams: Hypotheses of the beam search, which has no samples. Defaults to 1 if ``sampling`` has options.
            seed: Seed of the samples.
            **sampling: Options of :class:`SamplingParams`; ``repetition_penalty`` alone changes the greedy choice.

        Raises:
            MemtxError: A number is out of range, or several beams were to be sampled.
        """
        if sampling:
            is_greedy = set(sampling) == {"repetition_penalty"} and self.sampling_params is None
            params = self.sampling_params or SamplingParams(greedy=is_greedy)
            self.sampling_params = replace(params, **{"greedy": is_greedy, **sampling})  # type: ignore[arg-type]
        elif num_beams is not None:
            self.sampling_params = None
        if num_beams is None:
            num_beams = 1 if sampling else self.options.num_beams
        if num_beams > 1 and self.sampling_params is not None:
            raise MemtxError(f"num_beams is {num_beams}, but a single target is sampled.", "Give num_beams 1.")
        self.options, self.seed = replace(self.options, num_beams=num_beams), seed

    def to_example(self, raw_input: PredictInput) -> SummaryExample:
        """Convert a raw text, or ``{"text": ...}``, to an example."""
        return SummaryExample.parse({"text": raw_input} if isinstance(raw_input, str) else raw_input, False)

    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return the ``summary`` of each input, or the ``response`` to a dialogue.

        ``complete`` is False if it was cut at the maximum length. Of a dialogue that is too long only the end is read;
        ``truncated`` is then True.
        """
        sources = self._map_inputs(inputs, lambda raw_input: self._encode(self.to_example(raw_input)))
        with acquire_before(deadline, self._lock):
            return [self._predict(name, ids, deadline) | extra for name, ids, extra in sources]

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

    def _predict(self, name: str, ids: torch.Tensor, deadline: float | None) -> dict[str, Any]:
        self._check_active(deadline)
        tokens = ids[None].to(self.model.logits_bias.device)
        is_global = torch.zeros_like(tokens)
        is_global[:, 0] = 1
        eos_token_ids = self.tokenizer.eos_token_ids or {self.tokenizer.sep_token_id}
        (target,) = generate_targets(
            self.model, tokens, None, is_global, options=self.options, eos_token_ids=eos_token_ids,
            choose=None if (params := self.sampling_params) is None else make_sampler([params], seed=self.seed),
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
