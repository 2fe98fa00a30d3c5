"""Tokenizers as files that ``AutoTokenizer`` of ``transformers`` opens, with the same ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memtx.data.token_decoder import byte_alphabet
from memtx.data.tokenizer_files import TOKENIZER_FILE
from memtx.data.tokenizers import BOS_TOKEN, BackendTokenizer, ByteTokenizer, Tokenizer
from memtx.errors import DataError

PAD_TOKEN = "<|pad|>"
PAD_SPELLINGS = ("[PAD]", "<pad>", PAD_TOKEN, "<|finetune_right_pad_id|>")
UNUSED_BYTE = "\u00ff"
"""Spelling, in a byte-level vocabulary, of the byte 255, which no UTF-8 text has: its id is free for padding."""


@dataclass(frozen=True)
class ExportedTokenizer:
    """Files of a tokenizer and the ids that generation needs.

    Attributes:
        texts: Content of each file by name.
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, where there is one.
        excluded_ids: Ids that memtx never generates: the begin token of a model that was not trained to end a text.
    """

    texts: dict[str, str]
    token_ids: dict[str, Any]
    excluded_ids: list[int]


def export_tokenizer(tokenizer: Tokenizer, *, padding_side: str = "left") -> ExportedTokenizer:
    """Return a tokenizer's files; raises DataError if it is neither trained here nor from the ``tokenizers`` library.

    A text begins with the begin token, if there is one, as everywhere in memtx. Texts of a batch are padded on
    ``padding_side``.
    """
    description = describe_tokenizer(tokenizer)
    pad_token = _add_pad_token(description)
    spellings = _spellings(description)
    bos, eos_ids = tokenizer.bos_token_id, sorted(tokenizer.eos_token_ids)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": padding_side,
        "clean_up_tokenization_spaces": False,
    }
    token_ids: dict[str, Any] = {}
    if bos is not None:
        config["bos_token"], token_ids["bos_token_id"] = spellings[bos], bos
        _mark_special(description, bos, spellings[bos])
        if description.get("post_processor") is None or _adds_nothing(description["post_processor"]):
            description["post_processor"] = _begin_template(spellings[bos], bos)
    if eos_ids:
        config["eos_token"] = spellings[eos_ids[0]]
        token_ids["eos_token_id"] = eos_ids[0] if len(eos_ids) == 1 else eos_ids
    if pad_token is None:
        # As other libraries do without a token of its own: the attention mask tells padding apart.
        pad_token = config.get("eos_token", config.get("bos_token"))
    if pad_token is not None:
        config["pad_token"] = pad_token
        if pad_token != config.get("bos_token"):
            token_ids["pad_token_id"] = next(token_id for token_id, text in spellings.items() if text == pad_token)
    excluded = [] if eos_ids else [*tokenizer.bos_token_ids]
    texts = {TOKENIZER_FILE: _to_text(description), "tokenizer_config.json": _to_text(config)}
    return ExportedTokenizer(texts, token_ids, excluded)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the object in a ``tokenizer.json`` of the ``tokenizers`` library; raises DataError for other kinds."""
    if isinstance(tokenizer, ByteTokenizer):
        return _describe_bytes()
    if isinstance(tokenizer, BackendTokenizer):
        description: dict[str, Any] = json.loads(tokenizer.to_json())["model"]
        return description
    message = f"{type(tokenizer).__name__} cannot be written as a tokenizer.json."
    raise DataError(message, "Use ByteTokenizer, BytePairTokenizer or a tokenizer.json.")


def _describe_bytes() -> dict[str, Any]:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    # The library's model needs merges, of which none is made.
    backend = Backend(models.BPE(byte_alphabet(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(BOS_TOKEN, normalized=False)])
    description: dict[str, Any] = json.loads(backend.to_str())
    return description


def _spellings(description: Mapping[str, Any]) -> dict[int, str]:
    """Return the spelling of every id."""
    vocabulary = description["model"]["vocab"]
    # Unigram has a list of pieces and scores.
    pairs: Iterable[tuple[int, str]] = (
        ((token_id, text) for text, token_id in vocabulary.items())
        if isinstance(vocabulary, Mapping)
        else ((token_id, entry[0]) for token_id, entry in enumerate(vocabulary))
    )
    return dict(pairs) | {token["id"]: token["content"] for token in description.get("added_tokens", [])}


def _add_pad_token(description: dict[str, Any]) -> str | None:
    """Return the spelling of the pad token, after giving it the free id of a byte-level vocabulary; None without."""
    spellings = set(_spellings(description).values())
    if known := next((text for text in PAD_SPELLINGS if text in spellings), None):
        return known
    model = description["model"]
    vocabulary = model["vocab"]
    is_byte_level = "ByteLevel" in json.dumps(description.get("pre_tokenizer"))
    if not is_byte_level or not isinstance(vocabulary, dict) or UNUSED_BYTE not in vocabulary:
        return None
    if any(UNUSED_BYTE in part for merge in model.get("merges", []) for part in merge):
        return None
    vocabulary[PAD_TOKEN] = vocabulary.pop(UNUSED_BYTE)
    _mark_special(description, vocabulary[PAD_TOKEN], PAD_TOKEN)
    return PAD_TOKEN


def _mark_special(description: dict[str, Any], token_id: int, text: str) -> None:
    """List a token among the special ones, which a decoded text can leave out."""
    tokens = [token for token in description.get("added_tokens", []) if token["id"] != token_id]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens.append({"id": token_id, "content": text, **flags, "special": True})
    description["added_tokens"] = sorted(tokens, key=lambda token: int(token["id"]))


def _adds_nothing(post_processor: Mapping[str, Any]) -> bool:
    return post_processor.get("type") == "ByteLevel"


def _begin_template(text: str, token_id: int) -> dict[str, Any]:
    """Return a post-processor that begins every text with a token."""
    begin: dict[str, Any] = {"SpecialToken": {"id": text, "type_id": 0}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, begin, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }


def _to_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
