"""Adaptive embeddings and softmax: the vocabulary is cut into a short list and clusters of rarer, cheaper tokens.

Adaptive softmax of Grave et al. 2017, section 4; adaptive embeddings of Baevski and Auli 2019, section 3. As in
Transformer-XL, each cluster may be narrower than the previous one by a factor, with a projection to the model's width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.ops.cpu.linear import linear


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

    def select(self, tables: Sequence[Tensor] | nn.ParameterList, cluster: int) -> Tensor:
        """Return a cluster's part of ``table_shapes``' tables, or of one vector of values for each."""
        if not self.has_single_table:
            return tables[cluster]
        low, high = self.bounds[cluster]
        return tables[0][low:high]


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

    def cluster_table(self, cluster: int) -> Tensor:
        """Return the embeddings of a cluster, ``(tokens of the cluster, its width)``."""
        return self.clusters.select([cast(nn.Embedding, table).weight for table in self.tables], cluster)

    def cluster_projection(self, cluster: int) -> Tensor | None:
        """Return the projection of a cluster, ``(dim, its width)``, or None if there is none."""
        if not len(self.projections):
            return None
        projection: Tensor = self.projections[0 if self.clusters.has_single_table else cluster]
        return projection

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens ``(batch, length)`` as ``(batch, length, dim)``."""
        x: Tensor
        if self.clusters.has_single_table:
            x = self.tables[0](tokens)
            x = linear(x, self.projections[0]) if len(self.projections) else x
        else:
            x = self.projections[0].new_zeros(*tokens.shape, self.dim)
            for cluster, (low, high) in enumerate(self.clusters.bounds):
                mask = (tokens >= low) & (tokens < high)
                x = x.index_put((mask,), linear(self.tables[cluster](tokens[mask] - low), self.projections[cluster]))
        x = x * self.dim**0.5
        return x


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities by cluster: over the short list and the clusters, then over the tokens of each cluster.

    Args:
        clusters: Partition of the vocabulary.
        dim: Width of the hidden states.
        tie_embeddings: If True, output weights are the embeddings.
        tie_projections: For each cluster, True if its projection is the embedding's.
    """

    def __init__(
        self, clusters: VocabClusters, dim: int, *, tie_embeddings: bool, tie_projections: Sequence[bool]
    ) -> None:
        super().__init__()
        self.clusters = clusters
        num_clusters = len(clusters.bounds) - 1
        width = clusters.embed_dims[0]
        is_projected = not (clusters.has_single_table and width == dim)
        self.tables = nn.ParameterList(torch.empty(shape) for shape in clusters.table_shapes if not tie_embeddings)
        self.biases = nn.ParameterList(torch.zeros(size) for size, _ in clusters.table_shapes)
        # Keyed by cluster, since tied clusters have no projection here.
        self.projections = nn.ParameterDict(
            {
                str(cluster): torch.empty(dim, clusters.embed_dims[cluster])
                for cluster in range(num_clusters + 1)
                if is_projected and not tie_projections[cluster]
            }
        )
        self.cluster_weight = nn.Parameter(torch.zeros(num_clusters, width)) if num_clusters else None
        self.cluster_bias = nn.Parameter(torch.zeros(num_clusters)) if num_clusters else None

    def forward(self, x: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Return the log-probabilities ``(..., vocab)`` of x ``(..., dim)``."""
        head = F.log_softmax(self._cluster_logits(x, embedding, 0), dim=-1)
        short = self.clusters.bounds[0][1]
        parts = [head[..., :short]]
        for cluster in range(1, len(self.clusters.bounds)):
            within = F.log_softmax(self._cluster_logits(x, embedding, cluster), dim=-1)
            parts.append(head[..., short + cluster - 1, None] + within)
        return torch.cat(parts, dim=-1)

    def nll(self, x: Tensor, labels: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Return the negative log-likelihood of each label in nats, ``(n,)``, 0 where a label is -100.

        Only the label's own cluster is computed for each token, which is what makes this cheap.

        Args:
            x: Hidden states, ``(n, dim)``.
            labels: Token ids, ``(n,)`` int64.
            embedding: Input embedding.
        """
        head = F.log_softmax(self._cluster_logits(x, embedding, 0), dim=-1)
        short = self.clusters.bounds[0][1]
        nll = x.new_zeros(labels.shape, dtype=head.dtype)
        for cluster, (low, high) in enumerate(self.clusters.bounds):
            index = ((labels >= low) & (labels < high)).nonzero()[:, 0]
            if cluster == 0:
                log_probs = head[index].gather(1, labels[index, None])[:, 0]
            else:
                within = F.log_softmax(self._cluster_logits(x[index], embedding, cluster), dim=-1)
                log_probs = head[index, short + cluster - 1] + within.gather(1, labels[index, None] - low)[:, 0]
            nll = nll.index_put((index,), -log_probs)
        return nll

    def _cluster_logits(self, x: Tensor, embedding: AdaptiveEmbedding, cluster: int) -> Tensor:
        """Return the logits of a cluster's tokens; those of the short list are followed by the clusters' own."""
        bias = self.clusters.select(self.biases, cluster)
        is_tied = not len(self.tables)
        weight = embedding.cluster_table(cluster) if is_tied else self.clusters.select(self.tables, cluster)
        if cluster == 0 and self.cluster_weight is not None and self.cluster_bias is not None:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        name = str(cluster)
        projection = self.projections[name] if name in self.projections else embedding.cluster_projection(cluster)
        return linear(x if projection is None else x @ projection, weight, bias)
