/* Philox for aarch64: a vector has the same word of four calls. */
#pragma once
#include "plan.h"
#include "vectors.h"

enum { ROUNDS = 10, SETS = 4, CALLS = LANES }; /* calls of a set */

/* The lower and upper halves of the products of a and b. */
INLINE void multiply_words(uint32x4_t a, uint32x4_t b, uint32x4_t *low, uint32x4_t *high) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(b)));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_u32(a, b));
    *low = vuzp1q_u32(first, second);
    *high = vuzp2q_u32(first, second);
}

/* As philox() of philox.h says, of SETS CALLS calls at a time. */
static void philox(const Origin *origin, uint32_t purpose, uint64_t call, int64_t calls,
                   uint32_t *out) {
    const uint32x4_t m0 = vdupq_n_u32(0xD2511F53u), m1 = vdupq_n_u32(0xCD9E8D57u);
    for (int64_t done = 0; done < calls; done += SETS * CALLS) {
        uint32x4x4_t c[SETS];
        UNROLL(4)
        for (int set = 0; set < SETS; set++) {
            const uint32_t first = (uint32_t)(call + (uint64_t)(done + set * CALLS));
            c[set].val[0] = vaddq_u32((uint32x4_t)ascending, vdupq_n_u32(first));
            c[set].val[1] = vdupq_n_u32(origin->bucket);
            c[set].val[2] = vdupq_n_u32(origin->step);
            c[set].val[3] = vdupq_n_u32(purpose);
        }
        uint32x4_t k0 = vdupq_n_u32(origin->seed[0]), k1 = vdupq_n_u32(origin->seed[1]);
        UNROLL(10)
        for (int round = 0; round < ROUNDS; round++) {
            UNROLL(4)
            for (int set = 0; set < SETS; set++) {
                uint32x4_t *word = c[set].val, low0, high0, low1, high1;
                multiply_words(word[0], m0, &low0, &high0);
                multiply_words(word[2], m1, &low1, &high1);
                word[0] = veorq_u32(veorq_u32(word[1], k0), high1);
                word[2] = veorq_u32(veorq_u32(word[3], k1), high0);
                word[1] = low1;
                word[3] = low0;
            }
            k0 = vaddq_u32(k0, vdupq_n_u32(0x9E3779B9u));
            k1 = vaddq_u32(k1, vdupq_n_u32(0xBB67AE85u));
        }
        UNROLL(4)
        for (int set = 0; set < SETS; set++) vst4q_u32(out + 4 * (done + set * CALLS), c[set]);
    }
}
