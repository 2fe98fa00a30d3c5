/* Visibility of keys for blocks of queries, whose scores are stored as (keys, queries). */
#include "vector.h"

#define QUERY_BLOCK 32 /* queries per block */
#define KEY_TILE 96    /* keys per tile: keys, values and two copies of the scores fit in the L2 cache */

/* Keys as a block of queries sees them. */
struct KeyInfo {
    const int32_t *visible_from, *visible_until; /* of one batch entry */
    const float *key_offset;                     /* offsets of the keys; null without a bias */
    float slope;                                 /* penalty per token of distance, in base 2 */
    int32_t first_query;                         /* first query of the block */
};

/* Return true if any query of the block sees the key. */
static inline bool is_visible(const KeyInfo &keys, int64_t key)
{
    return keys.visible_from[key] < keys.first_query + QUERY_BLOCK && keys.visible_until[key] > keys.first_query;
}

/* Move the bounds [low, high) inward past keys that no query of the block sees. */
static inline void trim_key_range(const KeyInfo &keys, int64_t &low, int64_t &high)
{
    while (low < high && !is_visible(keys, low))
        low++;
    while (low < high && !is_visible(keys, high - 1))
        high--;
}

/* Add the bias to the scores (n, QUERY_BLOCK) of the keys from `low` on; mask them with minus infinity. */
static void apply_bias_and_mask(float *scores, int64_t n, int64_t low, const KeyInfo &keys)
{
    const Vector minus_inf = Vector{} - INFINITY;
    IntVector lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    for (int64_t i = 0; i < n; i++) {
        const int32_t visible_from = keys.visible_from[low + i], visible_until = keys.visible_until[low + i];
        const bool all_visible = visible_from <= keys.first_query && visible_until >= keys.first_query + QUERY_BLOCK;
        if (all_visible && !keys.key_offset)
            continue;
        for (int w = 0; w < QUERY_BLOCK; w += LANES) {
            const IntVector offset = lane + (keys.first_query + w);
            Vector *score = (Vector *)(scores + i * QUERY_BLOCK + w);
            if (keys.key_offset)
                *score -= (__builtin_convertvector(offset, Vector) - keys.key_offset[low + i]) * keys.slope;
            if (!all_visible)
                *score = visible_from <= offset ? (offset < visible_until ? *score : minus_inf) : minus_inf;
        }
    }
}
