"""Files of a published tokenizer: ``tokenizer.json``, older vocabulary files, and what they say of its begin token."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memtx import files
from memtx.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "*.model"),
)
"""Files of a published folder's tokenizer."""
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


def read_backend(path: str | os.PathLike[str]) -> Any:
    """Return the library's tokenizer of a file or folder, which may have vocab.json and merges.txt, or vocab.txt.

    Raises DataError if the path holds no tokenizer that the library reads.
    """
    path = Path(path)
    if path.is_dir():
        if (path / TOKENIZER_FILE).is_file():
            return parse_backend(read_text(path / TOKENIZER_FILE), str(path / TOKENIZER_FILE))
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _byte_level_backend(path)
        if (path / "vocab.txt").is_file():
            return _word_piece_backend(path)
        models = sorted(path.glob("*.model"))
        if not models:
            message = f"'{path}' has no {TOKENIZER_FILE}."
            raise DataError(message, "Add it, or vocab.json with merges.txt, or vocab.txt.")
        path = models[0]
    if path.suffix == ".model":
        raise DataError(
            f"'{path}' is a SentencePiece model; only {TOKENIZER_FILE} is read.",
            f"Convert it: AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained(...) of transformers.",
        )
    return parse_backend(read_text(path), str(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a tokenizer's file; raises DataError if it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The tokenizer '{path}' cannot be read: {error}.", "Check the path.") from error


def parse_backend(text: str, name: str) -> Any:
    """Return the library's tokenizer from the text of a ``tokenizer.json``; raises DataError.

    Options that lose, add or randomize tokens are cleared: truncation, padding and dropout.
    """
    from tokenizers import Tokenizer as Backend

    try:
        description = json.loads(text)
        if isinstance(description, dict):
            if str(description.get("format")).startswith("memtx."):
                description = dict(description["model"])  # the library's part of a file of memtx
            description |= {"truncation": None, "padding": None}
            if isinstance(model := description.get("model"), dict) and model.get("dropout"):
                model["dropout"] = None
            text = json.dumps(description)
        return Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception
        message = f"'{name}' is not a tokenizer.json: {error}."
        raise DataError(message, "Give a file of the tokenizers library.") from error


def encoding_backend(text: str, *, parse_special: bool) -> Any:
    """Return the library's tokenizer for encoding texts: no template, special tokens plain unless ``parse_special``."""
    backend = parse_backend(text, "the tokenizer")
    # It would trim offsets.
    backend.post_processor = None
    backend.encode_special_tokens = not parse_special
    return backend


def read_bos_token_id(folder: Path, backend: Any) -> int | None:
    """Return the id with which a tokenizer begins a text, or None if it begins with the text itself.

    ``add_bos_token`` in tokenizer_config.json decides, else the post-processor of tokenizer.json. The token is the
    ``bos_token`` of tokenizer_config.json or special_tokens_map.json, else the ``bos_token_id`` of
    generation_config.json or config.json.
    """
    configs = [_read_config(folder / name) for name in CONFIG_FILES]
    adds_bos_token = configs[0].get("add_bos_token")
    if adds_bos_token is None:
        plain, framed = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
        num_before = next((index for index in range(len(framed)) if framed[index:][: len(plain)] == plain), 0)
        return int(framed[num_before - 1]) if num_before else None
    if not adds_bos_token:
        return None
    for config in configs[:2]:
        token = config.get("bos_token")
        spelling = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(spelling, str) and (token_id := backend.token_to_id(spelling)) is not None:
            return int(token_id)
    ids = [config.get("bos_token_id") for config in configs[2:]]
    return next((token_id for token_id in ids if isinstance(token_id, int) and token_id >= 0), None)


def _read_config(path: Path) -> Mapping[str, Any]:
    config = files.read_json(path) if path.is_file() else None
    return config if isinstance(config, Mapping) else {}


def _byte_level_backend(folder: Path) -> Any:
    """Return the tokenizer of GPT-2's files."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"'{folder}' has a damaged vocab.json or merges.txt: {error}.", "Restore them.") from error
    backend = Backend(model)
    adds_space = bool(_read_config(folder / CONFIG_FILES[0]).get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, folder)
    return backend


def _word_piece_backend(folder: Path) -> Any:
    """Return the tokenizer of BERT's vocab.txt."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    config = _read_config(folder / CONFIG_FILES[0])
    backend = Backend(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", True)),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    _add_tokens(backend, folder)
    return backend


def _add_tokens(backend: Any, folder: Path) -> None:
    """Add the tokens that older files name beside the vocabulary, in the order of their ids."""
    from tokenizers import AddedToken

    for token in sorted((added := _read_config(folder / "added_tokens.json")), key=lambda token: added[token]):
        backend.add_tokens([AddedToken(token, normalized=False)])
    special = ["<|endoftext|>", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"]
    for config in (_read_config(folder / name) for name in CONFIG_FILES[:2]):
        values = [value for key, value in config.items() if key.endswith("_token")]
        special += [value.get("content", "") if isinstance(value, Mapping) else str(value) for value in values]
    backend.add_special_tokens([token for token in dict.fromkeys(special) if backend.token_to_id(token) is not None])
