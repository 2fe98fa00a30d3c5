"""Tokenizers of every kind that people publish, trained on a small text."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
PARAGRAPHS = [
    "It was the best of times, it was the worst of times: the year 1775 had 365 days, hadn't it?",
    "Call me Ishmael. Some years ago - never mind how long precisely - I'd little or no money in my purse.",
    "def read(path):\n    with open(path) as file:\n\t\treturn file.read()  # UTF-8\r\n",
    "\u6211\u4eec\u5728\u8bfb\u4e66\uff0c\u4ed6\u4eec\u5728\u5199\u5b57\u3002\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff01",
    "L'été dernier, à Zürich, naïve façade; Ελλάδα, Москва, עברית, \U0001f642 caf\u00e9 e\u0301te \ufb01ne \u00bd.",
]
CORPUS = "\n\n".join(" ".join(PARAGRAPHS[(index + step) % 5] for step in range(3)) for index in range(60))


def _byte_level(use_regex: bool = True, add_prefix_space: bool = False, regex: str | None = None) -> Backend:
    backend = Backend(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex and regex is None)
    backend.pre_tokenizer = byte_level
    if regex:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    texts = CORPUS.split("\n\n") if use_regex else CORPUS.split(" ")
    backend.train_from_iterator(texts, trainer)
    return backend


def _qwen() -> Backend:
    backend = _byte_level(regex=QWEN)
    backend.normalizer = normalizers.NFC()
    return backend


def _byte_fallback(legacy: bool, split_spaces: bool = False, metaspace: Any = None) -> Backend:
    """Return Llama 2's kind: bytes for unknown characters, words not split (or by Metaspace)."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    # Words by Metaspace for the training, so that tokens do not span spaces, as SentencePiece's do not.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special_tokens = [*SPECIAL, *byte_tokens]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special_tokens, limit_alphabet=60, show_progress=False)
    backend.train_from_iterator(CORPUS.replace("\n", " ").split("\n"), trainer)
    # The bytes are tokens of the vocabulary, not special ones.
    description = json.loads(backend.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in SPECIAL]
    backend = Backend.from_str(json.dumps(description))
    backend.pre_tokenizer, steps = metaspace, [decoders.ByteFallback(), decoders.Fuse()]
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        steps.append(decoders.Strip(" ", 1, 0))
    if split_spaces:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if metaspace:
        backend.normalizer = None
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), *steps])
    return backend


def _metaspace(scheme: str, split: bool) -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    texts = CORPUS.split("\n") if split else CORPUS.replace("\n", " ").split(" ")
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False))
    return backend


def _word_piece(lowercase: bool) -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special_tokens, show_progress=False)
    backend.train_from_iterator(CORPUS.split("\n"), trainer)
    return backend


def _unigram(kind: str) -> Backend:
    backend = Backend(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="never" if kind == "never" else "always")
    steps = {
        "t5": [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")],
        "xlnet": [
            normalizers.Replace("``", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "\u2581"),
        ],
        "never": [normalizers.Nmt(), normalizers.NFKC()],
    }
    backend.normalizer = normalizers.Sequence(steps[kind])
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace]) if kind == "xlnet" else metaspace
    )
    backend.decoder = decoders.Metaspace(prepend_scheme=metaspace.prepend_scheme)
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS.split("\n"), trainer)
    return backend


BUILDERS = {
    "gpt2": _byte_level,
    "gpt2-prefix-space": functools.partial(_byte_level, add_prefix_space=True),
    "byte-level-no-regex": functools.partial(_byte_level, use_regex=False),
    "llama3": functools.partial(_byte_level, regex=LLAMA3),
    "o200k": functools.partial(_byte_level, regex=O200K),
    "qwen": _qwen,
    "llama2": functools.partial(_byte_fallback, legacy=True),
    "gemma": functools.partial(_byte_fallback, legacy=False, split_spaces=True),
    "llama2-metaspace": functools.partial(
        _byte_fallback, legacy=False, metaspace=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    **{
        f"metaspace-{scheme}{'' if split else '-unsplit'}": functools.partial(_metaspace, scheme, split)
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
    "bert": functools.partial(_word_piece, True),
    "bert-cased": functools.partial(_word_piece, False),
    "t5": functools.partial(_unigram, "t5"),
    "xlnet": functools.partial(_unigram, "xlnet"),
    "unigram-never": functools.partial(_unigram, "never"),
}
ADDED_TOKENS = [
    AddedToken("<tool>", normalized=False),
    AddedToken("<left>", lstrip=True, normalized=False),
    AddedToken("<right>", rstrip=True, normalized=False),
    AddedToken("<word>", single_word=True, normalized=False),
    AddedToken("two words", normalized=True),
    AddedToken("<|im_end|>", special=True, normalized=False),
]
ADDED_SPELLINGS = [token.content for token in ADDED_TOKENS]
# Their text is not the text that was encoded: case, accents, line ends or unknown letters are lost.
LOSSY = {"llama2-metaspace", "bert", "bert-cased", "t5", "xlnet", "unigram-never", "qwen", "gpt2-prefix-space"} | {
    name for name in BUILDERS if name.startswith("metaspace")
}


@functools.cache
def backend_json(name: str) -> str:
    """Return the ``tokenizer.json`` of a kind; those with ``+added`` have added tokens."""
    if name.endswith("+added"):
        backend = Backend.from_str(backend_json(name.removesuffix("+added")))
        backend.add_tokens(ADDED_TOKENS)
        return str(backend.to_str())
    return str(BUILDERS[name]().to_str())


NAMES = [f"{name}{suffix}" for name in BUILDERS for suffix in ("", "+added")]
