"""Transformer-XL (Dai et al. 2019): a decoder whose layers see the hidden states of previous segments.

As published, an empty memory consists of zeros, which are visible: a fresh stream sees as many keys as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least
from memtx.layers.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax, VocabClusters
from memtx.layers.feed_forward import FeedForward
from memtx.layers.transformer_xl import RelativeAttention, distance_embeddings
from memtx.memory.recurrent import RecurrentState, update_cache
from memtx.models.recurrent_lm import MemoryOutput
from memtx.models.validation import check_segment
from memtx.ops.cross_entropy import IGNORE_INDEX
from memtx.segment import Segment
from memtx.state import MemoryState


class TransformerXLBlock(nn.Module):
    """One layer: attention over [memory | segment], then feed-forward; arguments as in :class:`TransformerXL`."""

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
        """Return ``(batch, length, dim)`` from x of that shape and memory ``(batch, memory_length, dim)``."""
        if self.pre_norm:
            attended = self.attention(self.attention_norm(x), self.attention_norm(memory), **attention_kwargs)
            x = x + self.dropout(attended)
            return x + cast(Tensor, self.dropout(self.feed_forward(self.feed_forward_norm(x))))
        x = self.attention_norm(x + self.dropout(self.attention(x, memory, **attention_kwargs)))
        return cast(Tensor, self.feed_forward_norm(x + self.dropout(self.feed_forward(x))))


class TransformerXL(PretrainedModel):
    """A decoder with relative positions, a cache of hidden states, and an adaptive softmax.

    Args:
        vocab_size: Number of token ids, frequent tokens first.
        dim: Width of the hidden states.
        depth: Number of layers.
        heads: Heads per layer.
        head_dim: Width of a head. Defaults to dim / heads.
        hidden_dim: Hidden width of the feed-forward parts. Defaults to 4 dim.
        memory_length: Number of hidden states carried per layer.
        same_length: If True, every query sees ``memory_length`` positions, itself included, so that segmentation does
            not matter; otherwise it sees the whole cache and the earlier tokens of its segment.
        clamp_length: Largest distance that is told apart; 0 or less for no limit.
        embed_dim: Width of the embeddings of the first cluster. Defaults to ``dim``.
        cutoffs: First token of each further cluster of the vocabulary.
        div_value: Factor by which each cluster's embeddings are narrower than the previous cluster's.
        tie_embeddings: If True, the output weights are the embeddings.
        tie_projections: For each cluster, whether its output projection is the embedding's. Defaults to all but the
            first, as published.
        share_biases: If True, all layers share the biases u and v.
        pre_norm: If True, normalize before each part instead of after it.
        add_lm_head: If True, add the softmax; ``logits`` is None without it.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the embeddings and the residual branches.
        attention_dropout: Dropout rate of the attention weights.

    Raises:
        MemtxError: A number is out of range, or numbers do not fit each other.
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
            raise MemtxError(f"dim is {dim}, expected an even number.", "Choose another dim.")
        check_at_least(1 if same_length else 0, memory_length=memory_length)
        if head_dim is None and dim % heads:
            raise MemtxError(f"dim ({dim}) must be divisible by heads ({heads}).", "Choose others, or give head_dim.")
        head_dim = head_dim if head_dim is not None else dim // heads
        clusters = VocabClusters(vocab_size, cutoffs, embed_dim if embed_dim is not None else dim, div_value)
        ties = [cluster > 0 for cluster in range(len(clusters.bounds))] if tie_projections is None else tie_projections
        if len(ties) != len(clusters.bounds):
            message = f"tie_projections has {len(ties)} entries for {len(clusters.bounds)} clusters of the vocabulary."
            raise MemtxError(message, "Give one per cluster.")
        self.save_init_args(arguments)
        self.vocab_size, self.dim, self.depth = vocab_size, dim, depth
        self.memory_length, self.same_length, self.clamp_length = memory_length, same_length, clamp_length
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
        """Initialize all weights as published: normal weights, zero biases, unit norms."""
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
        """Return the state of fresh streams; arguments as in :meth:`memtx.MemoryTransformer.init_state`."""
        check_at_least(1, batch_size=batch_size)
        weight = self.embedding.cluster_table(0)
        shape = (batch_size, self.memory_length, self.dim)
        hidden = torch.zeros(shape, dtype=dtype or weight.dtype, device=device or weight.device)
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
            tokens: ``(batch, length)`` int64.
            state: State returned by the previous call; None for fresh streams. It holds the newest inputs of each
                layer, ``state.layers[layer][0].hidden`` of shape ``(batch, memory_length, dim)``, newest last.
            document_starts: ``(batch, length)`` bool, True where a document begins; earlier tokens then count as an
                empty memory.
            labels: ``(batch, length)`` int64, the token to predict at each position; -100 is ignored.
            return_hidden_states: If True, return the hidden states.

        Raises:
            MemtxError: Shapes do not fit each other, or labels are given to a model without a softmax.
        """
        check_segment(tokens, state, labels=labels)
        if labels is not None and self.softmax is None:
            raise MemtxError("labels were given to a model without a softmax.", "Remove labels, or set add_lm_head.")
        state = state if state is not None else self.init_state(tokens.shape[0])
        segment = Segment.from_document_starts(state.position, tokens.shape[1], document_starts)
        x = self.dropout(self.embedding(tokens))
        num_distances = self.memory_length + segment.length
        biases = (self.content_bias, self.position_bias)
        attention_kwargs = {
            "sinusoids": self.dropout(distance_embeddings(num_distances, self.dim, self.clamp_length, x)),
            "mask": self._visibility_mask(segment),
            "cross_document_mask": None if document_starts is None else self._cross_document_mask(segment),
            "shared_biases": None if self.content_bias is None else biases,
        }
        hidden, layers = [x], []
        for block, (layer_state,) in zip(self._layers(), state.layers, strict=True):
            cache = layer_state.hidden
            layers.append((RecurrentState(update_cache(cache, x.to(cache.dtype), segment)),))
            x = block(x, cache.to(x.dtype), **attention_kwargs)
            hidden.append(x)
        x = self.dropout(x)
        logits = loss = nll = None
        if labels is not None:
            assert self.softmax is not None
            flat_nll = self.softmax.nll(x.flatten(0, 1), labels.flatten(), self.embedding)
            loss = flat_nll.sum() / (labels != IGNORE_INDEX).sum().clamp(min=1)
            nll = flat_nll.detach().view_as(labels)
        elif self.softmax is not None:
            logits = self.softmax(x, self.embedding)
        hidden_states = tuple(hidden) if return_hidden_states else None
        next_state = MemoryState(segment.next_position, tuple(layers))
        return MemoryOutput(logits, hidden_states, next_state, loss, loss, nll, {})

    def _visibility_mask(self, segment: Segment) -> Tensor:
        """Return which keys each query sees, ``(length, memory_length + length)`` bool."""
        query = torch.arange(segment.length, device=segment.position.device)[:, None]
        key = torch.arange(-self.memory_length, segment.length, device=segment.position.device)
        visible = key <= query
        return visible & (key > query - self.memory_length) if self.same_length else visible

    def _cross_document_mask(self, segment: Segment) -> Tensor:
        """Return which keys belong to another document, ``(batch, length, memory_length + length)`` bool."""
        document = F.pad(segment.document_id, (self.memory_length, 0))  # the cache belongs to document 0
        return document[:, None, :] != segment.document_id[:, :, None]
