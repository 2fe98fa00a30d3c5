/* The gated unit of SwiGLU and RMS norms in float32, forward and backward, in one pass each; elementwise.py calls it.

   Rows may be longer than a multiple of LANES; the rest is computed in a padded vector. */
#include "vector.h"

/* Load or store up to LANES numbers. */
static inline Vector load(const float *x, int64_t count)
{
    if (count >= LANES)
        return at(x);
    Vector out{};
    for (int64_t i = 0; i < count; i++)
        out[i] = x[i];
    return out;
}

static inline void store(float *x, Vector value, int64_t count)
{
    if (count >= LANES)
        at(x) = value;
    else
        for (int64_t i = 0; i < count; i++)
            x[i] = value[i];
}

/* out (rows, width) = SiLU(gate) * up for gate_up (rows, 2 width). */
extern "C" void memtx_swiglu_forward(const float *gate_up, float *out, int64_t rows, int64_t width, int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            const float *gate = gate_up + row * 2 * width + i;
            const Vector value = load(gate, width - i);
            store(out + row * width + i, value * vector_sigmoid(value) * load(gate + width, width - i), width - i);
        }
}

extern "C" void memtx_swiglu_backward(const float *grad_out, const float *gate_up, float *grad_gate_up, int64_t rows,
                                      int64_t width, int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t gate = row * 2 * width + i, count = width - i;
            const Vector grad = load(grad_out + row * width + i, count), value = load(gate_up + gate, count);
            const Vector up = load(gate_up + gate + width, count), sigmoid = vector_sigmoid(value);
            store(grad_gate_up + gate, grad * up * sigmoid * (1.0f + value * (1.0f - sigmoid)), count);
            store(grad_gate_up + gate + width, grad * value * sigmoid, count);
        }
}

static inline float rms_factor(const float *x, int64_t width, float eps)
{
    Vector sum{};
    for (int64_t i = 0; i < width; i += LANES) {
        const Vector value = load(x + i, width - i);
        sum += value * value;
    }
    return 1.0f / sqrtf(sum_lanes(sum) / width + eps);
}

/* out (rows, width) = x / rms(x) * weight; rows of x are `stride` apart. */
extern "C" void memtx_rms_norm_forward(const float *x, const float *weight, float *out, int64_t rows, int64_t width,
                                       int64_t stride, float eps, int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *input = x + row * stride, factor = rms_factor(input, width, eps);
        for (int64_t i = 0; i < width; i += LANES)
            store(out + row * width + i, load(input + i, width - i) * factor * load(weight + i, width - i), width - i);
    }
}

/* grad_weight has a zeroed part for each of `parts` ranges of rows. */
extern "C" void memtx_rms_norm_backward(const float *grad_out, const float *x, const float *weight, float *grad_x,
                                        float *grad_weight, int64_t rows, int64_t width, int64_t stride, float eps,
                                        int64_t parts, int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            const float *input = x + row * stride, *grad = grad_out + row * width, factor = rms_factor(input, width, eps);
            float *weight_part = grad_weight + part * width;
            Vector sum{};
            for (int64_t i = 0; i < width; i += LANES)
                sum += load(grad + i, width - i) * load(weight + i, width - i) * load(input + i, width - i);
            const float overlap = sum_lanes(sum) * factor * factor / width;
            for (int64_t i = 0; i < width; i += LANES) {
                const int64_t count = width - i;
                const Vector value = load(input + i, count), g = load(grad + i, count);
                store(grad_x + row * width + i, factor * (g * load(weight + i, count) - overlap * value), count);
                store(weight_part + i, load(weight_part + i, count) + g * value * factor, count);
            }
        }
}
