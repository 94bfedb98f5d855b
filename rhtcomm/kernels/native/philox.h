/* Random streams of Philox4x32-10; see randomness.py. */
#pragma once
#include "plan.h"
#include "vectors.h"

#if defined(__aarch64__)
#include "philox_neon.h"
#else
/* Products of the low halves of 64-bit lanes; the upper halves may hold anything. */
INLINE vl multiply_low_halves(vl a, uint32_t b) {
#if defined(__AVX512F__)
    return (vl)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (vl)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (vl)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xffffffffu) * b;
#endif
}

/* The low halves of c[0] .. c[3] of lane 0, then of lane 1 and so on. On AVX2, where halves of vectors
 * are apart, lanes 1 and 2 change places. */
INLINE void store_words(uint32_t *to, const vl *c) {
#if defined(__AVX512F__)
    vl low = (c[0] & 0xffffffffu) | (c[1] << 32), high = (c[2] & 0xffffffffu) | (c[3] << 32);
    const __m512i lower = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i upper = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64((__m512i)low, lower, (__m512i)high));
    _mm512_storeu_si512(to + LANES, _mm512_permutex2var_epi64((__m512i)low, upper, (__m512i)high));
#elif defined(__AVX2__)
    __m256 low = _mm256_shuffle_ps((__m256)c[0], (__m256)c[1], 0x88); /* in each half: lanes 0 and 1 of */
    __m256 high = _mm256_shuffle_ps((__m256)c[2], (__m256)c[3], 0x88); /* two words */
    _mm256_storeu_ps((float *)to, _mm256_shuffle_ps(low, high, 0x88));
    _mm256_storeu_ps((float *)to + LANES, _mm256_shuffle_ps(low, high, 0xDD));
#else
    for (int i = 0; i < LANES / 2; i++)
        for (int k = 0; k < 4; k++) to[4 * i + k] = (uint32_t)c[k][i];
#endif
}

/* The multiplications of one set of calls wait for each other. */
enum { ROUNDS = 10, SETS = 4, CALLS = LANES / 2 };

/* Calls `call` .. `call + calls - 1` of a stream, four words each; writes SETS vectors of calls at a
 * time, so `out` must have room for calls rounded up to a multiple of SETS CALLS. */
static void philox(const Origin *origin, uint32_t purpose, uint64_t call, int64_t calls,
                   uint32_t *out) {
    uint64_t keys[ROUNDS][2];
    for (uint32_t round = 0; round < ROUNDS; round++) {
        keys[round][0] = origin->seed[0] + round * 0x9E3779B9u;
        keys[round][1] = origin->seed[1] + round * 0xBB67AE85u;
    }
#if LANES == 16
    const vl lane = {0, 1, 2, 3, 4, 5, 6, 7};
#elif LANES == 8
    const vl lane = {0, 2, 1, 3};
#else
    const vl lane = {0, 1};
#endif
    const uint64_t bucket = origin->bucket, step = origin->step;
    for (int64_t done = 0; done < calls; done += SETS * CALLS) {
        vl c[SETS][4];
        UNROLL(4)
        for (int set = 0; set < SETS; set++) {
            c[set][0] = lane + (call + done + set * CALLS);
            c[set][1] = (vl){0} + bucket;
            c[set][2] = (vl){0} + step;
            c[set][3] = (vl){0} + purpose;
        }
        UNROLL(10)
        for (int round = 0; round < ROUNDS; round++)
            UNROLL(4)
            for (int set = 0; set < SETS; set++) {
                vl p0 = multiply_low_halves(c[set][0], 0xD2511F53u);
                vl p1 = multiply_low_halves(c[set][2], 0xCD9E8D57u);
                c[set][0] = (p1 >> 32) ^ c[set][1] ^ keys[round][0];
                c[set][2] = (p0 >> 32) ^ c[set][3] ^ keys[round][1];
                c[set][1] = p1;
                c[set][3] = p0;
            }
        UNROLL(4)
        for (int set = 0; set < SETS; set++) store_words(out + 4 * (done + set * CALLS), c[set]);
    }
}
#endif

/* The signs of one block, one bit per coordinate, from the bit of its first coordinate on: blocks
 * smaller than 128 coordinates share a call. `room` is scratch that the result points into. */
static const uint8_t *draw_signs(const Plan *plan, const Origin *origin, int rotation,
                                 uint32_t rank, int64_t offset, uint32_t *room) {
    int64_t call = offset / 128, stop = (offset + plan->size + 127) / 128;
    const uint32_t purpose = (SIGNS + rotation) + 16 * origin->hop + 256 * rank;
    philox(origin, purpose, call, stop - call, room);
    return (const uint8_t *)room + (offset / 8 - call * 16);
}

static const uint8_t *draw_dither(const Plan *plan, const Origin *origin, int64_t offset,
                                  uint32_t *room) {
    philox(origin, DITHER + 16 * origin->hop, offset / 16, plan->size / 16, room);
    return (const uint8_t *)room;
}
