/* Gated DeltaNet between its projections, in float32, forward and backward; gated_delta_net.py calls it.

   A thread computes all heads that share keys, chunk by chunk: the causal convolution with SiLU, the norms of queries and
   keys, the gates, the delta rule (delta_chunks.h), and the norm and gate of the reads. Nothing but the output is
   stored; the backward pass computes it all again from the inputs and one matrix in INTERVAL chunks. */
#include "delta_chunks.h"

struct Sizes {
    int64_t batch_size, length, heads, key_heads, key_dim, value_dim, conv_size, threads;
};

struct Options {
    float max_write, norm_eps;
};

/* All tensors are contiguous. Shapes as in gated_delta_net.py, conv_weight (conv_size, channels); gradients of weights
   have one part per batch entry, that of norm_weight one per batch entry and key head. */
struct Tensors {
    const float *qkv, *gate, *write, *decay, *conv_inputs, *state, *conv_weight, *decay_bias, *log_decay_rate,
        *norm_weight;
    const int64_t *position, *valid_length;
    float *out, *next_state, *checkpoints;
    const float *grad_out;
    float *grad_qkv, *grad_gate, *grad_write, *grad_decay, *grad_conv_inputs, *grad_state, *grad_conv_weight,
        *grad_decay_bias, *grad_log_decay_rate, *grad_norm_weight;
};

/* (CHUNK, width) rows before and after SiLU, and the factors that normalize them. */
struct Channels {
    int64_t first, dim, width;
    float *pre, *factor;
};

struct Source {
    const Widths w;
    const Sizes n;
    const Tensors &x;
    const Options options;
    int64_t b, kh, channels;
    float *norm_weight, *gate_row, *grad_row, *grad_rows;
    std::vector<Channels> q, k, v; /* by slot; v by slot and head */
    static const bool needs_reads = true;

    Source(const Sizes &n, const Tensors &x, const Options &options, int64_t unit, int64_t slots, Arena &arena)
        : w(make_widths(n.key_dim, n.value_dim, n.heads / n.key_heads, true)), n(n), x(x), options(options),
          b(unit / n.key_heads), kh(unit % n.key_heads), channels(2 * n.key_heads * n.key_dim + n.heads * n.value_dim),
          norm_weight(arena.take(w.value)), gate_row(arena.take(w.value)), grad_row(arena.take(w.value)),
          grad_rows(arena.take(CHUNK * (w.key > w.value ? w.key : w.value)))
    {
        memcpy(norm_weight, x.norm_weight, n.value_dim * sizeof(float));
        const int64_t first_value = 2 * n.key_heads * n.key_dim;
        for (int64_t slot = 0; slot < slots; slot++) {
            q.push_back({kh * n.key_dim, n.key_dim, w.key, arena.take(CHUNK * w.key), arena.take(CHUNK)});
            k.push_back({(n.key_heads + kh) * n.key_dim, n.key_dim, w.key, arena.take(CHUNK * w.key), arena.take(CHUNK)});
            for (int64_t h = kh * w.ratio; h < (kh + 1) * w.ratio; h++)
                v.push_back({first_value + h * n.value_dim, n.value_dim, w.value, arena.take(CHUNK * w.value), nullptr});
        }
    }

    int64_t position(int64_t t) const
    {
        return x.position[b * n.length + t];
    }
    bool is_padding(int64_t t) const
    {
        return x.valid_length && t >= x.valid_length[b];
    }
    /* Offset of a token's inputs `lag` tokens earlier, in qkv if `from_call`, else in the inputs before the call. */
    int64_t input_offset(int64_t t, int64_t lag, const Channels &c, bool from_call) const
    {
        const int64_t row = from_call ? b * n.length + t - lag : (b + 1) * (n.conv_size - 1) + t - lag;
        return row * channels + c.first;
    }
    int64_t num_lags(int64_t t) const
    {
        return position(t) < n.conv_size - 1 ? position(t) + 1 : n.conv_size;
    }

    /* Fill c.pre by the convolution and `out` by its SiLU. */
    void convolve(int64_t first, int64_t count, Channels &c, float *out)
    {
        memset(c.pre, 0, CHUNK * c.width * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            const int64_t t = first + i, lags = num_lags(t);
            float *pre = c.pre + i * c.width;
            for (int64_t lag = 0; lag < lags; lag++) {
                const float *inputs = (lag <= t ? x.qkv : x.conv_inputs) + input_offset(t, lag, c, lag <= t);
                const float *weight = x.conv_weight + (n.conv_size - 1 - lag) * channels + c.first;
                for (int64_t d = 0; d < c.dim; d++)
                    pre[d] += weight[d] * inputs[d];
            }
        }
        for (int64_t i = 0; i < CHUNK * c.width; i += LANES)
            at(out + i) = at(c.pre + i) * vector_sigmoid(at(c.pre + i));
    }

    /* Add the gradients of a convolution's inputs and weights, given `grad` of its SiLU, which is overwritten. */
    void convolve_backward(int64_t first, int64_t count, const Channels &c, float *grad)
    {
        for (int64_t i = 0; i < CHUNK * c.width; i += LANES) {
            const Vector pre = at(c.pre + i), sigmoid = vector_sigmoid(pre);
            at(grad + i) *= sigmoid * (1.0f + pre * (1.0f - sigmoid));
        }
        for (int64_t i = 0; i < count; i++) {
            const int64_t t = first + i, lags = num_lags(t);
            const float *row = grad + i * c.width;
            for (int64_t lag = 0; lag < lags; lag++) {
                const int64_t offset = input_offset(t, lag, c, lag <= t);
                const int64_t tap = (n.conv_size - 1 - lag) * channels + c.first;
                const float *inputs = (lag <= t ? x.qkv : x.conv_inputs) + offset, *weight = x.conv_weight + tap;
                float *__restrict grad_inputs = (lag <= t ? x.grad_qkv : x.grad_conv_inputs) + offset;
                float *__restrict grad_weight = x.grad_conv_weight + b * n.conv_size * channels + tap;
                for (int64_t d = 0; d < c.dim; d++) {
                    grad_inputs[d] += weight[d] * row[d];
                    grad_weight[d] += inputs[d] * row[d];
                }
            }
        }
    }

    /* Convolve and normalize queries or keys. */
    void load_normalized(int64_t first, int64_t count, Channels &c, float scale, float *out)
    {
        convolve(first, count, c, out);
        for (int64_t i = 0; i < CHUNK; i++) {
            Vector sum{};
            for (int64_t d = 0; d < c.width; d += LANES)
                sum += at(out + i * c.width + d) * at(out + i * c.width + d);
            c.factor[i] = scale / sqrtf(sum_lanes(sum) + 1e-6f);
        }
        scale_rows(out, c.factor, c.width, out);
    }
    /* `rows`, normalized, have norm `scale`; grad_t is (width, CHUNK). */
    void normalized_backward(int64_t first, int64_t count, const Channels &c, float scale, const float *rows,
                             const float *grad_t)
    {
        for (int64_t i = 0; i < CHUNK; i++)
            for (int64_t d = 0; d < c.width; d++)
                grad_rows[i * c.width + d] = grad_t[d * CHUNK + i];
        for (int64_t i = 0; i < CHUNK; i++) {
            const float *row = rows + i * c.width;
            float *grad = grad_rows + i * c.width;
            Vector sum{};
            for (int64_t d = 0; d < c.width; d += LANES)
                sum += at(row + d) * at(grad + d);
            const float overlap = sum_lanes(sum) / (scale * scale);
            for (int64_t d = 0; d < c.width; d += LANES)
                at(grad + d) = c.factor[i] * (at(grad + d) - overlap * at(row + d));
        }
        convolve_backward(first, count, c, grad_rows);
    }

    float query_scale() const
    {
        return 1.0f / sqrtf((float)n.key_dim);
    }
    void load_keys(int64_t first, int64_t count, int64_t slot, Keys &keys)
    {
        load_normalized(first, count, q[slot], query_scale(), keys.q);
        load_normalized(first, count, k[slot], 1.0f, keys.k);
    }
    void store_key_grads(int64_t first, int64_t count, int64_t slot, const Keys &keys, const Grads &g)
    {
        normalized_backward(first, count, q[slot], query_scale(), keys.q, g.q_t);
        normalized_backward(first, count, k[slot], 1.0f, keys.k, g.k_t);
    }

    void load_head(int64_t h, int64_t first, int64_t count, int64_t slot, Head &head)
    {
        convolve(first, count, v[slot * w.ratio + h], head.v);
        h += kh * w.ratio;
        const float rate = expf(x.log_decay_rate[h]);
        for (int64_t i = 0; i < CHUNK; i++) {
            const int64_t t = first + i, index = (b * n.length + t) * n.heads + h;
            head.beta[i] = 0.0f;
            head.decay[i] = 1.0f;
            if (i >= count || is_padding(t))
                continue;
            const float step = x.decay[index] + x.decay_bias[h];
            head.beta[i] = options.max_write / (1.0f + expf(-x.write[index]));
            head.decay[i] = position(t) == 0 ? 0.0f : expf(-rate * (step > 20.0f ? step : log1pf(expf(step))));
        }
    }
    void store_head_grads(int64_t h, int64_t first, int64_t count, int64_t slot, const Grads &g)
    {
        convolve_backward(first, count, v[slot * w.ratio + h], g.v);
        h += kh * w.ratio;
        const float rate = expf(x.log_decay_rate[h]);
        for (int64_t i = 0; i < count; i++) {
            const int64_t t = first + i, index = (b * n.length + t) * n.heads + h;
            if (is_padding(t))
                continue;
            const float step = x.decay[index] + x.decay_bias[h], sigmoid = 1.0f / (1.0f + expf(-x.write[index]));
            const float grad_step = -rate * g.log_decay[i] / (1.0f + expf(-step));
            x.grad_write[index] = options.max_write * g.beta[i] * sigmoid * (1.0f - sigmoid);
            x.grad_decay[index] = grad_step;
            x.grad_decay_bias[b * n.heads + h] += grad_step;
            x.grad_log_decay_rate[b * n.heads + h] -=
                rate * g.log_decay[i] * (step > 20.0f ? step : log1pf(expf(step)));
        }
    }

    /* Load a row of the gate; return its offset. */
    int64_t load_gate(int64_t h, int64_t t)
    {
        const int64_t offset = ((b * n.length + t) * n.heads + kh * w.ratio + h) * n.value_dim;
        memcpy(gate_row, x.gate + offset, n.value_dim * sizeof(float));
        return offset;
    }
    float rms_factor(const float *row) const
    {
        Vector sum{};
        for (int64_t d = 0; d < w.value; d += LANES)
            sum += at(row + d) * at(row + d);
        return 1.0f / sqrtf(sum_lanes(sum) / n.value_dim + options.norm_eps);
    }
    void store_reads(int64_t h, int64_t first, int64_t count, const Head &head)
    {
        for (int64_t i = 0; i < count; i++) {
            const int64_t offset = load_gate(h, first + i);
            float *row = head.out + i * w.value;
            const float factor = rms_factor(row);
            for (int64_t d = 0; d < w.value; d += LANES) {
                const Vector gate = at(gate_row + d);
                at(row + d) *= factor * at(norm_weight + d) * gate * vector_sigmoid(gate);
            }
            memcpy(x.out + offset, row, n.value_dim * sizeof(float));
        }
    }
    void load_grad(int64_t h, int64_t first, int64_t count, int64_t slot, const Head &head, float *grad)
    {
        float *grad_weight = x.grad_norm_weight + (b * n.key_heads + kh) * n.value_dim;
        memset(grad, 0, CHUNK * w.value * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            const int64_t offset = load_gate(h, first + i);
            float *row = head.out + i * w.value, *grad_read = grad + i * w.value;
            const float factor = rms_factor(row);
            memcpy(grad_row, x.grad_out + offset, n.value_dim * sizeof(float));
            Vector sum{};
            for (int64_t d = 0; d < w.value; d += LANES) {
                const Vector gate = at(gate_row + d), sigmoid = vector_sigmoid(gate), read = factor * at(row + d);
                const Vector weight = at(norm_weight + d), gated = at(grad_row + d) * gate * sigmoid;
                at(gate_row + d) = at(grad_row + d) * read * weight * sigmoid * (1.0f + gate * (1.0f - sigmoid));
                at(grad_row + d) = gated * read;
                at(grad_read + d) = gated * weight;
                sum += at(grad_read + d) * read;
            }
            const float overlap = sum_lanes(sum) / n.value_dim;
            for (int64_t d = 0; d < w.value; d += LANES)
                at(grad_read + d) = factor * (at(grad_read + d) - overlap * factor * at(row + d));
            memcpy(x.grad_gate + offset, gate_row, n.value_dim * sizeof(float));
            for (int64_t d = 0; d < n.value_dim; d++)
                grad_weight[d] += grad_row[d];
        }
    }
};

extern "C" void memtx_gated_delta_net_forward(const Tensors *x, const Sizes *n, const Options *options)
{
    const int64_t ratio = n->heads / n->key_heads, area = ratio * n->key_dim * n->value_dim;
    const int64_t intervals = (n->length + INTERVAL * CHUNK - 1) / (INTERVAL * CHUNK);
#pragma omp parallel for num_threads(n->threads) schedule(dynamic)
    for (int64_t unit = 0; unit < n->batch_size * n->key_heads; unit++) {
        Arena arena;
        Source source(*n, *x, *options, unit, 1, arena);
        run_forward(source.w, n->length, source, x->state + unit * area, x->next_state + unit * area,
                    x->checkpoints ? x->checkpoints + unit * intervals * area : nullptr);
    }
}

/* x->grad_state is the gradient of the next state, and becomes that of the state. */
extern "C" void memtx_gated_delta_net_backward(const Tensors *x, const Sizes *n, const Options *options)
{
    const int64_t ratio = n->heads / n->key_heads, area = ratio * n->key_dim * n->value_dim;
    const int64_t intervals = (n->length + INTERVAL * CHUNK - 1) / (INTERVAL * CHUNK);
#pragma omp parallel for num_threads(n->threads) schedule(dynamic)
    for (int64_t unit = 0; unit < n->batch_size * n->key_heads; unit++) {
        Arena arena;
        Source source(*n, *x, *options, unit, INTERVAL, arena);
        run_backward(source.w, n->length, source, x->checkpoints + unit * intervals * area, x->grad_state + unit * area);
    }
}
