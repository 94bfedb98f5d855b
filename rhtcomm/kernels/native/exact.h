/* The coordinates that QUIC-FL sends exactly. The section of a block has C ascending indices, -1 for
 * those that are not needed, followed by C values in float16. */
#pragma once
#include "formats.h"
#include "plan.h"
#include "vectors.h"

INLINE int64_t index_bytes(const Plan *plan) { return plan->size <= 1 << 15 ? 2 : 4; }

INLINE int32_t read_index(const uint8_t *from, int64_t width) {
    int16_t narrow;
    int32_t wide;
    memcpy(&narrow, from, 2);
    if (width == 2) return narrow;
    memcpy(&wide, from, 4);
    return wide;
}

#if defined(__aarch64__)
enum { TOGETHER = 16, APART = 4 };

/* Bit 4 i is set where |y[i]| factor > bound, for 16 coordinates. */
INLINE uint64_t lanes_beyond(const float *y, float factor, float bound) {
    uint16x4_t beyond[4];
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        const vf magnitude = (vf)((vu)load(y + LANES * i) & 0x7fffffffu) * factor;
        beyond[i] = vmovn_u32((uint32x4_t)(magnitude > bound));
    }
    const uint8x8_t low = vmovn_u16(vcombine_u16(beyond[0], beyond[1]));
    const uint8x8_t high = vmovn_u16(vcombine_u16(beyond[2], beyond[3]));
    const uint16x8_t all = vreinterpretq_u16_u8(vcombine_u8(low, high));
    const uint64x1_t nibbles = vreinterpret_u64_u8(vshrn_n_u16(all, 4));
    return vget_lane_u64(nibbles, 0) & 0x1111111111111111u;
}
#else
enum { TOGETHER = LANES, APART = 1 };

/* Bit i is set where |y[i]| factor > bound, for LANES coordinates. */
INLINE uint64_t lanes_beyond(const float *y, float factor, float bound) {
    vf magnitude = (vf)((vu)load(y) & 0x7fffffffu) * factor;
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)magnitude, _mm512_set1_ps(bound), _CMP_GT_OQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)(magnitude > bound));
#else
    uint32_t lanes = 0;
    for (int i = 0; i < LANES; i++) lanes |= (uint32_t)(magnitude[i] > bound) << i;
    return lanes;
#endif
}
#endif

/* The number of which `nth` of a[0 .. n-1], none of them negative, are larger: the bits of the
 * largest number that more than `nth` reach, from the highest on. */
static float nth_largest(const float *a, int64_t n, int64_t nth) {
    const i32 *bits = (const i32 *)a;
    int32_t found = 0;
    for (int32_t bit = 1 << 30; bit; bit >>= 1) {
        int64_t count = 0;
        for (int64_t i = 0; i < n; i++) count += bits[i] >= (found | bit);
        if (count > nth) found |= bit;
    }
    return from_bits((uint32_t)found);
}

/* Writes the section of a block, sets to zero in y what it holds, and returns the scale, at least
 * `rms`. `indices` and `room` are scratch of d numbers. */
static float take_exact(const Plan *plan, float *y, float rms, const uint8_t *dither,
                        uint32_t stratum, i32 *indices, float *room, uint8_t *section) {
    const int64_t capacity = plan->exact_capacity, width = index_bytes(plan);
    int64_t found = 0, used = 0;
    for (int64_t j = 0; j < plan->size; j += TOGETHER)
        for (uint64_t lanes = lanes_beyond(y + j, plan->inverse_bound, rms); lanes;
             lanes &= lanes - 1)
            indices[found++] = (int32_t)j + __builtin_ctzll(lanes) / APART;
    float scale = rms;
    if (found > capacity) {
        for (int64_t i = 0; i < found; i++) room[i] = fabsf(y[indices[i]]) * plan->inverse_bound;
        scale = nth_largest(room, found, capacity);
    }
    memset(section, 0xff, capacity * width);
    memset(section + capacity * width, 0, capacity * 2);
    for (int64_t i = 0; i < found; i++) {
        const int32_t j = indices[i]; /* whose first two bytes are its int16, little-endian */
        if (!(fabsf(y[j]) * plan->inverse_bound > scale)) continue;
        uint32_t word, turn = 8 * (j % 4) + 8;
        memcpy(&word, dither + (j & ~3), 4);
        uint32_t u = ((word >> (turn & 31) | word << ((32 - turn) & 31)) + 256 * stratum) & 0xffff;
        uint32_t rounded = (to_bits(y[j] / scale) + (u >> 3)) & ~0x1fffu;
        uint16_t value = to_half(from_bits(rounded));
        memcpy(section + used * width, &j, width);
        memcpy(section + capacity * width + used * 2, &value, 2);
        used++;
        y[j] = 0.0f;
    }
    return scale;
}

/* sums <- what y holds at the exact coordinates after this rank's have been added, and their indices;
 * returns their number, and clears `finite` if one of them is not. The section may hold any bytes. */
static int64_t exact_sums(const Plan *plan, const uint8_t *section, float scale, int initial,
                          const float *y, i32 *indices, float *sums, int *finite) {
    const int64_t capacity = plan->exact_capacity, width = index_bytes(plan);
    int64_t count = 0;
    int32_t before = -1;
    for (int64_t i = 0; i < capacity; i++) {
        const int32_t index = read_index(section + i * width, width);
        if (index <= before) continue;
        if (index >= plan->size) break;
        before = index;
        uint16_t half;
        memcpy(&half, section + capacity * width + i * 2, 2);
        if ((half & 0x7c00) == 0x7c00) *finite = 0;
        float value = from_half(half) * scale;
        indices[count] = index;
        sums[count++] = initial ? value : y[index] + value;
    }
    return count;
}
