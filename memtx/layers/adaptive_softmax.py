"""Embeddings and a softmax that spend less on rare tokens: the vocabulary is cut into a short list and clusters.

Adaptive softmax of Grave et al. 2017, section 4; adaptive embeddings of Baevski and Auli 2019, section 3. Both as in
Transformer-XL: each cluster may be narrower than the one before it by a factor, with a map to the model's width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.ops.cpu.linear import linear


class VocabClusters:
    """How a vocabulary is cut.

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1, the frequent first.
        cutoffs: the first token of each cluster after the short list, ascending; none for no clusters.
        embed_dim: of the short list's embeddings.
        div_value: each cluster's embeddings are narrower than the ones before by this factor; 1 for one table in all.

    Raises:
        MemtxError: cut-offs are not ascending within the vocabulary, or a cluster would have no width.
    """

    def __init__(self, vocab_size: int, cutoffs: Sequence[int], embed_dim: int, div_value: int) -> None:
        bounds = [0, *cutoffs, vocab_size]
        if any(low >= high for low, high in itertools.pairwise(bounds)):
            raise MemtxError(
                f"cutoffs is {list(cutoffs)} for {vocab_size} tokens.", "Give ascending numbers within the vocabulary."
            )
        if div_value < 1 or embed_dim // div_value ** len(cutoffs) < 1:
            raise MemtxError(
                f"Embeddings of width {embed_dim}, divided by {div_value} for each of {len(cutoffs)} clusters, vanish.",
                "Divide by less, or cut into fewer clusters.",
            )
        self.bounds = list(itertools.pairwise(bounds))
        self.has_single_table = div_value == 1
        self.embed_dims = [embed_dim // div_value**i for i in range(len(self.bounds))]


class AdaptiveEmbedding(nn.Module):
    """Token embeddings by cluster.

    Args:
        clusters: how the vocabulary is cut.
        dim: width that all are mapped to, and by whose square root they are multiplied.
    """

    def __init__(self, clusters: VocabClusters, dim: int) -> None:
        super().__init__()
        self.clusters = clusters
        self.dim = dim
        if clusters.has_single_table:
            width = clusters.embed_dims[0]
            self.tables = nn.ModuleList([nn.Embedding(clusters.bounds[-1][1], width)])
            maps = [torch.empty(dim, width)] if width != dim else []
        else:
            sizes = [high - low for low, high in clusters.bounds]
            self.tables = nn.ModuleList(map(nn.Embedding, sizes, clusters.embed_dims))
            maps = [torch.empty(dim, width) for width in clusters.embed_dims]
        self.projections = nn.ParameterList(maps)

    def cluster_table(self, cluster: int) -> Tensor:
        """Return a cluster's embeddings, (its tokens, its width)."""
        if self.clusters.has_single_table:
            low, high = self.clusters.bounds[cluster]
            return self._table_weight(0)[low:high]
        return self._table_weight(cluster)

    def cluster_projection(self, cluster: int) -> Tensor | None:
        """Return a cluster's map, (dim, its width); None where there is none."""
        if not len(self.projections):
            return None
        found: Tensor = self.projections[0 if self.clusters.has_single_table else cluster]
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (rows, segment, dim) of tokens (rows, segment)."""
        x: Tensor
        if self.clusters.has_single_table:
            x = F.embedding(tokens, self._table_weight(0))
            x = linear(x, self.projections[0]) if len(self.projections) else x
        else:
            x = self._table_weight(0).new_zeros(*tokens.shape, self.dim)
            for cluster, (low, high) in enumerate(self.clusters.bounds):
                inside = (tokens >= low) & (tokens < high)
                made = linear(F.embedding(tokens[inside] - low, self._table_weight(cluster)), self.projections[cluster])
                x = x.index_put((inside,), made)
        x = x * self.dim**0.5
        return x

    def _table_weight(self, index: int) -> Tensor:
        found: Tensor = self.tables[index].weight  # type: ignore[assignment]
        return found


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities by cluster: the short list and one entry a cluster, then the tokens within each cluster.

    Args:
        clusters: how the vocabulary is cut.
        dim: width of the hidden states.
        tie_embeddings: whether output weights are the embeddings.
        tie_projections: for each cluster whether its map is the embedding's.
    """

    def __init__(
        self, clusters: VocabClusters, dim: int, *, tie_embeddings: bool, tie_projections: Sequence[bool]
    ) -> None:
        super().__init__()
        self.clusters = clusters
        tail = len(clusters.bounds) - 1
        width = clusters.embed_dims[0]
        mapped = not (clusters.has_single_table and width == dim)
        sizes = [high - low for low, high in clusters.bounds]
        tables = (
            [(sum(sizes), width)] if clusters.has_single_table else list(zip(sizes, clusters.embed_dims, strict=True))
        )
        self.tables = nn.ParameterList([] if tie_embeddings else [torch.empty(shape) for shape in tables])
        self.biases = nn.ParameterList(torch.zeros(size) for size, _ in tables)
        # By the cluster's number: where a map is the embedding's there is none of its own.
        self.projections = nn.ParameterDict(
            {
                str(cluster): torch.empty(dim, clusters.embed_dims[cluster])
                for cluster in range(tail + 1)
                if mapped and not tie_projections[cluster]
            }
        )
        self.cluster_weight = nn.Parameter(torch.zeros(tail, width)) if tail else None
        self.cluster_bias = nn.Parameter(torch.zeros(tail)) if tail else None

    def forward(self, x: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Return log-probabilities (..., vocab) of x (..., dim)."""
        head = self._head_log_probs(x, embedding)
        short = self.clusters.bounds[0][1]
        parts = [head[..., :short]]
        for cluster in range(1, len(self.clusters.bounds)):
            within = F.log_softmax(self._cluster_logits(x, embedding, cluster), dim=-1)
            parts.append(head[..., short + cluster - 1, None] + within)
        return torch.cat(parts, dim=-1)

    def nll(self, x: Tensor, labels: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Return the labels' negative log-likelihoods in nats (n,), 0 where a label is -100.

        Each token's cluster alone is looked at, which is what makes it cheap.

        Args:
            x: (n, dim).
            labels: (n,) int64.
            embedding: the input's.
        """
        head = self._head_log_probs(x, embedding)
        short = self.clusters.bounds[0][1]
        total = x.new_zeros(labels.shape, dtype=head.dtype)
        for cluster, (low, high) in enumerate(self.clusters.bounds):
            at = ((labels >= low) & (labels < high)).nonzero()[:, 0]
            if cluster == 0:
                found = head[at].gather(1, labels[at, None])[:, 0]
            else:
                within = F.log_softmax(self._cluster_logits(x[at], embedding, cluster), dim=-1)
                found = head[at, short + cluster - 1] + within.gather(1, labels[at, None] - low)[:, 0]
            total = total.index_put((at,), -found)
        return total

    def _head_log_probs(self, x: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Return log-probabilities of the short list and the clusters, (..., short list + clusters)."""
        return F.log_softmax(self._cluster_logits(x, embedding, 0), dim=-1)

    def _cluster_logits(self, x: Tensor, embedding: AdaptiveEmbedding, cluster: int) -> Tensor:
        low, high = self.clusters.bounds[cluster]
        if self.clusters.has_single_table:
            bias = self.biases[0][low:high]
            weight = self.tables[0][low:high] if len(self.tables) else embedding.cluster_table(cluster)
        else:
            bias = self.biases[cluster]
            weight = self.tables[cluster] if len(self.tables) else embedding.cluster_table(cluster)
        if cluster == 0 and self.cluster_weight is not None and self.cluster_bias is not None:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        name = str(cluster)
        projection = self.projections[name] if name in self.projections else embedding.cluster_projection(cluster)
        return linear(x if projection is None else x @ projection, weight, bias)
