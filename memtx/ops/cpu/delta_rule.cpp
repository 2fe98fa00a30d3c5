/* The gated delta rule in float32, token by token, forward and backward; delta_rule.py calls it.

   Columns of the matrix are independent given keys and gates, so they are the lanes of vectors, and the rows of a group
   of columns stay in the L1 cache. Products with the matrix need one pass that reads it and one that updates it:

       p = S'k,  r = S'q,  u = b (v - a p),  o = a r + (k q) u,  S <- a S + k u'

   The backward pass recomputes the matrices of a chunk from the one before it. Sums over columns, such as the gradient
   of a query, are reduced for a vector of rows at a time. */
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define CHUNK 32 /* tokens between two stored matrices */

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Index __attribute__((vector_size(4 * LANES)));

struct Shape {
    int64_t batch_size, heads, key_heads, length, key_dim, value_dim;
    int64_t decay_dim;  /* 0 without decay, 1 per head, key_dim per channel */
    int64_t delta_rule; /* 0 for linear attention */
    int64_t threads;
};

/* Strides in floats of (batch, head, token), the last dimension being contiguous. */
struct Strides {
    int64_t batch, head, token;
};

struct Inputs {
    const float *q, *k, *v, *beta, *log_decay;
    const uint8_t *starts; /* (batch, length) */
    Strides qs, ks, vs, bs, ds;
};

static inline float *row(float *x, Strides s, int64_t b, int64_t h, int64_t t)
{
    return x + b * s.batch + h * s.head + t * s.token;
}

static inline const float *row(const float *x, Strides s, int64_t b, int64_t h, int64_t t)
{
    return x + b * s.batch + h * s.head + t * s.token;
}

/* The decays of a token, one per row of the matrix. */
static inline void load_decay(const Shape &n, const Inputs &in, int64_t b, int64_t h, int64_t t, float *decay)
{
    if (in.starts[b * n.length + t]) {
        for (int64_t i = 0; i < n.key_dim; i++)
            decay[i] = 0.0f;
        return;
    }
    if (n.decay_dim == 0) {
        for (int64_t i = 0; i < n.key_dim; i++)
            decay[i] = 1.0f;
        return;
    }
    const float *log_decay = row(in.log_decay, in.ds, b, h, t);
    if (n.decay_dim == 1) {
        const float a = expf(log_decay[0]);
        for (int64_t i = 0; i < n.key_dim; i++)
            decay[i] = a;
    } else {
        for (int64_t i = 0; i < n.key_dim; i++)
            decay[i] = expf(log_decay[i]);
    }
}

/* One token of one group of columns: updates the matrix, (key_dim, LANES), and returns the write u. */
static inline Vector advance(const Shape &n, const float *q, const float *k, Vector v, float beta, const float *decay,
                             float *matrix, float *next, Vector *out)
{
    Vector p[2] = {}, r[2] = {};
    float kq = 0.0f;
    for (int64_t i = 0; i < n.key_dim; i++) {
        const Vector s = *(const Vector *)(matrix + i * LANES) * decay[i];
        p[i & 1] += s * k[i];
        r[i & 1] += s * q[i];
        kq += k[i] * q[i];
    }
    const Vector u = n.delta_rule ? beta * (v - (p[0] + p[1])) : beta * v;
    *out = r[0] + r[1] + kq * u;
    for (int64_t i = 0; i < n.key_dim; i++)
        *(Vector *)(next + i * LANES) = *(const Vector *)(matrix + i * LANES) * decay[i] + k[i] * u;
    return u;
}

static inline void load_matrix(const Shape &n, const float *matrix, int64_t column, float *group)
{
    for (int64_t i = 0; i < n.key_dim; i++)
        *(Vector *)(group + i * LANES) = *(const Vector *)(matrix + i * n.value_dim + column);
}

static inline void store_matrix(const Shape &n, const float *group, int64_t column, float *matrix)
{
    for (int64_t i = 0; i < n.key_dim; i++)
        *(Vector *)(matrix + i * n.value_dim + column) = *(const Vector *)(group + i * LANES);
}

extern "C" void memtx_delta_rule_forward(const float *q, const float *k, const float *v, const float *beta,
                                         const float *log_decay, const uint8_t *starts, const float *state, float *out,
                                         float *next_state, float *checkpoints, const int64_t *sizes,
                                         const int64_t *strides)
{
    const Shape n = *(const Shape *)sizes;
    const Strides *s = (const Strides *)strides;
    const Inputs in = {q, k, v, beta, log_decay, starts, s[0], s[1], s[2], s[3], s[4]};
    const Strides os = s[5];
    const int64_t groups = n.value_dim / LANES, area = n.key_dim * n.value_dim;
    const int64_t chunks = (n.length + CHUNK - 1) / CHUNK, ratio = n.heads / n.key_heads;
#pragma omp parallel for num_threads(n.threads) schedule(dynamic)
    for (int64_t unit = 0; unit < n.batch_size * n.heads * groups; unit++) {
        const int64_t column = unit % groups * LANES, h = unit / groups % n.heads, b = unit / groups / n.heads;
        std::vector<float> matrix(n.key_dim * LANES), decay(n.key_dim);
        load_matrix(n, state + (b * n.heads + h) * area, column, matrix.data());
        for (int64_t t = 0; t < n.length; t++) {
            if (checkpoints && t % CHUNK == 0)
                store_matrix(n, matrix.data(), column,
                             checkpoints + ((b * n.heads + h) * chunks + t / CHUNK) * area);
            load_decay(n, in, b, h, t, decay.data());
            const Vector value = *(const Vector *)(row(v, in.vs, b, h, t) + column);
            Vector read;
            advance(n, row(q, in.qs, b, h / ratio, t), row(k, in.ks, b, h / ratio, t), value,
                    *row(beta, in.bs, b, h, t), decay.data(), matrix.data(), matrix.data(), &read);
            *(Vector *)(row(out, os, b, h, t) + column) = read;
        }
        store_matrix(n, matrix.data(), column, next_state + (b * n.heads + h) * area);
    }
}

static inline Vector fold(Vector x, Vector y, int half)
{
    /* Lanes of the result: sums of pairs `half` apart of x in the lanes without that bit, of y in the others. */
    Index low, high;
    for (int lane = 0; lane < LANES; lane++) {
        const int source = lane & half ? LANES + (lane & ~half) : lane;
        low[lane] = source;
        high[lane] = source + half;
    }
    return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high);
}

/* Adds the sum over the lanes of each of LANES vectors to target[0..LANES). */
static inline void add_lane_sums(Vector *rows, float *target)
{
#pragma GCC unroll 4
    for (int half = 1; half < LANES; half *= 2)
        for (int i = 0; i < LANES; i += 2 * half)
            rows[i] = fold(rows[i], rows[i + half], half);
    *(Vector *)target += rows[0];
}

static inline float sum_lanes(Vector x)
{
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; lane++)
        sum += x[lane];
    return sum;
}

extern "C" void memtx_delta_rule_backward(const float *q, const float *k, const float *v, const float *beta,
                                          const float *log_decay, const uint8_t *starts, const float *checkpoints,
                                          const float *grad_out, const float *grad_next, float *grad_q, float *grad_k,
                                          float *grad_v, float *grad_beta, float *grad_decay, float *grad_state,
                                          const int64_t *sizes, const int64_t *strides)
{
    const Shape n = *(const Shape *)sizes;
    const Strides *s = (const Strides *)strides;
    const Inputs in = {q, k, v, beta, log_decay, starts, s[0], s[1], s[2], s[3], s[4]};
    const Strides gos = s[5], gqs = s[6], gks = s[7], gvs = s[8], gbs = s[9], gds = s[10];
    const int64_t area = n.key_dim * n.value_dim, group_area = n.key_dim * LANES;
    const int64_t chunks = (n.length + CHUNK - 1) / CHUNK, ratio = n.heads / n.key_heads;
    /* Heads that share keys are one unit, since they add to the same gradients. */
#pragma omp parallel for num_threads(n.threads) schedule(dynamic)
    for (int64_t unit = 0; unit < n.batch_size * n.key_heads; unit++) {
        const int64_t b = unit / n.key_heads, kh = unit % n.key_heads;
        std::vector<float> matrices((CHUNK + 1) * group_area), grad(group_area), decays(CHUNK * n.key_dim);
        std::vector<float> writes(CHUNK * LANES);
        for (int64_t h = kh * ratio; h < (kh + 1) * ratio; h++)
            for (int64_t column = 0; column < n.value_dim; column += LANES) {
                load_matrix(n, grad_next + (b * n.heads + h) * area, column, grad.data());
                for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
                    const int64_t first = chunk * CHUNK, last = first + CHUNK < n.length ? first + CHUNK : n.length;
                    load_matrix(n, checkpoints + ((b * n.heads + h) * chunks + chunk) * area, column, matrices.data());
                    for (int64_t t = first; t < last; t++) {
                        float *matrix = matrices.data() + (t - first) * group_area, *decay = &decays[(t - first) * n.key_dim];
                        load_decay(n, in, b, h, t, decay);
                        Vector read;
                        const Vector value = *(const Vector *)(row(v, in.vs, b, h, t) + column);
                        *(Vector *)&writes[(t - first) * LANES] =
                            advance(n, row(q, in.qs, b, kh, t), row(k, in.ks, b, kh, t), value,
                                    *row(beta, in.bs, b, h, t), decay, matrix, matrix + group_area, &read);
                    }
                    for (int64_t t = last - 1; t >= first; t--) {
                        const float *before = matrices.data() + (t - first) * group_area, *after = before + group_area;
                        const float *decay = &decays[(t - first) * n.key_dim];
                        const float *query = row(q, in.qs, b, kh, t), *key = row(k, in.ks, b, kh, t);
                        const float strength = *row(beta, in.bs, b, h, t);
                        const Vector g = *(const Vector *)(row(grad_out, gos, b, h, t) + column);
                        const Vector u = *(const Vector *)&writes[(t - first) * LANES];
                        float *gq = row(grad_q, gqs, b, kh, t), *gk = row(grad_k, gks, b, kh, t);
                        Vector gu = {};
                        for (int64_t i = 0; i < n.key_dim; i += LANES) {
                            Vector products[LANES];
#pragma GCC unroll 16
                            for (int j = 0; j < LANES; j++) {
                                Vector *gs = (Vector *)&grad[(i + j) * LANES];
                                *gs += query[i + j] * g;
                                gu += *gs * key[i + j];
                                products[j] = *(const Vector *)(after + (i + j) * LANES) * g;
                            }
                            add_lane_sums(products, gq + i);
                        }
                        /* u = b (v - p): the gradients of v, b and p. */
                        *(Vector *)(row(grad_v, gvs, b, h, t) + column) = strength * gu;
                        const Vector value = *(const Vector *)(row(v, in.vs, b, h, t) + column);
                        const Vector gp = n.delta_rule ? -strength * gu : Vector{};
                        Vector predicted = {}, gd = {};
                        float *gdecay = n.decay_dim ? row(grad_decay, gds, b, h, t) : nullptr;
                        for (int64_t i = 0; i < n.key_dim; i += LANES) {
                            Vector products[LANES], decayed_products[LANES];
#pragma GCC unroll 16
                            for (int j = 0; j < LANES; j++) {
                                Vector *gs = (Vector *)&grad[(i + j) * LANES];
                                const Vector decayed = *(const Vector *)(before + (i + j) * LANES) * decay[i + j];
                                products[j] = *gs * u + decayed * gp;
                                predicted += decayed * key[i + j];
                                const Vector gm = *gs + key[i + j] * gp;
                                decayed_products[j] = gm * decayed;
                                *gs = gm * decay[i + j];
                            }
                            add_lane_sums(products, gk + i);
                            if (n.decay_dim > 1)
                                add_lane_sums(decayed_products, gdecay + i);
                            else
                                for (int j = 0; j < LANES; j++)
                                    gd += decayed_products[j];
                        }
                        const Vector difference = n.delta_rule ? value - predicted : value;
                        *row(grad_beta, gbs, b, h, t) += sum_lanes(gu * difference);
                        if (n.decay_dim == 1)
                            *gdecay += sum_lanes(gd);
                    }
                }
                store_matrix(n, grad.data(), column, grad_state + (b * n.heads + h) * area);
            }
    }
}
