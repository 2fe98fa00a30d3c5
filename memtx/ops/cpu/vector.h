/* Vectors and matrix products in float32 for the sources of this folder.

   All products have one form, C[r][lane] += sum_k A(r, k) B[k][lane], with A read by two strides and C in registers: 24
   vectors of 32 with AVX-512, 12 of 16 with AVX2. */
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 12
#define MAX_TILE_VECTORS 4
#else
#define LANES 8
#define TILE_ROWS 6
#define MAX_TILE_VECTORS 2
#endif
#define LOG2E 1.4426950408889634f

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntVector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

template <int rows, int vectors>
static inline void multiply_tile(int64_t depth, const float *a, int64_t a_row, int64_t a_col_stride, const float *b,
                                 int64_t b_row_stride, float *c, int64_t c_row, bool add)
{
    Vector sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int w = 0; w < vectors; w++)
            sum[r][w] = add ? *(const Vector *)(c + r * c_row + w * LANES) : Vector{};
    for (int64_t k = 0; k < depth; k++) {
        Vector line[vectors];
#pragma GCC unroll 4
        for (int w = 0; w < vectors; w++)
            line[w] = *(const Vector *)(b + k * b_row_stride + w * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const float scalar = a[r * a_row + k * a_col_stride];
#pragma GCC unroll 4
            for (int w = 0; w < vectors; w++)
                sum[r][w] += scalar * line[w];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int w = 0; w < vectors; w++)
            *(Vector *)(c + r * c_row + w * LANES) = sum[r][w];
}

template <int max_rows, int vectors>
static void multiply_stripe(int64_t rows, int64_t depth, const float *a, int64_t a_row, int64_t a_col_stride,
                            const float *b, int64_t b_row_stride, float *c, int64_t c_row, bool add)
{
    int64_t r = 0;
    for (; r + max_rows <= rows; r += max_rows)
        multiply_tile<max_rows, vectors>(depth, a + r * a_row, a_row, a_col_stride, b, b_row_stride, c + r * c_row,
                                         c_row, add);
    for (; r + max_rows / 3 <= rows; r += max_rows / 3)
        multiply_tile<max_rows / 3, vectors>(depth, a + r * a_row, a_row, a_col_stride, b, b_row_stride, c + r * c_row,
                                             c_row, add);
    for (; r < rows; r++)
        multiply_tile<1, vectors>(depth, a + r * a_row, a_row, a_col_stride, b, b_row_stride, c + r * c_row, c_row,
                                  add);
}

/* C (rows, lanes) = or += A (rows, depth) B (depth, lanes); lanes a multiple of LANES. */
static void matmul(int64_t rows, int64_t lanes, int64_t depth, const float *a, int64_t a_row, int64_t a_col_stride,
                   const float *b, int64_t b_row_stride, float *c, int64_t c_row, bool add)
{
    int64_t lane = 0;
#if MAX_TILE_VECTORS == 4
    for (; lane + 4 * LANES <= lanes; lane += 4 * LANES)
        multiply_stripe<TILE_ROWS / 2, 4>(rows, depth, a, a_row, a_col_stride, b + lane, b_row_stride, c + lane, c_row,
                                          add);
#endif
    for (; lane + 2 * LANES <= lanes; lane += 2 * LANES)
        multiply_stripe<TILE_ROWS, 2>(rows, depth, a, a_row, a_col_stride, b + lane, b_row_stride, c + lane, c_row,
                                       add);
    for (; lane < lanes; lane += LANES)
        multiply_stripe<TILE_ROWS, 1>(rows, depth, a, a_row, a_col_stride, b + lane, b_row_stride, c + lane, c_row,
                                       add);
}

/* 2^x to float32's precision; exactly 0 for x <= -127, and nan for nan. */
static inline Vector vector_exp2(Vector x)
{
    const Vector min_x = Vector{} - 127.0f, magic = Vector{} + 12582912.0f; /* 1.5 2^23: rounds to integers */
    x = x < min_x ? min_x : x;
    const Vector shifted = x + magic, f = x - (shifted - magic);
    Vector p = Vector{} + 1.535336188319500e-4f; /* the series of 2^f = e^(f ln 2), |f| <= 1/2 */
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const IntVector exponent = ((IntVector)shifted + 127) << 23;
    return p * (Vector)exponent;
}

/* 1 / (1 + e^-x) */
static inline Vector vector_sigmoid(Vector x)
{
    const Vector max_x = Vector{} + 126.0f;
    const Vector y = x * -LOG2E;
    return 1.0f / (1.0f + vector_exp2(y > max_x ? max_x : y));
}

static inline float sum_lanes(Vector x)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            x[lane] += x[lane + half];
    return x[0];
}

static inline Vector &at(float *x)
{
    return *(Vector *)x;
}

static inline const Vector &at(const float *x)
{
    return *(const Vector *)x;
}

/* Scratch of a thread, freed at once; every part begins at a multiple of 64 bytes. */
class Arena {
  public:
    Arena() : blocks(nullptr) {}
    ~Arena()
    {
        for (; blocks; ) {
            void *next = *(void **)blocks;
            free(blocks);
            blocks = next;
        }
    }
    float *take(int64_t count)
    {
        const size_t bytes = (size_t)(count * sizeof(float) + 63) / 64 * 64 + 64;
        char *block = (char *)aligned_alloc(64, bytes);
        *(void **)block = blocks;
        blocks = block;
        memset(block + 64, 0, bytes - 64);
        return (float *)(block + 64);
    }

  private:
    void *blocks;
};
