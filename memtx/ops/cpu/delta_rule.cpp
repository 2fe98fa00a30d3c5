/* The gated delta rule in float32, forward and backward; delta_rule.py calls it.

   With a decay per head it goes by the chunks of delta_chunks.h, with one per channel token by token. Columns of the matrix are independent given keys and gates, so they are the lanes of vectors, and the rows of a group
   of columns stay in the L1 cache. Products with the matrix need one pass that reads it and one that updates it:

       p = S'k,  r = S'q,  u = b (v - a p),  o = a r + (k q) u,  S <- a S + k u'

   The backward pass recomputes the matrices of a chunk from the one before it. Sums over columns, such as the gradient
   of a query, are reduced for a vector of rows at a time. */
#include "delta_chunks.h"

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

/* Tokens of the heads of a key head, as chunks need them; gradients are null in the forward pass. */
struct Source {
    const Shape &n;
    const Inputs &in;
    int64_t b, kh, ratio;
    float *out;
    Strides os;
    const float *grad_out;
    Strides gos;
    float *grads[5]; /* of q, k, v, beta and log_decay */
    const Strides *gs;
    static const bool needs_reads = false;

    /* Copy rows of a chunk, with zeros after the last token. */
    void load(const float *x, Strides s, int64_t h, int64_t first, int64_t count, int64_t dim, int64_t width, float *rows)
    {
        memset(rows + count * width, 0, (CHUNK - count) * width * sizeof(float));
        for (int64_t i = 0; i < count; i++)
            memcpy(rows + i * width, row(x, s, b, h, first + i), dim * sizeof(float));
    }
    void store(const float *rows, int64_t width, int64_t dim, int64_t h, int64_t first, int64_t count, float *x, Strides s)
    {
        for (int64_t i = 0; i < count; i++)
            memcpy(row(x, s, b, h, first + i), rows + i * width, dim * sizeof(float));
    }
    void load_keys(int64_t first, int64_t count, int64_t slot, Keys &keys)
    {
        const int64_t width = (n.key_dim + LANES - 1) / LANES * LANES;
        load(in.q, in.qs, kh, first, count, n.key_dim, width, keys.q);
        load(in.k, in.ks, kh, first, count, n.key_dim, width, keys.k);
    }
    void load_head(int64_t h, int64_t first, int64_t count, int64_t slot, Head &head)
    {
        h += kh * ratio;
        load(in.v, in.vs, h, first, count, n.value_dim, (n.value_dim + LANES - 1) / LANES * LANES, head.v);
        for (int64_t i = 0; i < CHUNK; i++) {
            const bool is_token = i < count;
            head.beta[i] = is_token ? *row(in.beta, in.bs, b, h, first + i) : 0.0f;
            head.decay[i] = 1.0f;
            if (is_token && in.starts[b * n.length + first + i])
                head.decay[i] = 0.0f;
            else if (is_token && n.decay_dim)
                head.decay[i] = expf(*row(in.log_decay, in.ds, b, h, first + i));
        }
    }
    void store_reads(int64_t h, int64_t first, int64_t count, const Head &head)
    {
        store(head.out, (n.value_dim + LANES - 1) / LANES * LANES, n.value_dim, h + kh * ratio, first, count, out, os);
    }
    void load_grad(int64_t h, int64_t first, int64_t count, int64_t slot, const Head &head, float *grad)
    {
        load(grad_out, gos, h + kh * ratio, first, count, n.value_dim, (n.value_dim + LANES - 1) / LANES * LANES, grad);
    }
    void store_head_grads(int64_t h, int64_t first, int64_t count, int64_t slot, const Grads &g)
    {
        h += kh * ratio;
        store(g.v, (n.value_dim + LANES - 1) / LANES * LANES, n.value_dim, h, first, count, grads[2], gs[2]);
        store(g.beta, 1, 1, h, first, count, grads[3], gs[3]);
        if (n.decay_dim)
            store(g.log_decay, 1, 1, h, first, count, grads[4], gs[4]);
    }
    void store_key_grads(int64_t first, int64_t count, int64_t slot, const Keys &keys, const Grads &g)
    {
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < n.key_dim; d++) {
                row(grads[0], gs[0], b, kh, first + i)[d] = g.q_t[d * CHUNK + i];
                row(grads[1], gs[1], b, kh, first + i)[d] = g.k_t[d * CHUNK + i];
            }
    }
};

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
    if (n.decay_dim <= 1) {
        const int64_t intervals = (n.length + INTERVAL * CHUNK - 1) / (INTERVAL * CHUNK);
#pragma omp parallel for num_threads(n.threads) schedule(dynamic)
        for (int64_t unit = 0; unit < n.batch_size * n.key_heads; unit++) {
            Source source = {n, in, unit / n.key_heads, unit % n.key_heads, ratio, out, os};
            run_forward(make_widths(n.key_dim, n.value_dim, ratio, n.delta_rule), n.length, source,
                        state + unit * ratio * area, next_state + unit * ratio * area,
                        checkpoints ? checkpoints + unit * ratio * intervals * area : nullptr);
        }
        return;
    }
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
    if (n.decay_dim <= 1) {
        const int64_t intervals = (n.length + INTERVAL * CHUNK - 1) / (INTERVAL * CHUNK);
        memcpy(grad_state, grad_next, n.batch_size * n.heads * area * sizeof(float));
#pragma omp parallel for num_threads(n.threads) schedule(dynamic)
        for (int64_t unit = 0; unit < n.batch_size * n.key_heads; unit++) {
            Source source = {n, in, unit / n.key_heads, unit % n.key_heads, ratio, nullptr, gos, grad_out, gos,
                             {grad_q, grad_k, grad_v, grad_beta, grad_decay}, s + 6};
            run_backward(make_widths(n.key_dim, n.value_dim, ratio, n.delta_rule), n.length, source,
                         checkpoints + unit * ratio * intervals * area, grad_state + unit * ratio * area);
        }
        return;
    }
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
