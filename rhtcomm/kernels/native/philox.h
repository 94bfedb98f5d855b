/* Random streams of Philox4x32-10; see randomness.py. */
#pragma once
#include "plan.h"
#include "vectors.h"

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

/* low[0], high[0], low[1], high[1], ... */
INLINE void store_pairs(uint32_t *to, vl low, vl high) {
#if defined(__AVX512F__)
    const __m512i lower = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i upper = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64((__m512i)low, lower, (__m512i)high));
    _mm512_storeu_si512(to + LANES, _mm512_permutex2var_epi64((__m512i)low, upper, (__m512i)high));
#else
    for (int i = 0; i < LANES / 2; i++) {
        memcpy(to + 4 * i, (char *)&low + 8 * i, 8);
        memcpy(to + 4 * i + 2, (char *)&high + 8 * i, 8);
    }
#endif
}

enum { ROUNDS = 10, SETS = 2 }; /* the multiplications of one set wait for each other */

/* Calls `call` .. `call + calls - 1` of a stream, four words each; writes SETS vectors of calls at a
 * time, so `out` must have room for calls rounded up to a multiple of SETS LANES / 2. */
static void philox(const Origin *origin, uint32_t purpose, uint64_t call, int64_t calls,
                   uint32_t *out) {
    const int64_t width = LANES / 2;
    uint64_t keys[ROUNDS][2];
    for (uint32_t round = 0; round < ROUNDS; round++) {
        keys[round][0] = origin->seed[0] + round * 0x9E3779B9u;
        keys[round][1] = origin->seed[1] + round * 0xBB67AE85u;
    }
    vl lane;
    for (int i = 0; i < width; i++) lane[i] = i;
    for (int64_t done = 0; done < calls; done += SETS * width) {
        vl c[SETS][4];
#pragma GCC unroll 2
        for (int set = 0; set < SETS; set++) {
            c[set][0] = lane + (call + done + set * width);
            c[set][1] = (vl){0} + origin->bucket;
            c[set][2] = (vl){0} + origin->step;
            c[set][3] = (vl){0} + purpose;
        }
#pragma GCC unroll 10
        for (int round = 0; round < ROUNDS; round++)
#pragma GCC unroll 2
            for (int set = 0; set < SETS; set++) {
                vl p0 = multiply_low_halves(c[set][0], 0xD2511F53u);
                vl p1 = multiply_low_halves(c[set][2], 0xCD9E8D57u);
                c[set][0] = (p1 >> 32) ^ c[set][1] ^ keys[round][0];
                c[set][2] = (p0 >> 32) ^ c[set][3] ^ keys[round][1];
                c[set][1] = p1;
                c[set][3] = p0;
            }
#pragma GCC unroll 2
        for (int set = 0; set < SETS; set++) {
            vl low = (c[set][0] & 0xffffffffu) | (c[set][1] << 32);
            vl high = (c[set][2] & 0xffffffffu) | (c[set][3] << 32);
            store_pairs(out + 4 * (done + set * width), low, high);
        }
    }
}

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
