"""Heads of a language model: one projection, or an adaptive softmax with its embeddings.

The adaptive softmax cuts the vocabulary into a short list and clusters of rarer, cheaper tokens (Grave et al. 2017,
section 4; embeddings of Baevski and Auli 2019, section 3). As in Transformer-XL, each cluster may be narrower than the
previous one by a factor, with a projection to the model's width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.ops.cpu.linear import Linear, linear
from memtx.ops.cross_entropy import linear_cross_entropy


class LinearHead(Linear):
    """A projection from ``dim`` to ``vocab_size``."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)

    def nll(self, x: Tensor, labels: Tensor, log_shares: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of labels; see :func:`memtx.ops.cross_entropy.linear_cross_entropy`."""
        return linear_cross_entropy(x, self.weight, labels, log_shares=log_shares)


class NoHead(nn.Module):
    """The head of a model that returns hidden states alone."""

    def forward(self, x: Tensor) -> None:
        """Return None."""

    def nll(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Raise MemtxError."""
        raise MemtxError("labels were given to a model without a softmax.", "Remove labels, or set add_lm_head.")


class VocabClusters:
    """The partition of a vocabulary into a short list and clusters.

    Args:
        vocab_size: Vocabulary size; frequent tokens have low ids.
        cutoffs: First token of each cluster after the short list, ascending. Empty for no clusters.
        embed_dim: Width of the short list's embeddings.
        div_value: Factor by which each cluster's embeddings are narrower than the previous ones; 1 for a single table.

    Attributes:
        bounds: First token and end of the short list and of each cluster.
        has_single_table: If True, all clusters share one table.
        embed_dims: Width of the embeddings of each.
        table_shapes: Shape of each table, (tokens, width).

    Raises:
        MemtxError: cutoffs are not ascending within the vocabulary, or a cluster would have no width.
    """

    def __init__(self, vocab_size: int, cutoffs: Sequence[int], embed_dim: int, div_value: int) -> None:
        bounds = [0, *cutoffs, vocab_size]
        if any(low >= high for low, high in itertools.pairwise(bounds)):
            raise MemtxError(
                f"cutoffs is {list(cutoffs)} for {vocab_size} tokens.", "Give ascending numbers within the vocabulary."
            )
        if div_value < 1 or embed_dim // div_value ** len(cutoffs) < 1:
            raise MemtxError(
                f"embed_dim ({embed_dim}) vanishes when divided by div_value ({div_value}) {len(cutoffs)} times.",
                "Lower div_value or give fewer cutoffs.",
            )
        self.bounds = list(itertools.pairwise(bounds))
        self.has_single_table = div_value == 1
        self.embed_dims = [embed_dim // div_value**i for i in range(len(self.bounds))]
        sizes = [high - low for low, high in self.bounds]
        self.table_shapes = (
            [(vocab_size, embed_dim)] if self.has_single_table else list(zip(sizes, self.embed_dims, strict=True))
        )

    def select(self, tables: nn.ParameterList, cluster: int) -> Tensor:
        """Return a cluster's part of ``table_shapes``' tables, or of one vector of values for each."""
        low, high = self.bounds[cluster]
        part: Tensor = tables[0][low:high] if self.has_single_table else tables[cluster]
        return part


class AdaptiveEmbedding(nn.Module):
    """Token embeddings by cluster.

    Args:
        clusters: Partition of the vocabulary.
        dim: Width of the hidden states; embeddings are projected to it and multiplied by its square root.
    """

    def __init__(self, clusters: VocabClusters, dim: int) -> None:
        super().__init__()
        self.clusters = clusters
        self.dim = dim
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size, width in clusters.table_shapes)
        is_projected = not (clusters.has_single_table and clusters.embed_dims[0] == dim)
        self.projections = nn.ParameterList(
            torch.empty(dim, width) for _, width in clusters.table_shapes if is_projected
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens ``(batch, length)`` as ``(batch, length, dim)``."""
        x: Tensor
        if self.clusters.has_single_table:
            x = self.tables[0](tokens)
            x = linear(x, self.projections[0]) if len(self.projections) else x
        else:
            x = self.projections[0].new_zeros(*tokens.shape, self.dim)
            for cluster, (low, high) in enumerate(self.clusters.bounds):
                # All tokens in every cluster, so that shapes do not depend on the tokens: lookups are cheap.
                embedded = self.tables[cluster]((tokens - low).clamp(0, high - low - 1))
                is_inside = ((tokens >= low) & (tokens < high))[..., None]
                x = torch.where(is_inside, linear(embedded, self.projections[cluster]), x)
        x = x * self.dim**0.5
        return x


class AdaptiveInputs(AdaptiveEmbedding):
    """Token embeddings of less width for rarer tokens (adaptive inputs, Baevski and Auli 2019, section 3).

    Args:
        vocab_size: Vocabulary size; frequent tokens have low ids.
        dim: Width of the hidden states, and of the embeddings of the most frequent tokens.
        cutoffs: First token of each cluster after the most frequent tokens.
        div_value: Factor by which each cluster's embeddings are narrower than the previous ones.

    Raises:
        MemtxError: cutoffs are not ascending within the vocabulary, or a cluster would have no width.
    """

    def __init__(self, vocab_size: int, dim: int, cutoffs: Sequence[int], div_value: int = 4) -> None:
        super().__init__(VocabClusters(vocab_size, cutoffs, dim, div_value), dim)


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities by cluster: over the short list and the clusters, then over the tokens of each cluster.

    Args:
        embedding: Input embedding, whose clusters and width are used.
        tie_embeddings: If True, output weights are the embeddings.
        tie_projections: For each cluster, True if its projection is the embedding's. Defaults to all but the first, as
            in Transformer-XL.

    Attributes:
        assumes_short_list: If True, :meth:`nll` computes as if all labels were in the short list, which most are, for
            estimates of cost on tensors without values.

    Raises:
        MemtxError: ``tie_projections`` does not have one entry per cluster.
    """

    def __init__(
        self,
        embedding: AdaptiveEmbedding,
        *,
        tie_embeddings: bool = True,
        tie_projections: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        self.assumes_short_list = False
        self.clusters = clusters = embedding.clusters
        num_clusters = len(clusters.bounds)
        ties = [cluster > 0 for cluster in range(num_clusters)] if tie_projections is None else tie_projections
        if len(ties) != num_clusters:
            message = f"tie_projections has {len(ties)} entries for {num_clusters} clusters of the vocabulary."
            raise MemtxError(message, "Give one per cluster.")
        self.tables = nn.ParameterList(
            table.weight if tie_embeddings else torch.empty(shape)
            for table, shape in zip(embedding.tables, clusters.table_shapes, strict=True)
        )
        self.biases = nn.ParameterList(torch.zeros(size) for size, _ in clusters.table_shapes)
        self.projections = nn.ParameterList(
            embedding.projections[0 if clusters.has_single_table else cluster]
            if is_tied
            else torch.empty(embedding.dim, clusters.embed_dims[cluster])
            for cluster, is_tied in enumerate(ties)
            if len(embedding.projections)
        )
        has_clusters = num_clusters > 1
        width = clusters.embed_dims[0]
        self.cluster_weight = nn.Parameter(torch.zeros(num_clusters - 1, width)) if has_clusters else None
        self.cluster_bias = nn.Parameter(torch.zeros(num_clusters - 1)) if has_clusters else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the log-probabilities ``(..., vocab)`` of x ``(..., dim)``."""
        head = F.log_softmax(self._cluster_logits(x, 0), dim=-1)
        short = self.clusters.bounds[0][1]
        parts = [head[..., :short]]
        for cluster in range(1, len(self.clusters.bounds)):
            within = F.log_softmax(self._cluster_logits(x, cluster), dim=-1)
            parts.append(head[..., short + cluster - 1, None] + within)
        return torch.cat(parts, dim=-1)

    def nll(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of the labels in nats, summed with gradient, and of each without.

        Hidden states are ``(n, dim)``, labels ``(n,)`` int64, of which -100 counts 0. Only the label's own cluster is
        computed for each token, which is what makes this cheap.
        """
        head = F.log_softmax(self._cluster_logits(x, 0), dim=-1)
        short = self.clusters.bounds[0][1]
        nll = x.new_zeros(labels.shape, dtype=head.dtype)
        for cluster, (low, high) in enumerate(self.clusters.bounds):
            if self.assumes_short_list:
                index = torch.arange(0 if cluster else len(labels), device=labels.device)
            else:
                index = ((labels >= low) & (labels < high)).nonzero()[:, 0]
            if cluster == 0:
                log_probs = head[index].gather(1, labels[index, None])[:, 0]
            else:
                within = F.log_softmax(self._cluster_logits(x[index], cluster), dim=-1)
                log_probs = head[index, short + cluster - 1] + within.gather(1, labels[index, None] - low)[:, 0]
            nll = nll.index_put((index,), -log_probs)
        return nll.sum(), nll.detach()

    def _cluster_logits(self, x: Tensor, cluster: int) -> Tensor:
        """Return the logits of a cluster's tokens; those of the short list are followed by the clusters' own."""
        weight, bias = (self.clusters.select(values, cluster) for values in (self.tables, self.biases))
        if cluster == 0 and self.cluster_weight is not None and self.cluster_bias is not None:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        return linear(x @ self.projections[cluster] if len(self.projections) else x, weight, bias)


LMHead = LinearHead | AdaptiveSoftmax | NoHead
"""``head(x)`` returns logits, ``head.nll(x, labels)`` the summed and each label's negative log-likelihood."""


def build_head(
    embedding: nn.Module, vocab_size: int, dim: int, tie_embeddings: bool, output_memory: nn.Module | None
) -> LinearHead | AdaptiveSoftmax:
    """Return the head that fits an embedding, adaptive ones being tied; raises MemtxError if a memory needs another."""
    if not isinstance(embedding, AdaptiveEmbedding):
        return LinearHead(dim, vocab_size)
    if output_memory is not None:
        message = f"{type(output_memory).__name__} mixes logits of all tokens, which an adaptive softmax does not have."
        raise MemtxError(message, "Remove output_memory or adaptive_embedding.")
    return AdaptiveSoftmax(embedding, tie_embeddings=tie_embeddings)


def init_vocabulary(embedding: nn.Module, head: nn.Module, std: float, projection_std: float = 0.01) -> None:
    """Initialize embeddings and head with normal weights and zero biases; projections as Transformer-XL has them."""
    for name, parameter in (*embedding.named_parameters(), *head.named_parameters()):
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=projection_std if name.startswith("projections.") else std)
        else:
            nn.init.zeros_(parameter)
