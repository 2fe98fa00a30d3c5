"""Gated DeltaNet as a layer's memory: the published equations, and its place among other layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.memory.associative import AssociativeMemory
from memtx.memory.gated_delta_net import GatedDeltaNet
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.segment import Segment

EXACT = 1e-12  # float64, sums in another order


def published(memory: GatedDeltaNet, x: Tensor) -> Tensor:
    """Compute the layer for one document x, ``(length, dim)``, token by token and head by head, as the paper says."""
    key_dim, value_dim, size = memory.key_dim, memory.value_dim, memory.conv_size
    mixed = x @ memory.qkv.weight.T
    padded = torch.cat([torch.zeros(size - 1, mixed.shape[1], dtype=x.dtype), mixed])
    filters = memory.conv_weight[:, 0]
    mixed = F.silu(torch.stack([(padded[t : t + size] * filters.T).sum(0) for t in range(len(x))]))
    num_keys = memory.key_heads * key_dim
    outputs = []
    for head in range(memory.heads):
        key_head = head // (memory.heads // memory.key_heads)
        q = mixed[:, key_head * key_dim : (key_head + 1) * key_dim]
        k = mixed[:, num_keys + key_head * key_dim : num_keys + (key_head + 1) * key_dim]
        v = mixed[:, 2 * num_keys + head * value_dim : 2 * num_keys + (head + 1) * value_dim]
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        beta = torch.sigmoid(x @ memory.write_gate.weight[head]) * (2.0 if memory.negative_eigenvalues else 1.0)
        width = key_dim if memory.decay == "channel" else 1
        channels = slice(head * width, (head + 1) * width)
        steps = F.softplus(x @ memory.decay_gate.weight[channels].T + memory.decay_bias[channels])
        decay = torch.exp(-memory.log_decay_rate[head].exp() * steps)
        matrix, reads = torch.zeros(key_dim, value_dim, dtype=x.dtype), []
        for t in range(len(x)):
            matrix = decay[t][:, None] * matrix
            matrix = matrix + beta[t] * torch.outer(k[t], v[t] - matrix.T @ k[t])
            reads.append(matrix.T @ q[t] / key_dim**0.5)
        read = torch.stack(reads)
        read = read / (read.square().mean(-1, keepdim=True) + memory.norm.eps).sqrt() * memory.norm.weight
        gate = memory.output_gate.weight[head * value_dim : (head + 1) * value_dim]
        outputs.append(read * F.silu(x @ gate.T))
    return torch.cat(outputs, dim=-1) @ memory.out.weight.T


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_matches_the_published_equations_in_every_document(decay: str, negative_eigenvalues: bool) -> None:
    memory = GatedDeltaNet(
        12, heads=4, key_heads=2, key_dim=5, value_dim=3, conv_size=3, decay=decay,  # type: ignore[arg-type]
        negative_eigenvalues=negative_eigenvalues,
    ).double()  # fmt: skip
    torch.nn.init.normal_(memory.norm.weight)
    x = torch.randn(1, 23, 12, dtype=torch.float64)
    document_starts = torch.zeros(1, 23, dtype=torch.bool)
    document_starts[0, [9, 10, 12]] = True
    segment = Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), 23, document_starts)
    out, _ = memory.mix(memory.init_state(1, like=x), x, segment)
    expected = torch.cat([published(memory, x[0, start:end]) for start, end in ((0, 9), (9, 10), (10, 12), (12, 23))])
    assert (out[0] - expected).abs().max() < EXACT


def hybrid(**options: object) -> MemoryTransformer:
    delta = partial(GatedDeltaNet, heads=2, key_dim=4, value_dim=4)
    memories = [delta, delta, partial(RecurrentMemory, window=30)]
    return MemoryTransformer(20, 16, 3, 2, memories=memories, **options).double().eval()  # type: ignore[arg-type]


def test_added_memory_leaves_the_layers_without_attention_as_they_are() -> None:
    model = hybrid()
    tokens = torch.randint(20, (1, 50))
    adapted = model.with_memory([partial(AssociativeMemory, heads=2)], window=30, num_sinks=0)
    kinds = [[type(memory) for memory in block.attention.memories] for block in adapted.blocks]  # type: ignore[union-attr]
    assert kinds == [[GatedDeltaNet], [GatedDeltaNet], [RecurrentMemory, AssociativeMemory]]
    # Gates begin closed.
    assert (adapted(tokens).logits - model(tokens).logits).abs().max() < EXACT
    assert [type(memory) for memory in adapted.without_memory(8).blocks[0].attention.memories] == [GatedDeltaNet]  # type: ignore[union-attr]
    with pytest.raises(MemtxError, match="Layer 1 has GatedDeltaNet in place of attention"):
        model.with_memory([partial(AssociativeMemory, heads=2)], layers=[1])


def test_hybrid_is_saved_and_loaded_with_its_memories(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = hybrid(norm_placement=["pre", "post", "sandwich"], output_gate=True, embedding_scale=4.0, query_scale=0.5)
    tokens = torch.randint(20, (1, 50))
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(MemoryTransformer.from_pretrained(tmp_path / "model")(tokens).logits, model(tokens).logits)


def test_errors_say_what_does_not_fit() -> None:
    with pytest.raises(MemtxError, match="GatedDeltaNet replaces attention but has other memories beside it"):
        MemoryTransformer(20, 16, 1, 2, memories=[[GatedDeltaNet, AssociativeMemory]])
    with pytest.raises(MemtxError, match="There are 2 norm_placement for 3 layers"):
        hybrid(norm_placement=["pre", "post"])
    with pytest.raises(MemtxError, match=r"norm_placement is 'middle'.*pre, post, sandwich"):
        hybrid(norm_placement="middle")
    with pytest.raises(MemtxError, match=r"heads.*4.*key_heads.*3|key_heads.*3.*heads.*4"):
        GatedDeltaNet(12, heads=4, key_heads=3)
    with pytest.raises(MemtxError, match="decay is 'row'"):
        GatedDeltaNet(12, decay="row")  # type: ignore[arg-type]
