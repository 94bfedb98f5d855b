/* QUIC-FL: codes by the table of positions, values by the table of levels. */
#pragma once
#include "exact.h"
#include "plan.h"
#include "vectors.h"

#if defined(__AVX512VBMI__)
#include "quic_fl_bytes.h"
#endif

/* index[j] <- table[index[j]]. One load at a time beats the gather instructions. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-vectorize")))
#endif
static void look_up(const u32 *table, u32 *index, int64_t size) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < size; j++) index[j] = table[index[j]];
}

/* LANES dither words: that of coordinate j is its word rotated until byte j mod 4 is on top. */
INLINE vu dither_words(const uint8_t *dither, int64_t j) {
#if defined(__AVX2__)
    uint8_t from __attribute__((vector_size(4 * LANES))); /* byte i % 4 of coordinate i / 4 */
    for (int i = 0; i < 4 * LANES; i++) from[i] = (uint8_t)(i / 16 * 4 + (i / 4 + 1 + i) % 4);
#if defined(__AVX512F__)
    __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(dither + j)));
    return (vu)_mm512_shuffle_epi8(words, (__m512i)from);
#else
    __m256i words = _mm256_broadcastsi128_si256(_mm_loadl_epi64((const __m128i *)(dither + j)));
    return (vu)_mm256_shuffle_epi8(words, (__m256i)from);
#endif
#else
    vu words, right, left;
    for (int i = 0; i < LANES; i++) {
        uint32_t word;
        memcpy(&word, dither + j + (i & ~3), 4);
        words[i] = word;
        right[i] = (8 * (i & 3) + 8) & 31;
        left[i] = (32 - right[i]) & 31;
    }
    return (words >> right) | (words << left);
#endif
}

/* Coordinates of a table look-up, few enough to leave the other arrays of a block in the first-level
 * cache. */
enum { TILE = 512 };

/* Codes and exact coordinates of one block, given its root mean square and the bits of its largest
 * magnitude; returns its scale. `room` and `indices` are scratch of d numbers. */
static float quic_fl_encode(const Plan *plan, float *y, float rms, uint32_t peak,
                            const uint8_t *dither, uint32_t stratum, float *room, i32 *indices,
                            uint8_t *codes, uint8_t *section) {
    const int64_t size = plan->size, tile = least(size, TILE);
    const uint32_t shift = stratum * 0x01000100u; /* moves u and v, the two halves of a word */
    float fitting = plan->exact_capacity
                        ? take_exact(plan, y, rms, dither, stratum, indices, room, section)
                        : from_bits(peak) * plan->inverse_bound;
    float scale = rms > fitting ? rms : fitting;
    float unit = scale > 0 ? (1.0f / scale) * plan->nodes_per_sigma : 0.0f;
#if defined(__AVX512VBMI__)
    if (plan->bits <= 4 && size >= 64) {
        quic_fl_codes_by_bytes(plan, y, dither, stratum, unit, codes);
        return scale;
    }
#endif
    i32 work[TILE];
    for (int64_t base = 0; base < size; base += tile) {
        for (int64_t j = 0; j < tile; j += LANES) {
            vi u = (vi)((dither_words(dither, base + j) + shift) & 0xffff);
            vi z = to_integers(load(y + base + j) * unit);
            *(vi *)(work + j) = (z + (u + plan->middle)) >> 16; /* the node */
        }
        look_up((const u32 *)plan->positions, (u32 *)work, tile);
        for (int64_t j = 0; j < tile; j += LANES) {
            vi v = (vi)(((dither_words(dither, base + j) >> 16) + (shift & 0xffff)) & 0xffff);
            *(vi *)(work + j) = (*(const vi *)(work + j) + v) >> 16;
        }
        for (int64_t j = 0; j < tile; j++) codes[base + j] = (uint8_t)work[j];
    }
    return scale;
}

/* y <- or y += scale * level(code, dither) */
static void quic_fl_add(const Plan *plan, const uint8_t *codes, const uint8_t *dither,
                        uint32_t stratum, float scale, int initial, float *y) {
    const int64_t size = plan->size, tile = least(size, TILE);
    const int shared_bits = plan->shared_bits;
#if defined(__AVX512VBMI__)
    if (plan->bits + shared_bits <= 8 && size >= 64) {
        if (initial)
            quic_fl_add_by_bytes(plan, codes, dither, stratum, scale, 1, y);
        else
            quic_fl_add_by_bytes(plan, codes, dither, stratum, scale, 0, y);
        return;
    }
#endif
    u32 work[TILE];
    const float *values = (const float *)work;
    for (int64_t base = 0; base < size; base += tile, y += tile) {
        for (int64_t j = 0; j < tile; j++) {
            uint8_t v = (uint8_t)(dither[base + j] + stratum);
            work[j] = ((uint32_t)codes[base + j] << shared_bits) | (v >> (8 - shared_bits));
        }
        look_up((const u32 *)plan->levels, work, tile);
        if (initial)
            for (int64_t j = 0; j < tile; j += LANES) store(y + j, load(values + j) * scale);
        else
            for (int64_t j = 0; j < tile; j += LANES)
                store(y + j, load(y + j) + load(values + j) * scale);
    }
}
