/* The gated delta rule with a decay per head, in chunks (Yang et al. 2024, section 3.3), forward and backward.

   With D[i][j] the decay from write j to read i of a chunk, g[i] from the matrix S before the chunk to read i, and L the
   part of a matrix below its diagonal, the writes U solve a unit triangular system, and all else is products:

       E = V - g (K S) - L(D * K K') U,   U = b E,   O = g (Q S) + (D * Q K') U,   S <- g[last] S + (D[last] K)' U

   A first token of a document has decay 0. Tokens after the last of a chunk write nothing. Backward, matrices are
   recomputed from one in INTERVAL chunks. A source of tokens loads a chunk and takes its gradients. */
#pragma once
#include "vector.h"
#include <vector>

#define CHUNK 32   /* tokens of a chunk */
#define INTERVAL 4 /* chunks between two stored matrices */
#define PAIRS (CHUNK * CHUNK)
#define SOLVE_ROWS 8 /* rows of the triangular system between two products */

/* Widths of keys and values, those in scratch being padded to LANES, and heads that share keys. */
struct Widths {
    int64_t key_dim, value_dim, ratio, key, value;
    bool delta_rule;
};

static inline Widths make_widths(int64_t key_dim, int64_t value_dim, int64_t ratio, bool delta_rule)
{
    return {key_dim, value_dim, ratio, (key_dim + LANES - 1) / LANES * LANES, (value_dim + LANES - 1) / LANES * LANES,
            delta_rule};
}

/* Queries and keys, (CHUNK, key) and transposed, and their products, (CHUNK, CHUNK). */
struct Keys {
    float *q, *k, *q_t, *k_t, *qk, *kk;
};

/* A head's values, errors E, writes U and reads O, (CHUNK, value); strengths, decays, decays from the matrix and to the
   chunk's end, (CHUNK); D and the matrices of the system (negative) and of the reads, (CHUNK, CHUNK); the matrix before
   the chunk, (key, value). */
struct Head {
    float *v, *e, *u, *out, *beta, *decay, *from_state, *to_end, *pairs, *system, *weights, *state;
};

static Keys make_keys(Arena &arena, const Widths &w)
{
    return {arena.take(CHUNK * w.key), arena.take(CHUNK * w.key), arena.take(CHUNK * w.key),
            arena.take(CHUNK * w.key), arena.take(PAIRS),         arena.take(PAIRS)};
}

static Head make_head(Arena &arena, const Widths &w)
{
    return {arena.take(CHUNK * w.value), arena.take(CHUNK * w.value), arena.take(CHUNK * w.value),
            arena.take(CHUNK * w.value), arena.take(CHUNK),           arena.take(CHUNK),
            arena.take(CHUNK),           arena.take(CHUNK),           arena.take(PAIRS),
            arena.take(PAIRS),           arena.take(PAIRS),           arena.take(w.key * w.value)};
}

static inline void transpose(const float *x, int64_t rows, int64_t cols, float *out)
{
    for (int64_t c0 = 0; c0 < cols; c0 += LANES)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = c0; c < c0 + LANES; c++)
                out[c * rows + r] = x[r * cols + c];
}

/* out[i] = factor[i] x[i] for rows of a width. */
static inline void scale_rows(const float *x, const float *factor, int64_t width, float *out)
{
    for (int64_t i = 0; i < CHUNK; i++)
        for (int64_t j = 0; j < width; j += LANES)
            at(out + i * width + j) = at(x + i * width + j) * factor[i];
}

static inline void copy_matrix(const Widths &w, const float *x, float *out, bool to_scratch)
{
    const int64_t from = to_scratch ? w.value_dim : w.value, to = to_scratch ? w.value : w.value_dim;
    for (int64_t i = 0; i < w.key_dim; i++)
        memcpy(out + i * to, x + i * from, w.value_dim * sizeof(float));
}

static void multiply_keys(const Widths &w, Keys &keys)
{
    transpose(keys.k, CHUNK, w.key, keys.k_t);
    matmul(CHUNK, CHUNK, w.key, keys.q, w.key, 1, keys.k_t, CHUNK, keys.qk, CHUNK, false);
    if (w.delta_rule)
        matmul(CHUNK, CHUNK, w.key, keys.k, w.key, 1, keys.k_t, CHUNK, keys.kk, CHUNK, false);
}

/* Fill a head's decays and (CHUNK, CHUNK) matrices. */
static void decay_pairs(const Widths &w, const Keys &keys, Head &head)
{
    memset(head.pairs, 0, PAIRS * sizeof(float));
    for (int64_t i = 0; i < CHUNK; i++) {
        const float a = head.decay[i];
        float *row = head.pairs + i * CHUNK;
        head.from_state[i] = (i ? head.from_state[i - 1] : 1.0f) * a;
        for (int64_t j = 0; i && j < CHUNK; j += LANES)
            at(row + j) = at(row - CHUNK + j) * a;
        row[i] = 1.0f;
        for (int64_t j = 0; j < CHUNK; j += LANES) {
            at(head.weights + i * CHUNK + j) = at(row + j) * at(keys.qk + i * CHUNK + j);
            if (w.delta_rule)
                at(head.system + i * CHUNK + j) = -at(row + j) * at(keys.kk + i * CHUNK + j);
        }
        head.system[i * CHUNK + i] = 0.0f;
    }
    memcpy(head.to_end, head.pairs + (CHUNK - 1) * CHUNK, CHUNK * sizeof(float));
}

/* Compute a head's writes, and its reads if `reads`. */
static void forward_chunk(const Widths &w, const Keys &keys, Head &head, bool reads, float *scratch)
{
    decay_pairs(w, keys, head);
    memcpy(head.e, head.v, CHUNK * w.value * sizeof(float));
    if (!w.delta_rule)
        scale_rows(head.e, head.beta, w.value, head.u);
    else {
        matmul(CHUNK, w.value, w.key, keys.k, w.key, 1, head.state, w.value, scratch, w.value, false);
        for (int64_t i = 0; i < CHUNK; i++) {
            const int64_t solved = i / SOLVE_ROWS * SOLVE_ROWS;
            float *e = head.e + i * w.value;
            for (int64_t j = 0; j < w.value; j += LANES)
                at(e + j) -= head.from_state[i] * at(scratch + i * w.value + j);
            if (i == solved && i > 0)
                matmul(SOLVE_ROWS, w.value, solved, head.system + i * CHUNK, CHUNK, 1, head.u, w.value, e, w.value,
                       true);
            matmul(1, w.value, i - solved, head.system + i * CHUNK + solved, CHUNK, 1, head.u + solved * w.value,
                   w.value, e, w.value, true);
            for (int64_t j = 0; j < w.value; j += LANES)
                at(head.u + i * w.value + j) = at(e + j) * head.beta[i];
        }
    }
    if (!reads)
        return;
    matmul(CHUNK, w.value, w.key, keys.q, w.key, 1, head.state, w.value, head.out, w.value, false);
    scale_rows(head.out, head.from_state, w.value, head.out);
    for (int64_t i = 0; i < CHUNK; i += SOLVE_ROWS)
        matmul(SOLVE_ROWS, w.value, i + SOLVE_ROWS, head.weights + i * CHUNK, CHUNK, 1, head.u, w.value,
               head.out + i * w.value, w.value, true);
}

/* Compute the matrix after a chunk; `next` may be the matrix before it. */
static void advance_matrix(const Widths &w, const Keys &keys, const Head &head, float *next, float *scratch)
{
    for (int64_t i = 0; i < w.key * w.value; i += LANES)
        at(next + i) = at(head.state + i) * head.from_state[CHUNK - 1];
    scale_rows(head.u, head.to_end, w.value, scratch);
    matmul(w.key, w.value, CHUNK, keys.k_t, CHUNK, 1, scratch, w.value, next, w.value, true);
}

/* Gradients of a chunk: of the queries, keys and their products, summed over the heads, and of one head's reads, values,
   strengths and log decays; scratch. */
struct Grads {
    float *q_t, *k_t, *qk, *kk, *out, *v, *beta, *log_decay, *write, *x_t[3], *rows, *square, *log_pairs;
};

static Grads make_grads(Arena &arena, const Widths &w)
{
    Grads grads = {arena.take(CHUNK * w.key),   arena.take(CHUNK * w.key),   arena.take(PAIRS), arena.take(PAIRS),
                   arena.take(CHUNK * w.value), arena.take(CHUNK * w.value), arena.take(CHUNK), arena.take(CHUNK),
                   arena.take(CHUNK * w.value), {nullptr, nullptr, nullptr}, nullptr,           arena.take(PAIRS), arena.take(PAIRS)};
    for (float *&x_t : grads.x_t)
        x_t = arena.take(CHUNK * (w.key > w.value ? w.key : w.value));
    grads.rows = arena.take(CHUNK * w.value);
    return grads;
}

/* Given the gradient `square` of `matrix` = sign * D * products, add those of log D and of the products. */
static inline void add_pair_grads(const float *square, const float *matrix, const float *pairs, float sign,
                                  float *grad_products, float *grad_log_pairs)
{
    for (int64_t i = 0; i < PAIRS; i += LANES) {
        at(grad_log_pairs + i) += at(square + i) * at(matrix + i);
        at(grad_products + i) += sign * at(square + i) * at(pairs + i);
    }
}

/* Gradients of a head in a chunk, from that of its reads, `g.out`, and of the matrix after it, which becomes that of the
   matrix before it. */
static void backward_chunk(const Widths &w, const Keys &keys, const Head &head, Grads &g, float *grad_state)
{
    alignas(64) float log_state[CHUNK] = {}, columns[CHUNK] = {}, factor[CHUNK]; /* gradients of log g; scratch */
    float *log_to_end = g.log_pairs + (CHUNK - 1) * CHUNK;
    memset(g.log_pairs, 0, PAIRS * sizeof(float));
    /* U: through the reads and the next matrix, then through later errors; `write` becomes minus the gradient of p. */
    matmul(CHUNK, w.value, w.key, keys.k, w.key, 1, grad_state, w.value, g.write, w.value, false);
    scale_rows(g.write, head.to_end, w.value, g.write);
    matmul(CHUNK, w.value, CHUNK, head.weights, 1, CHUNK, g.out, w.value, g.write, w.value, true);
    for (int64_t j = CHUNK - 1; j >= 0; j--) {
        const int64_t block = j / SOLVE_ROWS * SOLVE_ROWS, solved = block + SOLVE_ROWS;
        float *u = g.write + j * w.value;
        if (w.delta_rule && j == solved - 1 && solved < CHUNK)
            matmul(SOLVE_ROWS, w.value, CHUNK - solved, head.system + solved * CHUNK + block, 1, CHUNK,
                   g.v + solved * w.value, w.value, g.write + block * w.value, w.value, true);
        if (w.delta_rule)
            matmul(1, w.value, solved - 1 - j, head.system + (j + 1) * CHUNK + j, 1, CHUNK, g.v + (j + 1) * w.value,
                   w.value, u, w.value, true);
        Vector sum{};
        for (int64_t i = 0; i < w.value; i += LANES) {
            sum += at(u + i) * at(head.e + j * w.value + i);
            at(g.v + j * w.value + i) = at(u + i) * head.beta[j];
        }
        g.beta[j] = sum_lanes(sum);
    }
    float *u_t = g.x_t[0], *x_t = g.x_t[1], *state_grad_t = g.x_t[2];
    transpose(head.u, CHUNK, w.value, u_t);
    matmul(CHUNK, CHUNK, w.value, g.out, w.value, 1, u_t, CHUNK, g.square, CHUNK, false);
    add_pair_grads(g.square, head.weights, head.pairs, 1.0f, g.qk, g.log_pairs);
    if (w.delta_rule) {
        matmul(CHUNK, CHUNK, w.value, g.v, w.value, 1, u_t, CHUNK, g.square, CHUNK, false);
        for (int64_t i = 0; i < CHUNK; i++)
            g.square[i * CHUNK + i] = 0.0f;
        add_pair_grads(g.square, head.system, head.pairs, -1.0f, g.kk, g.log_pairs);
    }
    /* The next matrix. */
    const float total = head.from_state[CHUNK - 1];
    matmul(w.key, CHUNK, w.value, grad_state, w.value, 1, u_t, CHUNK, state_grad_t, CHUNK, false);
    for (int64_t i = 0; i < CHUNK; i += LANES) {
        const Vector decay = at(head.to_end + i);
        Vector sum{};
        for (int64_t d = 0; d < w.key; d++) {
            const Vector grad = at(state_grad_t + d * CHUNK + i) * decay;
            at(g.k_t + d * CHUNK + i) += grad;
            sum += grad * at(keys.k_t + d * CHUNK + i);
        }
        at(log_to_end + i) += sum;
    }
    Vector overlap{};
    for (int64_t i = 0; i < w.key * w.value; i += LANES) {
        overlap += at(head.state + i) * at(grad_state + i);
        at(grad_state + i) *= total;
    }
    log_state[CHUNK - 1] += total * sum_lanes(overlap);
    /* The matrix before the chunk, read by queries and, for the errors, by keys. */
    for (int part = 0; part < (w.delta_rule ? 2 : 1); part++) {
        const float *grad = part ? g.v : g.out, *keys_t = part ? keys.k_t : keys.q_t;
        float *grad_t = part ? g.k_t : g.q_t;
        for (int64_t i = 0; i < CHUNK; i++)
            factor[i] = part ? -head.from_state[i] : head.from_state[i];
        transpose(grad, CHUNK, w.value, x_t);
        matmul(w.key, CHUNK, w.value, head.state, w.value, 1, x_t, CHUNK, state_grad_t, CHUNK, false);
        for (int64_t i = 0; i < CHUNK; i += LANES) {
            Vector sum{};
            for (int64_t d = 0; d < w.key; d++) {
                const Vector read = at(state_grad_t + d * CHUNK + i) * at(factor + i);
                at(grad_t + d * CHUNK + i) += read;
                sum += read * at(keys_t + d * CHUNK + i);
            }
            at(log_state + i) += sum;
        }
        scale_rows(grad, factor, w.value, g.rows);
        matmul(w.key, w.value, CHUNK, keys_t, CHUNK, 1, g.rows, w.value, grad_state, w.value, true);
    }
    /* A token's log decay is part of the decays from the matrix and from earlier writes to itself and later reads. */
    float from_state = 0.0f;
    for (int64_t t = CHUNK - 1; t >= 0; t--) {
        float from_writes = 0.0f;
        from_state += log_state[t];
        for (int64_t j = 0; j < CHUNK; j += LANES)
            at(columns + j) += at(g.log_pairs + t * CHUNK + j);
        for (int64_t j = 0; j < t; j++)
            from_writes += columns[j];
        g.log_decay[t] = head.decay[t] == 0.0f ? 0.0f : from_state + from_writes;
    }
}

/* Gradients of queries and keys through their products, once for all heads. */
static void backward_products(const Widths &w, const Keys &keys, Grads &g)
{
    matmul(w.key, CHUNK, CHUNK, keys.q_t, CHUNK, 1, g.qk, CHUNK, g.k_t, CHUNK, true);
    transpose(g.qk, CHUNK, CHUNK, g.square);
    matmul(w.key, CHUNK, CHUNK, keys.k_t, CHUNK, 1, g.square, CHUNK, g.q_t, CHUNK, true);
    if (w.delta_rule) {
        transpose(g.kk, CHUNK, CHUNK, g.square);
        for (int64_t i = 0; i < PAIRS; i += LANES)
            at(g.square + i) += at(g.kk + i);
        matmul(w.key, CHUNK, CHUNK, keys.k_t, CHUNK, 1, g.square, CHUNK, g.k_t, CHUNK, true);
    }
}

/* Read all tokens of the heads that share keys. A source has load_keys(first, count, slot, keys), which fills q and k;
   load_head(h, first, count, slot, head), which fills v, beta and decay; store_reads(h, first, count, head). Matrices
   are (ratio, key_dim, value_dim), `checkpoints` (ratio, intervals, key_dim, value_dim) or null. */
template <class Source>
static void run_forward(const Widths &w, int64_t length, Source &source, const float *state, float *next_state,
                        float *checkpoints)
{
    Arena arena;
    Keys keys = make_keys(arena, w);
    Head head = make_head(arena, w);
    float *scratch = arena.take(CHUNK * w.value), *matrices = arena.take(w.ratio * w.key * w.value);
    const int64_t area = w.key_dim * w.value_dim, intervals = (length + INTERVAL * CHUNK - 1) / (INTERVAL * CHUNK);
    for (int64_t h = 0; h < w.ratio; h++)
        copy_matrix(w, state + h * area, matrices + h * w.key * w.value, true);
    for (int64_t first = 0; first < length; first += CHUNK) {
        const int64_t count = length - first < CHUNK ? length - first : CHUNK;
        source.load_keys(first, count, 0, keys);
        multiply_keys(w, keys);
        for (int64_t h = 0; h < w.ratio; h++) {
            head.state = matrices + h * w.key * w.value;
            if (checkpoints && first % (INTERVAL * CHUNK) == 0)
                copy_matrix(w, head.state, checkpoints + (h * intervals + first / (INTERVAL * CHUNK)) * area, false);
            source.load_head(h, first, count, 0, head);
            forward_chunk(w, keys, head, true, scratch);
            source.store_reads(h, first, count, head);
            advance_matrix(w, keys, head, head.state, scratch);
        }
    }
    for (int64_t h = 0; h < w.ratio; h++)
        copy_matrix(w, matrices + h * w.key * w.value, next_state + h * area, false);
}

/* Gradients of the same. The source also has needs_reads; load_grad(h, first, count, slot, head, grad), which fills the
   gradient of the reads; store_head_grads(h, first, count, slot, grads) and store_key_grads(first, count, slot, keys,
   grads). `grad_state` is that of the matrices after the last token, and becomes that of those before the first. */
template <class Source>
static void run_backward(const Widths &w, int64_t length, Source &source, const float *checkpoints, float *grad_state)
{
    Arena arena;
    std::vector<Keys> keys;
    std::vector<Head> heads;
    for (int64_t slot = 0; slot < INTERVAL; slot++) {
        keys.push_back(make_keys(arena, w));
        for (int64_t h = 0; h < w.ratio; h++)
            heads.push_back(make_head(arena, w));
    }
    Grads g = make_grads(arena, w);
    const int64_t matrix_size = w.key * w.value, area = w.key_dim * w.value_dim;
    const int64_t intervals = (length + INTERVAL * CHUNK - 1) / (INTERVAL * CHUNK);
    float *grads = arena.take(w.ratio * matrix_size);
    for (int64_t h = 0; h < w.ratio; h++)
        copy_matrix(w, grad_state + h * area, grads + h * matrix_size, true);
    for (int64_t interval = intervals - 1; interval >= 0; interval--) {
        const int64_t start = interval * INTERVAL * CHUNK;
        const int64_t end = length < start + INTERVAL * CHUNK ? length : start + INTERVAL * CHUNK;
        const int64_t slots = (end - start + CHUNK - 1) / CHUNK;
        for (int64_t slot = 0; slot < slots; slot++) {
            const int64_t first = start + slot * CHUNK, count = end - first < CHUNK ? end - first : CHUNK;
            source.load_keys(first, count, slot, keys[slot]);
            multiply_keys(w, keys[slot]);
            transpose(keys[slot].q, CHUNK, w.key, keys[slot].q_t);
            for (int64_t h = 0; h < w.ratio; h++) {
                Head &head = heads[slot * w.ratio + h];
                if (slot == 0)
                    copy_matrix(w, checkpoints + (h * intervals + interval) * area, head.state, true);
                source.load_head(h, first, count, slot, head);
                forward_chunk(w, keys[slot], head, source.needs_reads, g.rows);
                if (slot + 1 < slots)
                    advance_matrix(w, keys[slot], head, heads[(slot + 1) * w.ratio + h].state, g.rows);
            }
        }
        for (int64_t slot = slots - 1; slot >= 0; slot--) {
            const int64_t first = start + slot * CHUNK, count = end - first < CHUNK ? end - first : CHUNK;
            for (float *x : {g.q_t, g.k_t})
                memset(x, 0, CHUNK * w.key * sizeof(float));
            for (float *x : {g.qk, g.kk})
                memset(x, 0, PAIRS * sizeof(float));
            for (int64_t h = 0; h < w.ratio; h++) {
                const Head &head = heads[slot * w.ratio + h];
                source.load_grad(h, first, count, slot, head, g.out);
                backward_chunk(w, keys[slot], head, g, grads + h * matrix_size);
                source.store_head_grads(h, first, count, slot, g);
            }
            backward_products(w, keys[slot], g);
            source.store_key_grads(first, count, slot, keys[slot], g);
        }
    }
    for (int64_t h = 0; h < w.ratio; h++)
        copy_matrix(w, grads + h * matrix_size, grad_state + h * area, false);
}
