"""Gradients of two processes with DDP or FSDP2 equal those of one, for every memory, in float64."""

from __future__ import annotations

import copy
import json
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.longformer import LongformerAttention
from memtx.layers.reformer import LocalAttention
from memtx.models.encoder import Encoder
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.reformer import Reformer
from memtx.models.transformer_xl import TransformerXL
from memtx.training.fsdp import shard_model
from memtx.training.tbptt import unroll
from tests.memory_zoo import KINDS

VOCAB, SEGMENT, BPTT_SEGMENTS = 20, 6, 3
Loss = Callable[[nn.Module, Tensor], Tensor]


def through_time(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Two batches, so that there is a state when the second begins."""
    state = model.init_state(tokens.shape[0], dtype=torch.float64)
    document_starts = torch.zeros_like(tokens, dtype=torch.bool)
    document_starts[:, 0] = True
    document_starts[:, SEGMENT + 2] = True
    total: Any = 0.0
    for start in (0, SEGMENT * BPTT_SEGMENTS):
        part = slice(start, start + SEGMENT * BPTT_SEGMENTS)
        inputs = tokens[:, part], tokens[:, part].roll(-1, 1), document_starts[:, part] & (start == 0), state
        out = unroll(model, *inputs, segment_length=SEGMENT, **options)
        total, state = total + out.loss, out.state
    return total


def squares(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(tokens[:, :16]).logits.square().mean()
    return loss


def transformer(stack: Any, recompute: bool = False, **options: Any) -> nn.Module:
    model = MemoryTransformer(VOCAB, dim=8, depth=2, heads=2, memories=[stack], **options)
    model.activation_checkpointing = recompute
    return model


CHOSEN = (
    "compressed-convolution", "compressed-queries", "dual", "associative-gated", "slots", "retrieval",
    "sinks-with-positions", "tokens", "ernie-doc", "third-party",
)  # fmt: skip
"""Memories with every kind of parameter and write."""

CASES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    **{kind: (partial(transformer, KINDS[kind](5, 2, 3)), through_time) for kind in CHOSEN},
    "untied": (partial(transformer, KINDS["recurrent"](5, 2, 3), tie_embeddings=False), through_time),
    "checkpointing": (partial(transformer, KINDS["dual"](5, 2, 3), True), through_time),
    "replay": (partial(transformer, KINDS["dual"](5, 2, 3)), partial(through_time, replay=True)),
    "transformer-xl": (partial(TransformerXL, VOCAB, dim=8, depth=2, heads=2, memory_length=5), through_time),
    "transformer-xl-shared": (
        partial(
            TransformerXL, VOCAB, dim=8, depth=2, heads=2, memory_length=5, cutoffs=[8], div_value=2, share_biases=True
        ),
        through_time,
    ),
    "reformer": (
        partial(Reformer, VOCAB, 8, 2, [partial(LocalAttention, chunk_length=4)] * 2, 8),
        squares,
    ),
    "encoder": (
        partial(
            Encoder, VOCAB, dim=8, depth=2, heads=2, attentions=[partial(LongformerAttention, window=4)],
            embeddings=partial(TextEmbeddings, num_positions=32), add_mlm_head=True,
        ),
        squares,
    ),
}  # fmt: skip


class Step(nn.Module):
    """A training step as Lightning gives it to DDP: all calls of the model in one."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens: Tensor) -> Tensor:
        return self.loss(self.model, tokens)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return them whole, zero where a parameter took no part."""
    whole_gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        whole_gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return whole_gradients


def compare(name: str, rank: int, mesh: DeviceMesh) -> None:
    make, loss = CASES[name]
    torch.manual_seed(0)
    full = make().double()
    for parameter in full.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(VOCAB, (2, 2 * SEGMENT * BPTT_SEGMENTS))
    rank_tokens = tokens[rank : rank + 1]
    for parallel in ("ddp", "fsdp2"):
        full.zero_grad()
        parallel_model = copy.deepcopy(full)
        if rank == 1:  # the first process's numbers count
            for parameter in parallel_model.parameters():
                parameter.data.zero_()
        loss(full, tokens).backward()
        expected = gradients(full)
        assert sum(bool(gradient.abs().max() > 0) for gradient in expected.values()) > len(expected) // 2
        if parallel == "ddp":
            # Longformer's global projections take no part where no token is global.
            ddp = DistributedDataParallel(Step(parallel_model, loss), find_unused_parameters=name == "encoder")
            ddp(rank_tokens).backward()
        else:
            shard_model(parallel_model, mesh, torch.device("cpu"))
            assert any(isinstance(parameter, DTensor) for parameter in parallel_model.parameters())
            loss(parallel_model, rank_tokens).backward()
        parallel_gradients = gradients(parallel_model)
        assert parallel_gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            # float64: sums in another order
            torch.testing.assert_close(
                parallel_gradients[key], gradient, atol=1e-11, rtol=1e-8, msg=f"{parallel}: {key}"
            )


def process(rank: int, at: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    dist.init_process_group("gloo", init_method=f"file://{at}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    messages = {}
    for name in CASES:
        messages[name] = ""
        try:
            compare(name, rank, mesh)
        except Exception as error:
            messages[name] = "".join(traceback.format_exception(error))[-2000:]
    (Path(at) / f"errors-{rank}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Errors of each case on each of two processes, which are started once for all."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    at = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(process, (str(at),), nprocs=2, start_method="fork")
    return [json.loads((at / f"errors-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_one_process(messages: list[dict[str, str]], name: str) -> None:
    assert [errors[name] for errors in messages] == ["", ""]
