"""Transformer-XL: a decoder whose layers see the hidden states of the segments before (Dai et al. 2019).

As published: an empty memory is one of zeros, which are seen. So a fresh stream sees as many keys as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.hf.layout import HFCompatibleModel
from memtx.layers.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax, VocabClusters
from memtx.layers.feed_forward import FeedForward
from memtx.layers.transformer_xl import RelativeAttention, distance_embeddings
from memtx.memory.recurrent import RecurrentState, update_cache
from memtx.models.recurrent_lm import MemoryOutput
from memtx.models.validation import check_inputs
from memtx.ops.cross_entropy import IGNORE_INDEX
from memtx.segment import Segment
from memtx.state import MemoryState


class TransformerXLBlock(nn.Module):
    """One layer: attention over [memory | segment], then feed-forward.

    Args:
        attention: the attention part.
        feed_forward: the position-wise part.
        dim: width of the hidden states.
        eps: of the norms.
        pre_norm: norm what each part reads, instead of the sum it ends in.
        dropout: of what each part adds.
    """

    def __init__(
        self,
        attention: RelativeAttention,
        feed_forward: nn.Module,
        dim: int,
        eps: float,
        pre_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = feed_forward
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, **attention_kwargs: Tensor | tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the layer's output (rows, segment, dim); further arguments are the attention's."""
        if self.pre_norm:
            attended = self.attention(self.attention_norm(x), self.attention_norm(memory), **attention_kwargs)
            x = x + self.dropout(attended)
            out: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
            return out
        x = self.attention_norm(x + self.dropout(self.attention(x, memory, **attention_kwargs)))
        out = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return out


class TransformerXL(HFCompatibleModel):
    """A decoder with relative positions, a cache of hidden states, and an adaptive softmax.

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1, the frequent first.
        dim: width of the hidden states.
        depth: layers.
        heads: how many a layer.
        head_dim: width of a head; dim / heads by default.
        hidden_dim: inner width of the feed-forward parts; 4 dim by default.
        memory_length: hidden states carried, in positions.
        same_length: every query sees ``memory_length`` positions, itself included, so cutting a stream does not matter;
            else it sees the whole cache and what came before it in the segment.
        clamp_length: farther distances count as this one; 0 or less for no such limit.
        embed_dim: width of the short list's embeddings; dim by default.
        cutoffs: the first token of each cluster of the vocabulary.
        div_value: each cluster's embeddings are narrower by this factor.
        tie_embeddings: whether output weights are the embeddings.
        tie_projections: for each cluster whether its map to the output is the embedding's; all but the short list's
            by default, as published.
        share_biases: one u and v for all layers, instead of one a layer.
        pre_norm: norm before each part instead of after it.
        add_lm_head: whether there is a softmax; without one ``logits`` is None.
        eps: of the norms.
        dropout: of embeddings and of what each part adds.
        attention_dropout: of attention weights.

    Raises:
        MemtxError: a number is out of range or numbers do not fit each other.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 6,
        heads: int = 4,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        memory_length: int = 512,
        same_length: bool = False,
        clamp_length: int = -1,
        embed_dim: int | None = None,
        cutoffs: Sequence[int] = (),
        div_value: int = 1,
        tie_embeddings: bool = True,
        tie_projections: Sequence[bool] | None = None,
        share_biases: bool = False,
        pre_norm: bool = False,
        add_lm_head: bool = True,
        eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, depth=depth, heads=heads)
        if dim % 2:
            raise MemtxError(f"dim is {dim}, expected an even number.", "Half of a distance's code is sines.")
        if memory_length < (1 if same_length else 0):
            raise MemtxError(f"memory_length is {memory_length}.", "Give at least 1 where every query sees as many.")
        if head_dim is None and dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads do not divide.", "Choose a divisor, or give head_dim.")
        head_dim = head_dim if head_dim is not None else dim // heads
        clusters = VocabClusters(vocab_size, cutoffs, embed_dim if embed_dim is not None else dim, div_value)
        ties = [cluster > 0 for cluster in range(len(clusters.bounds))] if tie_projections is None else tie_projections
        if len(ties) != len(clusters.bounds):
            raise MemtxError(
                f"tie_projections has {len(ties)} entries, the vocabulary {len(clusters.bounds)} clusters.",
                "Give one a cluster, the short list's first.",
            )
        self.save_init_args(arguments)
        self.vocab_size = vocab_size
        self.dim = dim
        self.depth = depth
        self.memory_length = memory_length
        self.same_length = same_length
        self.clamp_length = clamp_length
        self.embedding = AdaptiveEmbedding(clusters, dim)
        self.content_bias = nn.Parameter(torch.zeros(heads, head_dim)) if share_biases else None
        self.position_bias = nn.Parameter(torch.zeros(heads, head_dim)) if share_biases else None
        self.blocks = nn.ModuleList(
            TransformerXLBlock(
                RelativeAttention(dim, heads, head_dim, has_biases=not share_biases, dropout=attention_dropout),
                FeedForward(dim, hidden_dim, dropout, activation=nn.ReLU),
                dim,
                eps,
                pre_norm,
                dropout,
            )
            for _ in range(depth)
        )
        self.dropout = nn.Dropout(dropout)
        self.softmax = (
            AdaptiveSoftmax(clusters, dim, tie_embeddings=tie_embeddings, tie_projections=ties) if add_lm_head else None
        )
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, projection_std: float = 0.01) -> None:
        """Draw all weights anew, as published: normal, biases zero, norms one."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    continue
                if ".projections." in name:
                    nn.init.normal_(parameter, std=projection_std)
                elif parameter.dim() > 1:
                    nn.init.normal_(parameter, std=std)
                else:
                    nn.init.zeros_(parameter)

    def _layers(self) -> list[TransformerXLBlock]:
        return cast(list[TransformerXLBlock], list(self.blocks))

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MemoryState:
        """Return the state of fresh streams.

        Args:
            batch_size: streams in the batch.
            dtype: of what is carried; the weights' by default.
            device: the weights' by default.

        Raises:
            MemtxError: batch_size is not positive.
        """
        check_at_least(1, batch_size=batch_size)
        weight = self.embedding.cluster_table(0)
        hidden = torch.zeros(
            batch_size, self.memory_length, self.dim, dtype=dtype or weight.dtype, device=device or weight.device
        )
        position = torch.zeros(batch_size, dtype=torch.int64, device=hidden.device)
        return MemoryState(position, tuple((RecurrentState(hidden),) for _ in range(self.depth)))

    def forward(
        self,
        tokens: Tensor,
        state: MemoryState | None = None,
        *,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        return_hidden_states: bool = False,
    ) -> MemoryOutput:
        """Read one segment; the output's ``logits`` are log-probabilities.

        Args:
            tokens: (rows, segment) int64.
            state: what the previous call returned; None for fresh streams. Its layers hold the newest layer inputs,
                ``state.layers[l][0].hidden`` (rows, memory, dim), newest last.
            document_starts: (rows, segment) bool, where a document begins; what came before it counts as an empty
                memory.
            labels: (rows, segment) int64, the token to be predicted at each place; -100 where none is.
            return_hidden_states: whether to return hidden states.

        Raises:
            MemtxError: shapes do not fit each other, or labels are given to a model without a softmax.
        """
        check_inputs(tokens, state, labels=labels)
        if labels is not None and self.softmax is None:
            raise MemtxError("labels were given to a model without a softmax.", "Leave them out.")
        state = state if state is not None else self.init_state(tokens.shape[0])
        segment = Segment.from_document_starts(state.position, tokens.shape[1], document_starts)
        x = self.dropout(self.embedding(tokens))
        sinusoids = self.dropout(
            distance_embeddings(self.memory_length + segment.length, self.dim, self.clamp_length, x)
        )
        seen = self._visibility_mask(segment)
        foreign = None if document_starts is None else self._other_document_mask(segment)
        shared = None
        if self.content_bias is not None and self.position_bias is not None:
            shared = (self.content_bias, self.position_bias)
        hidden, layers = [x], []
        for block, (own,) in zip(self._layers(), state.layers, strict=True):
            carried = own.hidden.to(x.dtype)
            layers.append((RecurrentState(update_cache(own.hidden, x.to(own.hidden.dtype), segment)),))
            x = block(x, carried, sinusoids=sinusoids, mask=seen, cross_document_mask=foreign, shared_biases=shared)
            hidden.append(x)
        x = self.dropout(x)
        logits = loss = nll = None
        if labels is not None:
            assert self.softmax is not None
            scored = self.softmax.nll(x.flatten(0, 1), labels.flatten(), self.embedding)
            loss = scored.sum() / (labels != IGNORE_INDEX).sum().clamp(min=1)
            nll = scored.detach().view_as(labels)
        elif self.softmax is not None:
            logits = self.softmax(x, self.embedding)
        return MemoryOutput(
            logits,
            tuple(hidden) if return_hidden_states else None,
            MemoryState(segment.next_position, tuple(layers)),
            loss,
            loss,
            nll,
            {},
        )

    def _visibility_mask(self, segment: Segment) -> Tensor:
        """Return (segment, memory + segment) bool."""
        query = torch.arange(segment.length, device=segment.position.device)[:, None]
        key = torch.arange(-self.memory_length, segment.length, device=segment.position.device)
        seen = key <= query
        return seen & (key > query - self.memory_length) if self.same_length else seen

    def _other_document_mask(self, segment: Segment) -> Tensor:
        """Return (rows, segment, memory + segment) bool: keys of another document than the query's."""
        document = F.pad(segment.document_id, (self.memory_length, 0))  # what is carried is of document 0
        return document[:, None, :] != segment.document_id[:, :, None]
