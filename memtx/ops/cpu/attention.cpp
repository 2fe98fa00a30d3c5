/* Attention over keys with visibility intervals, in float32, forward and backward; attention.py calls it.

   Queries are the lanes of vectors: scores are stored as (keys, queries), so keys and values are read in place, one
   number at a time for all queries of a block, and the softmax needs no operation across lanes. */
#include "visibility.h"

#define MAX_HEAD_DIM 256 /* maximum head dimension */

struct Strides {
    int64_t batch, head, token;
};

struct Shape {
    int64_t batch_size, heads, kv_heads, num_queries, head_dim, key_ranges;
    int64_t interval_stride, offset_stride; /* strides of intervals and key offsets between batch entries; 0 if shared */
    int64_t num_splits, split_stride;       /* parts of the queries for the gradients of keys and values */
    int64_t threads;
};

/* Transpose (count, width) to (width, QUERY_BLOCK), times `factor`; zeros after the last query. */
static void transpose_scaled(const float *x, int64_t stride, int64_t count, int64_t width, float factor, float *out)
{
    for (int64_t m = 0; m < QUERY_BLOCK; m++)
        for (int64_t d = 0; d < width; d++)
            out[d * QUERY_BLOCK + m] = m < count ? x[m * stride + d] * factor : 0.0f;
}

static KeyInfo make_key_info(const int32_t *visible_from, const int32_t *visible_until, const float *slopes,
                             const float *key_offset, const Shape &shape, int64_t batch, int64_t head, int64_t first)
{
    return {visible_from + batch * shape.interval_stride, visible_until + batch * shape.interval_stride,
            key_offset ? key_offset + batch * shape.offset_stride : nullptr, slopes ? slopes[head] * LOG2E : 0.0f,
            (int32_t)first};
}

/* Online softmax of a tile: scores become weights, and the sums are rescaled to the new maximum (Milakov and
   Gimelshein 2018). */
static void update_online_softmax(float *scores, int64_t n, float *row_max, float *row_sum, float *acc, int64_t width)
{
    const Vector minus_inf = Vector{} - INFINITY;
    for (int w = 0; w < QUERY_BLOCK; w += LANES) {
        const Vector before = *(Vector *)(row_max + w);
        Vector max = before;
        for (int64_t i = 0; i < n; i++) {
            const Vector score = *(Vector *)(scores + i * QUERY_BLOCK + w);
            max = score > max ? score : max;
        }
        /* The maximum of a query that has seen no key yet counts as 0. */
        const Vector base = max == minus_inf ? Vector{} : max;
        Vector sum{};
        for (int64_t i = 0; i < n; i++) {
            Vector *score = (Vector *)(scores + i * QUERY_BLOCK + w);
            *score = vector_exp2(*score - base);
            sum += *score;
        }
        const Vector rescale = vector_exp2(before - base);
        *(Vector *)(row_sum + w) = *(Vector *)(row_sum + w) * rescale + sum;
        *(Vector *)(row_max + w) = max;
        for (int64_t d = 0; d < width; d++)
            *(Vector *)(acc + d * QUERY_BLOCK + w) *= rescale;
    }
}

extern "C" void memtx_attention_forward(const float *q, const float *k, const float *v, float *out, float *lse,
                                        const int32_t *visible_from, const int32_t *visible_until,
                                        const int32_t *key_bounds, const float *slopes, const float *key_offset,
                                        const Shape *shape_ptr, const Strides *strides, float scale)
{
    const Shape shape = *shape_ptr;
    const Strides sq = strides[0], sk = strides[1], sv = strides[2], so = strides[3];
    const int64_t blocks = (shape.num_queries + QUERY_BLOCK - 1) / QUERY_BLOCK, group = shape.heads / shape.kv_heads;
#pragma omp parallel num_threads(shape.threads)
    {
        alignas(64) float q_t[MAX_HEAD_DIM * QUERY_BLOCK], acc[MAX_HEAD_DIM * QUERY_BLOCK],
            weights[KEY_TILE * QUERY_BLOCK];
        alignas(64) float row_max[QUERY_BLOCK], row_sum[QUERY_BLOCK];
#pragma omp for schedule(dynamic, 4)
        for (int64_t item = 0; item < shape.batch_size * shape.heads * blocks; item++) {
            const int64_t block = item % blocks, head = item / blocks % shape.heads;
            const int64_t batch = item / blocks / shape.heads, first = block * QUERY_BLOCK;
            const int64_t count = shape.num_queries - first < QUERY_BLOCK ? shape.num_queries - first : QUERY_BLOCK;
            const float *k_head = k + batch * sk.batch + head / group * sk.head;
            const float *v_head = v + batch * sv.batch + head / group * sv.head;
            const KeyInfo keys =
                make_key_info(visible_from, visible_until, slopes, key_offset, shape, batch, head, first);
            transpose_scaled(q + batch * sq.batch + head * sq.head + first * sq.token, sq.token, count, shape.head_dim,
                             scale * LOG2E, q_t);
            memset(acc, 0, shape.head_dim * QUERY_BLOCK * sizeof(float));
            for (int m = 0; m < QUERY_BLOCK; m++)
                row_max[m] = -INFINITY, row_sum[m] = 0.0f;
            for (int64_t range = 0; range < shape.key_ranges; range++) {
                int64_t low = key_bounds[(block * shape.key_ranges + range) * 2];
                int64_t high = key_bounds[(block * shape.key_ranges + range) * 2 + 1];
                for (trim_key_range(keys, low, high); low < high; low += KEY_TILE) {
                    const int64_t n = high - low < KEY_TILE ? high - low : KEY_TILE;
                    matmul(n, QUERY_BLOCK, shape.head_dim, k_head + low * sk.token, sk.token, 1, q_t, QUERY_BLOCK,
                           weights, QUERY_BLOCK, false);
                    apply_bias_and_mask(weights, n, low, keys);
                    update_online_softmax(weights, n, row_max, row_sum, acc, shape.head_dim);
                    matmul(shape.head_dim, QUERY_BLOCK, n, v_head + low * sv.token, 1, sv.token, weights, QUERY_BLOCK,
                           acc, QUERY_BLOCK, true);
                }
            }
            for (int64_t m = 0; m < count; m++) {
                float *dst = out + batch * so.batch + head * so.head + (first + m) * so.token;
                const bool fully_masked = row_sum[m] == 0.0f;
                const float factor = fully_masked ? 0.0f : 1.0f / row_sum[m];
                for (int64_t d = 0; d < shape.head_dim; d++)
                    dst[d] = acc[d * QUERY_BLOCK + m] * factor;
                lse[(batch * shape.heads + head) * shape.num_queries + first + m] =
                    fully_masked ? -INFINITY : row_max[m] / LOG2E + logf(row_sum[m]);
            }
        }
    }
}

/* Gradients, with the weights recomputed from the log-sum-exp (FlashAttention-2, Dao 2023, section 3.1.2). A thread
   processes all queries of a key head, or one part of them, so it is the only one to add to its gradients. */
extern "C" void memtx_attention_backward(const float *q, const float *k, const float *v, const float *out,
                                         const float *grad_out, const float *lse, const float *grad_lse, float *dq,
                                         float *dk, float *dv, const int32_t *visible_from,
                                         const int32_t *visible_until, const int32_t *key_bounds, const float *slopes,
                                         const float *key_offset, const Shape *shape_ptr, const Strides *strides,
                                         float scale)
{
    const Shape shape = *shape_ptr;
    const Strides sq = strides[0], sk = strides[1], sv = strides[2], so = strides[3], sg = strides[4];
    const Strides sdq = strides[5], sdk = strides[6], sdv = strides[7];
    const int64_t blocks = (shape.num_queries + QUERY_BLOCK - 1) / QUERY_BLOCK, group = shape.heads / shape.kv_heads;
    const int64_t blocks_per_split = (blocks + shape.num_splits - 1) / shape.num_splits, width = shape.head_dim;
#pragma omp parallel num_threads(shape.threads)
    {
        alignas(64) float q_t[MAX_HEAD_DIM * QUERY_BLOCK], grad_out_t[MAX_HEAD_DIM * QUERY_BLOCK],
            acc[MAX_HEAD_DIM * QUERY_BLOCK];
        alignas(64) float weights[KEY_TILE * QUERY_BLOCK], grad_scores[KEY_TILE * QUERY_BLOCK], row_lse[QUERY_BLOCK],
            delta[QUERY_BLOCK];
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < shape.batch_size * shape.kv_heads * shape.num_splits; item++) {
            const int64_t split = item % shape.num_splits, kv_head = item / shape.num_splits % shape.kv_heads;
            const int64_t batch = item / shape.num_splits / shape.kv_heads;
            const int64_t last = (split + 1) * blocks_per_split < blocks ? (split + 1) * blocks_per_split : blocks;
            const float *k_head = k + batch * sk.batch + kv_head * sk.head;
            const float *v_head = v + batch * sv.batch + kv_head * sv.head;
            float *dk_head = dk + split * shape.split_stride + batch * sdk.batch + kv_head * sdk.head;
            float *dv_head = dv + split * shape.split_stride + batch * sdv.batch + kv_head * sdv.head;
            for (int64_t step = 0; step < group * (last - split * blocks_per_split); step++) {
                const int64_t head = kv_head * group + step % group, block = split * blocks_per_split + step / group;
                const int64_t first = block * QUERY_BLOCK,
                              row_start = (batch * shape.heads + head) * shape.num_queries + first;
                const int64_t count = shape.num_queries - first < QUERY_BLOCK ? shape.num_queries - first : QUERY_BLOCK;
                const float *q_block = q + batch * sq.batch + head * sq.head + first * sq.token;
                const float *grad_out_block = grad_out + batch * sg.batch + head * sg.head + first * sg.token;
                const float *out_block = out + batch * so.batch + head * so.head + first * so.token;
                const KeyInfo keys =
                    make_key_info(visible_from, visible_until, slopes, key_offset, shape, batch, head, first);
                transpose_scaled(q_block, sq.token, count, width, scale * LOG2E, q_t);
                transpose_scaled(grad_out_block, sg.token, count, width, 1.0f, grad_out_t);
                memset(acc, 0, width * QUERY_BLOCK * sizeof(float));
                for (int64_t m = 0; m < QUERY_BLOCK; m++) {
                    float sum = 0.0f;
                    row_lse[m] = 0.0f;
                    if (m < count) {
                        /* A fully masked query has no weights. */
                        row_lse[m] = lse[row_start + m] == -INFINITY ? 0.0f : lse[row_start + m] * LOG2E;
                        for (int64_t d = 0; d < width; d++)
                            sum += grad_out_block[m * sg.token + d] * out_block[m * so.token + d];
                        sum -= grad_lse ? grad_lse[row_start + m] : 0.0f;
                    }
                    delta[m] = sum * scale;
                }
                for (int64_t range = 0; range < shape.key_ranges; range++) {
                    int64_t low = key_bounds[(block * shape.key_ranges + range) * 2];
                    int64_t high = key_bounds[(block * shape.key_ranges + range) * 2 + 1];
                    for (trim_key_range(keys, low, high); low < high; low += KEY_TILE) {
                        const int64_t n = high - low < KEY_TILE ? high - low : KEY_TILE;
                        matmul(n, QUERY_BLOCK, width, k_head + low * sk.token, sk.token, 1, q_t, QUERY_BLOCK, weights,
                               QUERY_BLOCK, false);
                        apply_bias_and_mask(weights, n, low, keys);
                        matmul(n, QUERY_BLOCK, width, v_head + low * sv.token, sv.token, 1, grad_out_t, QUERY_BLOCK,
                               grad_scores, QUERY_BLOCK, false);
                        for (int w = 0; w < QUERY_BLOCK; w += LANES) {
                            const Vector base = *(Vector *)(row_lse + w), row_delta = *(Vector *)(delta + w);
                            for (int64_t i = 0; i < n; i++) {
                                Vector *weight = (Vector *)(weights + i * QUERY_BLOCK + w);
                                Vector *grad_score = (Vector *)(grad_scores + i * QUERY_BLOCK + w);
                                *weight = vector_exp2(*weight - base);
                                *grad_score = *weight * (*grad_score * scale - row_delta);
                            }
                        }
                        matmul(width, QUERY_BLOCK, n, k_head + low * sk.token, 1, sk.token, grad_scores, QUERY_BLOCK,
                               acc, QUERY_BLOCK, true);
                        matmul(n, width, count, weights, QUERY_BLOCK, 1, grad_out_block, sg.token,
                               dv_head + low * sdv.token, sdv.token, true);
                        matmul(n, width, count, grad_scores, QUERY_BLOCK, 1, q_block, sq.token,
                               dk_head + low * sdk.token, sdk.token, true);
                    }
                }
                float *dst = dq + batch * sdq.batch + head * sdq.head + first * sdq.token;
                for (int64_t m = 0; m < count; m++)
                    for (int64_t d = 0; d < width; d++)
                        dst[m * sdq.token + d] = acc[d * QUERY_BLOCK + m];
            }
        }
    }
}
