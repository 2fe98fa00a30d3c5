"""Language models as models of transformers: round trips, generation and training give what memtx gives."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memtx
from memtx import (
    AssociativeMemory,
    CompressedMemory,
    CopyMemory,
    GatedDeltaNet,
    MemoryTransformer,
    RecurrentMemory,
    SinkMemory,
    SlotMemory,
    TransformerXL,
)
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import CheckpointError, MemtxError
from memtx.inference.decoder import Decoder
from memtx.inference.sampling import SamplingParams
from tests.hf import folders, plain

transformers = pytest.importorskip("transformers", reason="transformers is not installed (memtx[hf])")

SEGMENT_LENGTH = 24  # the inputs have several segments


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # The module files of the folders are copied there.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def small(memories: Any, **options: Any) -> MemoryTransformer:
    return MemoryTransformer(257, dim=16, depth=2, heads=2, memories=memories, **options)


WINDOW = partial(RecurrentMemory, window=16)
COMPRESSED = partial(CompressedMemory, window=16, compression_rate=4, num_entries=8)
MODELS: dict[str, Callable[[], MemoryTransformer]] = {
    "compressed": lambda: small([COMPRESSED]),
    "untied": lambda: small([COMPRESSED], tie_embeddings=False, embedding_scale=4.0),
    "many memories": lambda: small([[WINDOW, partial(AssociativeMemory, heads=2), SlotMemory, SinkMemory]]),
    "copy": lambda: small([COMPRESSED], output_memory=partial(CopyMemory, num_entries=64)),
    "hybrid": lambda: small([partial(GatedDeltaNet, heads=2), WINDOW]),
    "alibi": lambda: small([COMPRESSED], positions=memtx.Alibi),
    "transformer-xl": lambda: TransformerXL(257, 16, 2, 2, memory_length=16, same_length=True),
    "adaptive": lambda: TransformerXL(
        257, 16, 2, 2, memory_length=16, same_length=True, cutoffs=[20, 100], div_value=2, share_biases=True
    ),
}


def create(kind: str, seed: int = 0) -> MemoryTransformer:
    torch.manual_seed(seed)
    model = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # no symmetric output, as after training
    return model.double().eval()  # segments of other lengths round otherwise in float32


def ids(length: int = 60, batch_size: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(0, 250, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def opened(model: MemoryTransformer, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder, hf=True, segment_length=SEGMENT_LENGTH, **options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def greedy(model: MemoryTransformer, prompt: Tensor, count: int) -> Tensor:
    with torch.inference_mode():
        out = model(prompt)
        decoder = Decoder(model, out.state)
        tokens = [out.logits[:, -1].argmax(-1)]
        while len(tokens) < count:
            tokens.append(decoder.step(tokens[-1]).argmax(-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip_and_greedy_text(kind: str, tmp_path: Path) -> None:
    model = create(kind)
    wrapped = opened(model, tmp_path / "hf")
    with torch.no_grad():
        expected, actual = model(ids()), wrapped(ids())
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-6)
    assert torch.equal(wrapped.generate(ids(), max_new_tokens=20, do_sample=False)[:, 60:], greedy(model, ids(), 20))
    wrapped.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    for folder in ("hf", "again"):
        assert memtx.from_pretrained(tmp_path / folder).fingerprint == model.fingerprint
    # The class is known without the folder's code once memtx has been imported.
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="sdpa")
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, expected.logits, rtol=0, atol=1e-6)


def test_published_decoder_with_memory(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "llama", plain.LLAMA, plain.llama(plain.LLAMA))
    published = MemoryTransformer.from_pretrained(folder)
    model = published.with_memory([COMPRESSED], window=16, layers=[0]).double()
    wrapped = opened(model, tmp_path / "hf")
    prompt = ids() % published.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(wrapped(prompt).logits, model(prompt).logits, rtol=0, atol=1e-6)
    assert torch.equal(wrapped.generate(prompt, max_new_tokens=8, do_sample=False)[:, 60:], greedy(model, prompt, 8))


@pytest.fixture
def wrapped() -> Any:
    from memtx.hf.transformers_model import MemtxForCausalLM

    return MemtxForCausalLM.wrap(create("copy"), segment_length=SEGMENT_LENGTH)


def test_cache_is_the_state(wrapped: Any) -> None:
    with torch.no_grad():
        out = wrapped(ids())
        first = wrapped(ids()[:, :25])
        second = wrapped(ids()[:, 25:], past_key_values=first.past_key_values, output_hidden_states=True)
        assert wrapped(ids(), use_cache=False).cache is None
    torch.testing.assert_close(second.logits, out.logits[:, 25:], rtol=1e-5, atol=1e-5)
    assert second.cache is first.cache
    assert second.cache.state.equals(out.cache.state, atol=1e-5)
    assert (second.cache.get_seq_length(), second.cache.nbytes) == (60, wrapped.model.init_state(2).nbytes)
    assert [x.shape for x in second.hidden_states] == [(2, 35, 16)] * 3
    with torch.no_grad():
        embedded = wrapped.model.head(second.hidden_states[-1])
    assert embedded.shape == second.logits.shape
    assert isinstance(wrapped(ids(), return_dict=False), tuple)
    assert torch.equal(wrapped(ids(), logits_to_keep=30).logits, wrapped(ids()).logits[:, -30:])


def test_copies_of_a_cache_are_independent(wrapped: Any) -> None:
    with torch.no_grad():
        cache = wrapped(ids()).cache
        step = ids(1, seed=5)
        wrapped(step, cache=cache)  # a single token is decoded in place
        saved, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        logits = wrapped(step, cache=cache).logits
        assert "Decoder" not in repr(vars(saved)["_decoder"])
        for other in (saved, pickled):
            torch.testing.assert_close(wrapped(step, cache=other).logits, logits)
        expected = wrapped(torch.cat([ids(), step, step], dim=1))
        torch.testing.assert_close(logits, expected.logits[:, -1:])
        assert cache.state.equals(expected.cache.state, atol=1e-5)
        swapped = cache.state.select([1, 1])
        cache.reorder_cache(torch.tensor([1, 1]))
        assert cache.state.equals(swapped)
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
    # What was decoded takes part in training.
    wrapped(ids(2, 4), labels=ids(2, 4), cache=cache, use_cache=True).loss.backward()
    cache.detach()
    cache.reset()
    assert (cache.batch_size, cache.nbytes, cache.get_seq_length()) == (-1, 0, 0)


def test_vectors_in_place_of_ids() -> None:
    from memtx.hf.transformers_model import MemtxForCausalLM

    wrapped = MemtxForCausalLM.wrap(create("compressed"), segment_length=SEGMENT_LENGTH)
    vectors = wrapped.get_input_embeddings()(ids()).detach()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(inputs_embeds=vectors).logits, wrapped(ids()).logits)
    text = wrapped.generate(ids(), max_new_tokens=5, do_sample=False)
    assert torch.equal(wrapped.generate(inputs_embeds=vectors, max_new_tokens=5, do_sample=False), text[:, 60:])


def test_other_dtypes_are_loaded(tmp_path: Path) -> None:
    create("untied").save_pretrained(tmp_path, hf=True)
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, tmp_path, trust_remote_code=True)
    half = load(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert float(half.model.embedding_scale) == 4.0
    assert half.generate(ids(5), max_new_tokens=3).shape == (2, 8)
    fresh = transformers.AutoModelForCausalLM.from_config(half.config, trust_remote_code=True)
    assert fresh(ids(5)).logits.isfinite().all()


def test_generation_with_and_without_cache(wrapped: Any) -> None:
    for options in ({"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}):
        texts = [wrapped.generate(ids(30), max_new_tokens=6, use_cache=cached, **options) for cached in (True, False)]
        assert torch.equal(*texts)
    torch.manual_seed(0)
    sampled = wrapped.generate(ids(30), max_new_tokens=12, do_sample=True, top_k=20, num_return_sequences=3)
    assert sampled.shape == (6, 42)
    assert len({tuple(text.tolist()) for text in sampled[:3]}) == 3
    text = wrapped.generate(ids(30), max_new_tokens=12, do_sample=False)
    # All ids of the text with its cache, or only those that follow.
    for prompt, cache in ((text[:, :36], lambda cache: cache), (text[:, 30:36], lambda cache: cache.continued())):
        cache = cache(wrapped(text[:, :30]).cache)
        continued = wrapped.generate(prompt, cache=cache, max_new_tokens=6, do_sample=False)
        assert torch.equal(continued[:, -6:], text[:, -6:])
    chunked = wrapped.generate(ids(30), max_new_tokens=12, do_sample=False, prefill_chunk_size=7)
    assert torch.equal(chunked, text)


def test_padding_changes_nothing(wrapped: Any) -> None:
    texts = [ids(length, 1, seed=length) for length in (30, 21, 3)]
    alone = [wrapped.generate(text, max_new_tokens=8, do_sample=False)[0, -8:] for text in texts]
    left = torch.cat([torch.nn.functional.pad(text, (30 - text.shape[1], 0), value=999) for text in texts])
    mask = (left != 999).long()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    for more in ({}, {"prefill_chunk_size": 4}, {"use_cache": False}, {"num_beams": 1, "num_return_sequences": 1}):
        assert torch.equal(wrapped.generate(left, **options, **more)[:, -8:], torch.stack(alone)), more
    right = torch.cat([torch.nn.functional.pad(text, (0, 30 - text.shape[1]), value=999) for text in texts])
    with torch.no_grad():
        out = wrapped(right, attention_mask=(right != 999).long())
        for row, text in enumerate(texts):
            expected = wrapped(text)
            torch.testing.assert_close(out.logits[row, : text.shape[1]], expected.logits[0], rtol=1e-5, atol=1e-5)
            assert out.cache.state.select([row]).equals(expected.cache.state, atol=1e-5)
    packed = torch.cat(texts, dim=1)
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad():
        logits = wrapped(packed, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 51:], wrapped(texts[2]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["compressed", "untied", "copy", "transformer-xl", "adaptive"])
def test_the_vocabulary_is_resized(kind: str, tmp_path: Path) -> None:
    from memtx.hf.transformers_model import MemtxForCausalLM

    wrapped = MemtxForCausalLM.wrap(create(kind), segment_length=SEGMENT_LENGTH)
    with torch.no_grad():
        before = wrapped(ids()).logits
        table = wrapped.resize_token_embeddings(260, pad_to_multiple_of=8)
        after = wrapped(ids()).logits
    assert table is wrapped.get_input_embeddings()
    assert after.shape[-1] == wrapped.config.vocab_size == 264
    if kind in ("compressed", "untied"):  # the others return log-probabilities, which new tokens lower
        torch.testing.assert_close(after[..., :257], before)
        torch.testing.assert_close(after[..., 263], before.mean(-1))
    wrapped.save_pretrained(tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    prompt = torch.tensor([[263, 5, 262]])
    with torch.no_grad():
        torch.testing.assert_close(again(prompt).logits, wrapped(prompt).logits)
        wrapped.resize_token_embeddings(257)
        torch.testing.assert_close(wrapped(ids()).logits, before)


def test_unsupported_requests_are_refused_in_one_line(wrapped: Any, tmp_path: Path) -> None:
    mask = torch.ones(2, 60, dtype=torch.long)
    gap, right = mask.clone(), mask.clone()
    gap[0, 10], right[0, -5:] = 0, 0
    cache = wrapped(ids()).cache
    segmented = type(wrapped).wrap(small([memtx.NoMemory]))
    refusals: list[tuple[str, Callable[[], object]]] = [
        ("padding between the ids of text 0", lambda: wrapped(ids(), attention_mask=gap)),
        ("attention_mask is", lambda: wrapped(ids(), attention_mask=mask[:, 1:])),
        ("cannot be cropped", lambda: cache.crop(-1)),
        ("holds no keys", lambda: cache.update(torch.zeros(1), torch.zeros(1), 0)),
        ("output_attentions", lambda: wrapped(ids(), output_attentions=True)),
        ("mean_resizing is False", lambda: wrapped.resize_token_embeddings(300, mean_resizing=False)),
        ("new_num_tokens is 0", lambda: wrapped.resize_token_embeddings(0)),
        ("has 300, but the model has 257", lambda: wrapped(torch.full((1, 3), 300))),
        ("DynamicCache", lambda: wrapped(ids(), cache=transformers.DynamicCache())),
        ("Both cache", lambda: wrapped(ids(), cache=cache, past_key_values=wrapped(ids()).cache)),
        ("cache_implementation", lambda: wrapped.generate(ids(), cache_implementation="static")),
        ("the cache has read 60", lambda: wrapped.generate(ids(), cache=cache, max_new_tokens=1)),
        ("position_ids", lambda: wrapped(ids(), position_ids=torch.arange(5, 65)[None])),
        ("labels is", lambda: wrapped(ids(), labels=ids(59))),
        ("batch size", lambda: wrapped(ids()[:1], cache=cache)),
        ("in training", lambda: wrapped.train()(ids(), attention_mask=right, use_cache=True)),
        ("depend on its segments", lambda: segmented(ids(), attention_mask=right.flip(1))),
        ("predicts no next token", lambda: memtx.Encoder(20, 8, 1, 2).save_pretrained(tmp_path / "a", hf=True)),
        ("without hf=True", lambda: wrapped.model.save_pretrained(tmp_path / "a", tokenizer=ByteTokenizer())),
    ]
    for message, call in refusals:
        with pytest.raises(MemtxError, match=message) as refusal:
            call()
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "a").exists()


def test_folder_without_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    create("compressed").save_pretrained(tmp_path, hf=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.norm.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        memtx.from_pretrained(tmp_path)


def test_tokenizer_and_pipeline(tmp_path: Path) -> None:
    model = create("compressed")
    opened(model, tmp_path, tokenizer=ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert tokenizer("Aé ÿ")["input_ids"] == [256, *"Aé ÿ".encode()]
    assert tokenizer.decode([256, *"Aé ÿ".encode()], skip_special_tokens=True) == "Aé ÿ"
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), trust_remote_code=True)
    texts = pipe(["It was ", "A"], max_new_tokens=8, do_sample=False, batch_size=2, return_full_text=False)
    for prompt, result in zip(("It was ", "A"), texts, strict=True):
        params = SamplingParams(temperature=0.0)
        expected = "".join(memtx.generate(model, ByteTokenizer(), prompt, max_tokens=8, sampling_params=params))
        assert result[0]["generated_text"].rstrip("\ufffd") == expected.rstrip("\ufffd")


def test_losses_are_those_of_memtx(wrapped: Any) -> None:
    labels = ids().clone()
    labels[:, :7] = -100
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    out = wrapped(ids(), labels=labels)
    expected = wrapped.model(ids(), labels=shifted)
    torch.testing.assert_close(out.loss, expected.loss.float(), rtol=1e-5, atol=1e-5)
    split = wrapped(ids(), labels=labels, num_items_in_batch=torch.tensor(2 * int((shifted != -100).sum())))
    torch.testing.assert_close(2 * split.loss, out.loss)


def test_module_file_imports_memtx_alone(tmp_path: Path) -> None:
    create("compressed").save_pretrained(tmp_path, hf=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_memtx.MemtxForCausalLM"
    assert len((tmp_path / "modeling_memtx.py").read_text().splitlines()) < 20
    assert "AutoModelForCausalLM" in (tmp_path / "README.md").read_text()
