/* Attention over keys with lifetimes, in float32, forward and backward; native.py calls it and says what it is for.

   Queries lie along the lanes of vectors: scores are kept as (keys, queries), so keys and values are read where they
   lie, a number at a time for all queries of a block, and the softmax needs nothing across lanes. Every product is of
   one form, C[r][lane] += sum_k A(r, k) B[k][lane], with A read by two strides and C held in registers: 24 vectors of
   32 with AVX-512, 12 of 16 with AVX2. */
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12
#define WIDEST 4
#else
#define LANES 8
#define ROWS 6
#define WIDEST 2
#endif
#define QUERIES 32 /* a block */
#define KEYS 96    /* a tile: with its scores twice, keys and values it stays in the second cache */
#define WIDTH 256  /* of a head at most */
#define LOG2E 1.4426950408889634f

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

struct Strides {
    int64_t row, head, at;
};

struct Shape {
    int64_t rows, heads, kv_heads, queries, width, sections;
    int64_t life_row, tick_row; /* from one row's lifetimes, and places, to the next one's; 0 where all are alike */
    int64_t parts, part_size;   /* into which queries are cut for the gradients of keys and values */
    int64_t threads;
};

/* What a block of queries needs to know of the keys. */
struct Keys {
    const int32_t *born, *expires; /* of one row */
    const float *tick;             /* where keys stand; null without a bias */
    float slope;                   /* what a tick of distance costs, in base 2 */
    int32_t first;                 /* the block's first query */
};

template <int rows, int wide>
static inline void tile(int64_t depth, const float *a, int64_t a_row, int64_t a_at, const float *b, int64_t b_at,
                        float *c, int64_t c_row, bool add)
{
    Vector sum[rows][wide];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++)
            sum[r][w] = add ? *(const Vector *)(c + r * c_row + w * LANES) : Vector{};
    for (int64_t k = 0; k < depth; k++) {
        Vector line[wide];
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++)
            line[w] = *(const Vector *)(b + k * b_at + w * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const float one = a[r * a_row + k * a_at];
#pragma GCC unroll 4
            for (int w = 0; w < wide; w++)
                sum[r][w] += one * line[w];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++)
            *(Vector *)(c + r * c_row + w * LANES) = sum[r][w];
}

template <int most, int wide>
static void stripe(int64_t rows, int64_t depth, const float *a, int64_t a_row, int64_t a_at, const float *b,
                   int64_t b_at, float *c, int64_t c_row, bool add)
{
    int64_t r = 0;
    for (; r + most <= rows; r += most)
        tile<most, wide>(depth, a + r * a_row, a_row, a_at, b, b_at, c + r * c_row, c_row, add);
    for (; r + most / 3 <= rows; r += most / 3)
        tile<most / 3, wide>(depth, a + r * a_row, a_row, a_at, b, b_at, c + r * c_row, c_row, add);
    for (; r < rows; r++)
        tile<1, wide>(depth, a + r * a_row, a_row, a_at, b, b_at, c + r * c_row, c_row, add);
}

/* C (rows, lanes) = or += A (rows, depth) B (depth, lanes); lanes a multiple of LANES. */
static void product(int64_t rows, int64_t lanes, int64_t depth, const float *a, int64_t a_row, int64_t a_at,
                    const float *b, int64_t b_at, float *c, int64_t c_row, bool add)
{
    int64_t at = 0;
#if WIDEST == 4
    for (; at + 4 * LANES <= lanes; at += 4 * LANES)
        stripe<ROWS / 2, 4>(rows, depth, a, a_row, a_at, b + at, b_at, c + at, c_row, add);
#endif
    for (; at + 2 * LANES <= lanes; at += 2 * LANES)
        stripe<ROWS, 2>(rows, depth, a, a_row, a_at, b + at, b_at, c + at, c_row, add);
    for (; at < lanes; at += LANES)
        stripe<ROWS, 1>(rows, depth, a, a_row, a_at, b + at, b_at, c + at, c_row, add);
}

/* 2^x to float32's precision; exactly 0 from -127 down, and nan stays nan. */
static inline Vector power_of_two(Vector x)
{
    const Vector least = Vector{} - 127.0f, magic = Vector{} + 12582912.0f; /* 1.5 2^23: rounds to whole numbers */
    x = x < least ? least : x;
    const Vector shifted = x + magic, f = x - (shifted - magic);
    Vector p = Vector{} + 1.535336188319500e-4f; /* the series of 2^f = e^(f ln 2), |f| <= 1/2 */
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const Whole exponent = ((Whole)shifted + 127) << 23;
    return p * (Vector)exponent;
}

/* Whether any query of the block sees the key. */
static inline bool met(const Keys &keys, int64_t key)
{
    return keys.born[key] < keys.first + QUERIES && keys.expires[key] > keys.first;
}

/* Move the bounds [low, high) inward past keys that nobody of the block sees. */
static inline void trim(const Keys &keys, int64_t &low, int64_t &high)
{
    while (low < high && !met(keys, low))
        low++;
    while (low < high && !met(keys, high - 1))
        high--;
}

/* Add the bias to scores (n, QUERIES) of the keys from `low` on; minus infinity where a query does not see a key. */
static void masked(float *scores, int64_t n, int64_t low, const Keys &keys)
{
    const Vector never = Vector{} - INFINITY;
    Whole lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    for (int64_t i = 0; i < n; i++) {
        const int32_t born = keys.born[low + i], expires = keys.expires[low + i];
        const bool by_all = born <= keys.first && expires >= keys.first + QUERIES;
        if (by_all && !keys.tick)
            continue;
        for (int w = 0; w < QUERIES; w += LANES) {
            const Whole tick = lane + (keys.first + w);
            Vector *at = (Vector *)(scores + i * QUERIES + w);
            if (keys.tick)
                *at -= (__builtin_convertvector(tick, Vector) - keys.tick[low + i]) * keys.slope;
            if (!by_all)
                *at = born <= tick ? (tick < expires ? *at : never) : never;
        }
    }
}

/* (count, width) in rows -> (width, QUERIES), times `by`; zeros for queries that are not there. */
static void turned(const float *x, int64_t at, int64_t count, int64_t width, float by, float *out)
{
    for (int64_t m = 0; m < QUERIES; m++)
        for (int64_t d = 0; d < width; d++)
            out[d * QUERIES + m] = m < count ? x[m * at + d] * by : 0.0f;
}

static Keys keys_of(const int32_t *born, const int32_t *expires, const float *slopes, const float *tick,
                    const Shape &shape, int64_t row, int64_t head, int64_t first)
{
    return {born + row * shape.life_row, expires + row * shape.life_row, tick ? tick + row * shape.tick_row : nullptr,
            slopes ? slopes[head] * LOG2E : 0.0f, (int32_t)first};
}

/* One block's softmax over a tile, in one sweep after the other: scores become weights, and what was summed shrinks
   by as much as the highest score has grown (Milakov and Gimelshein 2018). */
static void weighed(float *scores, int64_t n, float *top, float *total, float *summed, int64_t width)
{
    const Vector never = Vector{} - INFINITY;
    for (int w = 0; w < QUERIES; w += LANES) {
        const Vector before = *(Vector *)(top + w);
        Vector most = before;
        for (int64_t i = 0; i < n; i++) {
            const Vector score = *(Vector *)(scores + i * QUERIES + w);
            most = score > most ? score : most;
        }
        /* What has seen nothing yet is measured from 0. */
        const Vector base = most == never ? Vector{} : most;
        Vector sum{};
        for (int64_t i = 0; i < n; i++) {
            Vector *score = (Vector *)(scores + i * QUERIES + w);
            *score = power_of_two(*score - base);
            sum += *score;
        }
        const Vector shrink = power_of_two(before - base);
        *(Vector *)(total + w) = *(Vector *)(total + w) * shrink + sum;
        *(Vector *)(top + w) = most;
        for (int64_t d = 0; d < width; d++)
            *(Vector *)(summed + d * QUERIES + w) *= shrink;
    }
}

extern "C" void memtx_attention_forward(const float *q, const float *k, const float *v, float *out, float *lse,
                                        const int32_t *born, const int32_t *expires, const int32_t *ranges,
                                        const float *slopes, const float *tick, const Shape *given,
                                        const Strides *strides, float scale)
{
    const Shape shape = *given;
    const Strides sq = strides[0], sk = strides[1], sv = strides[2], so = strides[3];
    const int64_t blocks = (shape.queries + QUERIES - 1) / QUERIES, group = shape.heads / shape.kv_heads;
#pragma omp parallel num_threads(shape.threads)
    {
        alignas(64) float asked[WIDTH * QUERIES], summed[WIDTH * QUERIES], weights[KEYS * QUERIES];
        alignas(64) float top[QUERIES], total[QUERIES];
#pragma omp for schedule(dynamic, 4)
        for (int64_t item = 0; item < shape.rows * shape.heads * blocks; item++) {
            const int64_t block = item % blocks, head = item / blocks % shape.heads;
            const int64_t row = item / blocks / shape.heads, first = block * QUERIES;
            const int64_t count = shape.queries - first < QUERIES ? shape.queries - first : QUERIES;
            const float *own_keys = k + row * sk.row + head / group * sk.head;
            const float *own_values = v + row * sv.row + head / group * sv.head;
            const Keys keys = keys_of(born, expires, slopes, tick, shape, row, head, first);
            turned(q + row * sq.row + head * sq.head + first * sq.at, sq.at, count, shape.width, scale * LOG2E, asked);
            memset(summed, 0, shape.width * QUERIES * sizeof(float));
            for (int m = 0; m < QUERIES; m++)
                top[m] = -INFINITY, total[m] = 0.0f;
            for (int64_t section = 0; section < shape.sections; section++) {
                int64_t low = ranges[(block * shape.sections + section) * 2];
                int64_t high = ranges[(block * shape.sections + section) * 2 + 1];
                for (trim(keys, low, high); low < high; low += KEYS) {
                    const int64_t n = high - low < KEYS ? high - low : KEYS;
                    product(n, QUERIES, shape.width, own_keys + low * sk.at, sk.at, 1, asked, QUERIES, weights, QUERIES,
                            false);
                    masked(weights, n, low, keys);
                    weighed(weights, n, top, total, summed, shape.width);
                    product(shape.width, QUERIES, n, own_values + low * sv.at, 1, sv.at, weights, QUERIES, summed,
                            QUERIES, true);
                }
            }
            for (int64_t m = 0; m < count; m++) {
                float *to = out + row * so.row + head * so.head + (first + m) * so.at;
                const bool blind = total[m] == 0.0f;
                const float by = blind ? 0.0f : 1.0f / total[m];
                for (int64_t d = 0; d < shape.width; d++)
                    to[d] = summed[d * QUERIES + m] * by;
                lse[(row * shape.heads + head) * shape.queries + first + m] =
                    blind ? -INFINITY : top[m] / LOG2E + logf(total[m]);
            }
        }
    }
}

/* Gradients by the weights made again from the log-sum-exp (FlashAttention-2, Dao 2023, section 3.1.2). A thread has
   all queries of a row's key head, or a part of them, and so adds to gradients of its own alone. */
extern "C" void memtx_attention_backward(const float *q, const float *k, const float *v, const float *out,
                                         const float *grad, const float *lse, const float *grad_lse, float *dq,
                                         float *dk, float *dv, const int32_t *born, const int32_t *expires,
                                         const int32_t *ranges, const float *slopes, const float *tick,
                                         const Shape *given, const Strides *strides, float scale)
{
    const Shape shape = *given;
    const Strides sq = strides[0], sk = strides[1], sv = strides[2], so = strides[3], sg = strides[4];
    const Strides sdq = strides[5], sdk = strides[6], sdv = strides[7];
    const int64_t blocks = (shape.queries + QUERIES - 1) / QUERIES, group = shape.heads / shape.kv_heads;
    const int64_t a_part = (blocks + shape.parts - 1) / shape.parts, width = shape.width;
#pragma omp parallel num_threads(shape.threads)
    {
        alignas(64) float asked[WIDTH * QUERIES], told[WIDTH * QUERIES], summed[WIDTH * QUERIES];
        alignas(64) float weights[KEYS * QUERIES], change[KEYS * QUERIES], own[QUERIES], balance[QUERIES];
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < shape.rows * shape.kv_heads * shape.parts; item++) {
            const int64_t part = item % shape.parts, kv_head = item / shape.parts % shape.kv_heads;
            const int64_t row = item / shape.parts / shape.kv_heads;
            const int64_t last = (part + 1) * a_part < blocks ? (part + 1) * a_part : blocks;
            const float *own_keys = k + row * sk.row + kv_head * sk.head;
            const float *own_values = v + row * sv.row + kv_head * sv.head;
            float *to_keys = dk + part * shape.part_size + row * sdk.row + kv_head * sdk.head;
            float *to_values = dv + part * shape.part_size + row * sdv.row + kv_head * sdv.head;
            for (int64_t step = 0; step < group * (last - part * a_part); step++) {
                const int64_t head = kv_head * group + step % group, block = part * a_part + step / group;
                const int64_t first = block * QUERIES, place = (row * shape.heads + head) * shape.queries + first;
                const int64_t count = shape.queries - first < QUERIES ? shape.queries - first : QUERIES;
                const float *asks = q + row * sq.row + head * sq.head + first * sq.at;
                const float *tells = grad + row * sg.row + head * sg.head + first * sg.at;
                const float *made = out + row * so.row + head * so.head + first * so.at;
                const Keys keys = keys_of(born, expires, slopes, tick, shape, row, head, first);
                turned(asks, sq.at, count, width, scale * LOG2E, asked);
                turned(tells, sg.at, count, width, 1.0f, told);
                memset(summed, 0, width * QUERIES * sizeof(float));
                for (int64_t m = 0; m < QUERIES; m++) {
                    float sum = 0.0f;
                    own[m] = 0.0f;
                    if (m < count) {
                        /* A query that sees nothing has no weights to be measured. */
                        own[m] = lse[place + m] == -INFINITY ? 0.0f : lse[place + m] * LOG2E;
                        for (int64_t d = 0; d < width; d++)
                            sum += tells[m * sg.at + d] * made[m * so.at + d];
                        sum -= grad_lse ? grad_lse[place + m] : 0.0f;
                    }
                    balance[m] = sum * scale;
                }
                for (int64_t section = 0; section < shape.sections; section++) {
                    int64_t low = ranges[(block * shape.sections + section) * 2];
                    int64_t high = ranges[(block * shape.sections + section) * 2 + 1];
                    for (trim(keys, low, high); low < high; low += KEYS) {
                        const int64_t n = high - low < KEYS ? high - low : KEYS;
                        product(n, QUERIES, width, own_keys + low * sk.at, sk.at, 1, asked, QUERIES, weights, QUERIES,
                                false);
                        masked(weights, n, low, keys);
                        product(n, QUERIES, width, own_values + low * sv.at, sv.at, 1, told, QUERIES, change, QUERIES,
                                false);
                        for (int w = 0; w < QUERIES; w += LANES) {
                            const Vector base = *(Vector *)(own + w), less = *(Vector *)(balance + w);
                            for (int64_t i = 0; i < n; i++) {
                                Vector *weight = (Vector *)(weights + i * QUERIES + w);
                                Vector *moved = (Vector *)(change + i * QUERIES + w);
                                *weight = power_of_two(*weight - base);
                                *moved = *weight * (*moved * scale - less);
                            }
                        }
                        product(width, QUERIES, n, own_keys + low * sk.at, 1, sk.at, change, QUERIES, summed, QUERIES,
                                true);
                        product(n, width, count, weights, QUERIES, 1, tells, sg.at, to_values + low * sdv.at, sdv.at,
                                true);
                        product(n, width, count, change, QUERIES, 1, asks, sq.at, to_keys + low * sdk.at, sdk.at, true);
                    }
                }
                float *to = dq + row * sdq.row + head * sdq.head + first * sdq.at;
                for (int64_t m = 0; m < count; m++)
                    for (int64_t d = 0; d < width; d++)
                        to[m * sdq.at + d] = summed[d * QUERIES + m];
            }
        }
    }
}
