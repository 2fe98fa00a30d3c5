"""Folders that ``transformers`` opens: model, tokenizer, generation settings and model card."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from memtx import files, hf
from memtx.checkpoint import hub
from memtx.checkpoint.convert import ConversionResult, open_target
from memtx.checkpoint.load import load
from memtx.checkpoint.model_card import TrainingFacts, read_training_facts, write_card
from memtx.checkpoint.pretrained import PretrainedModel
from memtx.data.end_tokens import read_eos_token_ids
from memtx.data.tokenizer_export import ExportedTokenizer, export_tokenizer
from memtx.data.tokenizer_files import TOKENIZER_FILE, read_backend, read_bos_token_id
from memtx.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_json
from memtx.errors import CheckpointError, DataError
from memtx.hf import exported
from memtx.models.memory_transformer import MemoryTransformer

CARD_FILE = "README.md"
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
PUBLISHED_FILES = (
    *(TOKENIZER_FILE, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", GENERATION_FILE),
)
"""Files of a published folder, beside its model, that are copied as they are."""


def export(
    model: PretrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    segment_length: int = exported.SEGMENT_LENGTH,
    name: str | None = None,
    facts: TrainingFacts | None = None,
) -> list[str]:
    """Write a language model as a folder for ``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)``.

    Args:
        model: Language model; LoRA adapters are merged.
        path: Folder to write; files of other names in it stay.
        tokenizer: Tokenizer of the model, or the published folder whose files are copied. None writes none.
        segment_length: Tokens that the model reads at a time.
        name: Name in the examples of the model card. Defaults to the folder.
        facts: Facts of the training for the model card.

    Returns:
        Names of the files beside the model's own.

    Raises:
        CheckpointError: The tokenizer has more tokens than the model.
        MemtxError: The model predicts no next token, or the folder cannot be written.
    """
    language_model = exported.check_language_model(model)
    parts = ExportedTokenizer({}, {}, [])
    if isinstance(tokenizer, Tokenizer):
        _check_vocabulary(tokenizer, language_model)
        padding_side = "right" if exported.depends_on_segmentation(language_model) else "left"
        parts = export_tokenizer(tokenizer, padding_side=padding_side)
        excluded_ids = [*parts.excluded_ids, *range(tokenizer.vocab_size, language_model.vocab_size)]
        generation = {
            "use_cache": True,
            **parts.token_ids,
            **({"suppress_tokens": excluded_ids} if excluded_ids else {}),
        }
        parts.texts[GENERATION_FILE] = files.json_text(generation)
    elif tokenizer is not None:
        parts = _read_published(Path(tokenizer))
    parts.texts.setdefault(GENERATION_FILE, files.json_text({"use_cache": True}))
    config = exported.describe(language_model, segment_length=segment_length, **parts.token_ids)
    card = write_card(language_model, name or Path(path).name, facts or TrainingFacts())
    exported.write(language_model, path, config)
    texts = {**parts.texts, CARD_FILE: card}
    for file_name, text in texts.items():
        files.write_text(Path(path) / file_name, text)
    return sorted(texts)


def export_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    window: int | None = None,
    segment_length: int | None = None,
    overwrite: bool = False,
    name: str | None = None,
) -> ConversionResult:
    """Write a stored language model and its tokenizer as :func:`export` does, completely or not at all.

    Args:
        source: Anything that :func:`memtx.checkpoint.load.load` takes.
        target: Folder to write.
        window: Exact positions seen by a Hugging Face decoder. Defaults to its trained length.
        segment_length: Tokens that the model reads at a time. Defaults to 512, or to those of the training if results
            depend on it.
        overwrite: If True, replace an existing target.
        name: Name in the examples of the model card. Defaults to the target's.

    Raises:
        CheckpointError: The source cannot be loaded.
        MemtxError: The model predicts no next token, or the target exists or cannot be written.
    """
    with open_target(source, target, overwrite=overwrite) as (path, folder):
        checkpoint = load(path, window)
        facts = read_training_facts(path, checkpoint.metadata)
        tokenizer: Tokenizer | Path | None = None
        if path.is_dir() and hf.is_hf_folder(path):
            tokenizer = path
        elif (text := checkpoint.sidecars.get("tokenizer")) is not None:
            tokenizer = load_tokenizer(path) if (path / TOKENIZER_FILE).is_file() else tokenizer_from_json(text)
        trained_length = exported.depends_on_segmentation(checkpoint.model) and facts.segment_length
        length = segment_length or trained_length or exported.SEGMENT_LENGTH
        options: dict[str, Any] = {"tokenizer": tokenizer, "segment_length": length, "facts": facts}
        names = export(checkpoint.model, folder, name=name or Path(target).name, **options)
        num_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
        return ConversionResult(path, type(checkpoint.model).__name__, num_parameters, names, [])


def push(
    model: PretrainedModel,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model of memtx",
    **options: Any,
) -> str:
    """Write a model as :func:`export` does, with its ``options``, and upload it; returns the commit's URL.

    Other arguments and errors as in :func:`memtx.checkpoint.hub.upload`.
    """
    with tempfile.TemporaryDirectory() as folder:
        export(model, folder, name=repo_id, **options)
        upload: dict[str, Any] = {"private": private, "token": token, "commit_message": commit_message}
        return hub.upload(folder, repo_id, revision=revision, **upload)


def _check_vocabulary(tokenizer: Tokenizer, model: MemoryTransformer) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        message = f"The tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}."
        raise CheckpointError(message, "Use the tokenizer that the model was trained with.")


def _read_published(folder: Path) -> ExportedTokenizer:
    """Return the files of a published folder's tokenizer, and the ids that they name; none if it has no tokenizer."""
    paths = [folder / name for name in PUBLISHED_FILES if (folder / name).is_file()]
    texts = {path.name: path.read_bytes().decode("utf-8") for path in paths}
    try:
        backend = read_backend(folder)
    except DataError:
        return ExportedTokenizer({name: text for name, text in texts.items() if name == GENERATION_FILE}, {}, [])
    texts.setdefault(TOKENIZER_FILE, backend.to_str())
    config = files.read_json(folder / CONFIG_FILE) if CONFIG_FILE in texts else {}
    # A class by the model's type, or one whose code lies in the other folder, would not be found.
    if "tokenizer_class" not in config or "auto_map" in config:
        config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
        config.pop("auto_map", None)
        texts[CONFIG_FILE] = files.json_text(config)
    eos_ids = sorted(read_eos_token_ids(folder, backend.get_vocab(with_added_tokens=True)))
    ids = {
        "bos_token_id": read_bos_token_id(folder, backend),
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids,
    }
    token_ids = {name: value for name, value in ids.items() if value not in (None, [])}
    texts.setdefault(GENERATION_FILE, files.json_text(token_ids))
    return ExportedTokenizer(texts, token_ids, [])
