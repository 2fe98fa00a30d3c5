/* Probability that copying gives to each label, in float32, with the direction of its gradient; copying.py calls it.

   Queries are the lanes of vectors, as in attention.cpp. With e_j = exp(q k_j), a pass over the keys sums e_j and
   e_j k_j over all keys and over those that the label followed:

       copied = sum_match e / sum e,   d copied / d q = (sum_match e k - copied * sum e k) / sum e

   Few keys match a label, so their sums are made one by one. */
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "visibility.h"

struct Shape {
    int64_t batch_size, length, num_keys, key_dim;
    int64_t first_key;       /* first key whose gradient is computed */
    int64_t interval_stride; /* stride of intervals between batch entries; 0 if shared */
    int64_t threads;
};

/* Pointers to one batch entry, and its keys as a block of queries sees them; queries are (key_dim, length), scaled by
   log2(e). */
struct Entry {
    const float *q, *keys;
    const int32_t *next_tokens, *labels;
    KeyInfo seen;
};

static Entry entry_of(const Shape &n, int64_t b, int64_t query, const float *q, const float *keys,
                      const int32_t *next_tokens, const int32_t *labels, const int32_t *visible_from,
                      const int32_t *visible_until)
{
    return {q + b * n.key_dim * n.length + query,
            keys + b * n.num_keys * n.key_dim,
            next_tokens + b * n.num_keys,
            labels + b * n.length + query,
            {visible_from + b * n.interval_stride, visible_until + b * n.interval_stride, nullptr, 0.0f,
             (int32_t)query}};
}

/* Scores (count, QUERY_BLOCK) in base 2 of the keys from `key` on. */
static void compute_scores(const Shape &n, const Entry &x, int64_t key, int64_t count, float *scores)
{
    matmul(count, QUERY_BLOCK, n.key_dim, x.keys + key * n.key_dim, n.key_dim, 1, x.q, n.length, scores, QUERY_BLOCK,
           false);
    apply_bias_and_mask(scores, count, key, x.seen);
}

/* `copied`, `best` (the largest score) and `lse` (in base 2) are (batch, length); `direction`, (batch, length, key_dim),
   may be null. */
extern "C" void memtx_copying_forward(const float *q, const float *keys, const int32_t *next_tokens,
                                      const int32_t *labels, const int32_t *visible_from, const int32_t *visible_until,
                                      float *copied, float *best, float *lse, float *direction, const int64_t *sizes)
{
    const Shape n = *(const Shape *)sizes;
    const int64_t blocks = n.length / QUERY_BLOCK, width = n.key_dim;
#pragma omp parallel num_threads(n.threads)
    {
        std::vector<float> buffer((KEY_TILE + width) * QUERY_BLOCK + QUERY_BLOCK * width);
        float *scores = buffer.data(), *all = scores + KEY_TILE * QUERY_BLOCK, *match = all + width * QUERY_BLOCK;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < n.batch_size * blocks; unit++) {
            const int64_t b = unit / blocks, query = unit % blocks * QUERY_BLOCK;
            const Entry x = entry_of(n, b, query, q, keys, next_tokens, labels, visible_from, visible_until);
            alignas(64) float max[QUERY_BLOCK], sum[QUERY_BLOCK], match_sum[QUERY_BLOCK];
            for (int i = 0; i < QUERY_BLOCK; i++)
                max[i] = -INFINITY, sum[i] = match_sum[i] = 0.0f;
            memset(all, 0, 2 * width * QUERY_BLOCK * sizeof(float));
            int64_t low = 0, high = n.num_keys;
            trim_key_range(x.seen, low, high);
            for (int64_t key = low; key < high; key += KEY_TILE) {
                const int64_t count = high - key < KEY_TILE ? high - key : KEY_TILE;
                compute_scores(n, x, key, count, scores);
                for (int w = 0; w < QUERY_BLOCK; w += LANES) {
                    const Vector before = *(Vector *)(max + w);
                    Vector top = before;
                    for (int64_t i = 0; i < count; i++) {
                        const Vector score = *(Vector *)(scores + i * QUERY_BLOCK + w);
                        top = score > top ? score : top;
                    }
                    const Vector base = top == Vector{} - INFINITY ? Vector{} : top;
                    const Vector factor = vector_exp2(before - base);
                    *(Vector *)(max + w) = top;
                    *(Vector *)(sum + w) *= factor, *(Vector *)(match_sum + w) *= factor;
                    /* The maximum seldom changes after the first tile. */
                    for (int i = 0; direction && i < LANES; i++)
                        if (factor[i] != 1.0f)
                            for (int64_t d = 0; d < width; d++) {
                                all[d * QUERY_BLOCK + w + i] *= factor[i];
                                match[(w + i) * width + d] *= factor[i];
                            }
                    Vector tile_sum{}, tile_match{};
                    const IntVector label = *(const IntVector *)(x.labels + w);
                    for (int64_t i = 0; i < count; i++) {
                        Vector *score = (Vector *)(scores + i * QUERY_BLOCK + w);
                        const Vector weight = vector_exp2(*score - base);
                        *score = weight;
                        tile_sum += weight;
                        const IntVector is_match = label == x.next_tokens[key + i];
                        tile_match += (Vector)((IntVector)weight & is_match);
                    }
                    *(Vector *)(sum + w) += tile_sum, *(Vector *)(match_sum + w) += tile_match;
                }
                if (!direction)
                    continue;
                matmul(width, QUERY_BLOCK, count, x.keys + key * width, 1, width, scores, QUERY_BLOCK, all, QUERY_BLOCK,
                       true);
                for (int64_t i = 0; i < count; i++)
                    for (int w = 0; w < QUERY_BLOCK; w += LANES) {
                        const IntVector is_match =
                            *(const IntVector *)(x.labels + w) == x.next_tokens[key + i];
                        int32_t any = 0;
                        for (int m = 0; m < LANES; m++)
                            any |= is_match[m];
                        if (!any)
                            continue;
                        const float *k = x.keys + (key + i) * width;
                        for (int m = w; m < w + LANES; m++)
                            if (is_match[m - w])
                                for (int64_t d = 0; d < width; d++)
                                    match[m * width + d] += scores[i * QUERY_BLOCK + m] * k[d];
                    }
            }
            for (int m = 0; m < QUERY_BLOCK; m++) {
                const int64_t row = b * n.length + query + m;
                const float scale = sum[m] > 0.0f ? 1.0f / sum[m] : 0.0f, share = match_sum[m] * scale;
                copied[row] = share;
                best[row] = sum[m] > 0.0f ? max[m] / LOG2E : 0.0f;
                lse[row] = sum[m] > 0.0f ? max[m] + log2f(sum[m]) : 0.0f;
                for (int64_t d = 0; direction && d < width; d++)
                    direction[row * width + d] = (match[m * width + d] - share * all[d * QUERY_BLOCK + m]) * scale;
            }
        }
    }
}

/* Gradient of the keys from `first_key` on, (batch, num_keys - first_key, key_dim), given that of `copied`; `lines` are
   the queries as (batch, length, key_dim). */
extern "C" void memtx_copying_backward(const float *q, const float *keys, const int32_t *next_tokens,
                                       const int32_t *labels, const int32_t *visible_from,
                                       const int32_t *visible_until, const float *lines, const float *copied,
                                       const float *lse, const float *grad, float *grad_keys, const int64_t *sizes)
{
    const Shape n = *(const Shape *)sizes;
    const int64_t num_grads = n.num_keys - n.first_key, tiles = (num_grads + KEY_TILE - 1) / KEY_TILE;
#pragma omp parallel num_threads(n.threads)
    {
        std::vector<float> buffer(KEY_TILE * QUERY_BLOCK);
        float *scores = buffer.data();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < n.batch_size * tiles; unit++) {
            const int64_t b = unit / tiles, key = n.first_key + unit % tiles * KEY_TILE;
            const int64_t count = n.num_keys - key < KEY_TILE ? n.num_keys - key : KEY_TILE;
            float *out = grad_keys + (b * num_grads + key - n.first_key) * n.key_dim;
            memset(out, 0, count * n.key_dim * sizeof(float));
            for (int64_t query = 0; query < n.length; query += QUERY_BLOCK) {
                const Entry x = entry_of(n, b, query, q, keys, next_tokens, labels, visible_from, visible_until);
                int64_t low = key, high = key + count;
                trim_key_range(x.seen, low, high);
                if (low == high)
                    continue;
                compute_scores(n, x, key, count, scores);
                for (int w = 0; w < QUERY_BLOCK; w += LANES) {
                    const int64_t row = b * n.length + query + w;
                    const Vector g = *(const Vector *)(grad + row), share = *(const Vector *)(copied + row);
                    const Vector base = *(const Vector *)(lse + row), miss = -g * share;
                    const IntVector label = *(const IntVector *)(x.labels + w);
                    for (int64_t i = 0; i < count; i++) {
                        Vector *score = (Vector *)(scores + i * QUERY_BLOCK + w);
                        const IntVector is_match = label == x.next_tokens[key + i];
                        *score = vector_exp2(*score - base) * (miss + (Vector)((IntVector)g & is_match));
                    }
                }
                matmul(count, n.key_dim, QUERY_BLOCK, scores, QUERY_BLOCK, 1, lines + (b * n.length + query) * n.key_dim,
                       n.key_dim, out, n.key_dim, true);
            }
        }
    }
}
