/* The steps of QUIC-FL, ECDQ and the lattice on 16 coordinates, for aarch64: 16-bit numbers where they
 * suffice. */
#pragma once
#include "plan.h"
#include "vectors.h"

/* Numbers of 16 coordinates. */
typedef uint16x8x2_t Halves;

/* The u, or the upper v, of 16 coordinates, plus `turn`; their bytes as in dither_halves(). */
INLINE Halves sixteen_halves(const uint8_t *dither, const int upper, uint16x8_t turn) {
    static const uint8_t lower[16] = {1, 2, 2, 3, 3, 0, 0, 1, 5, 6, 6, 7, 7, 4, 4, 5};
    const uint8x16_t words = vld1q_u8(dither);
    uint8x16_t from = vld1q_u8(lower);
    if (upper) from = vreinterpretq_u8_u32(vrev64q_u32(vreinterpretq_u32_u8(from)));
    const uint8x16_t a = vqtbl1q_u8(words, from);
    const uint8x16_t b = vqtbl1q_u8(words, vaddq_u8(from, vdupq_n_u8(8)));
    const Halves h = {{vaddq_u16(vreinterpretq_u16_u8(a), turn),
                       vaddq_u16(vreinterpretq_u16_u8(b), turn)}};
    return h;
}

/* (numbers[i] + h[i]) >> 16 of 16 coordinates. */
INLINE Halves add_halves(const vu *numbers, Halves h) {
    UNROLL(2)
    for (int i = 0; i < 2; i++) {
        const uint32x4_t low = vaddw_u16((uint32x4_t)numbers[2 * i], vget_low_u16(h.val[i]));
        const uint32x4_t high = vaddw_high_u16((uint32x4_t)numbers[2 * i + 1], h.val[i]);
        h.val[i] = vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
    }
    return h;
}

/* 16 numbers below 256 as bytes. */
INLINE void store_sixteen(uint8_t *to, Halves h) {
    vst1q_u8(to, vuzp1q_u8(vreinterpretq_u8_u16(h.val[0]), vreinterpretq_u8_u16(h.val[1])));
}

/* table[i] at four signed indices of 16 bits. */
INLINE vu look_up_four(const u32 *table, uint64_t fours) {
    __asm__("" : "+r"(fours)); /* one move from the vector, not four */
    const int64_t i = (int64_t)fours;
    return (vu){table[(int16_t)i], table[(int16_t)(i >> 16)], table[(int16_t)(i >> 32)], table[i >> 48]};
}

/* table[i] at 16 of them. */
INLINE void look_up_sixteen(const u32 *table, Halves index, vu *found) {
    UNROLL(2)
    for (int i = 0; i < 2; i++) {
        const uint64x2_t fours = vreinterpretq_u64_u16(index.val[i]);
        found[2 * i] = look_up_four(table, vgetq_lane_u64(fours, 0));
        found[2 * i + 1] = look_up_four(table, vgetq_lane_u64(fours, 1));
    }
}

/* y * unit of 16 coordinates, as integers. */
INLINE void scaled_integers(const float *y, float unit, vu *numbers) {
    UNROLL(4)
    for (int i = 0; i < 4; i++) numbers[i] = (vu)to_integers(load(y + LANES * i) * unit);
}

/* The codes of y * unit. */
INLINE void quic_fl_codes(const Plan *plan, const float *y, const uint8_t *dither, uint32_t stratum,
                          float unit, uint8_t *codes) {
    const u32 *zero = (const u32 *)plan->positions + (plan->middle >> 16); /* at its node */
    const uint16x8_t turn = vdupq_n_u16((uint16_t)(stratum << 8));
    const int64_t size = plan->size;
    for (int64_t j = 0; j < size; j += 16) {
        vu numbers[4];
        scaled_integers(y + j, unit, numbers);
        const Halves nodes = add_halves(numbers, sixteen_halves(dither + j, 0, turn));
        look_up_sixteen(zero, nodes, numbers); /* their positions */
        store_sixteen(codes + j, add_halves(numbers, sixteen_halves(dither + j, 1, turn)));
    }
}

/* y <- or y += scale * level(code, dither). With tables of bytes in registers, as for AVX-512, fewer
 * instructions would take longer: on most processors, those that look up in four registers are slow. */
INLINE void quic_fl_add_sixteens(const Plan *plan, const uint8_t *codes, const uint8_t *dither,
                                 uint32_t stratum, float scale, const int initial, float *y) {
    const u32 *levels = (const u32 *)plan->levels;
    const int64_t size = plan->size;
    const uint8x16_t turn = vdupq_n_u8((uint8_t)stratum);
    const int16x8_t to_index = vdupq_n_s16((int16_t)(plan->shared_bits - 8));
    for (int64_t j = 0; j < size; j += 16, y += 16) {
        const uint8x16_t v = vaddq_u8(vld1q_u8(dither + j), turn), code = vld1q_u8(codes + j);
        const uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(v, code)); /* 256 code + v */
        const uint16x8_t high = vreinterpretq_u16_u8(vzip2q_u8(v, code));
        const Halves index = {{vshlq_u16(low, to_index), vshlq_u16(high, to_index)}};
        vu level[4];
        look_up_sixteen(levels, index, level);
        UNROLL(4)
        for (int i = 0; i < 4; i++) {
            vf value = (vf)level[i] * scale;
            if (!initial) value = load(y + LANES * i) + value;
            store(y + LANES * i, value);
        }
    }
}

/* The symbols of 16 coordinates; see ecdq.h. */
INLINE void ecdq_sixteen(const Plan *plan, const float *y, float per_unit, const uint8_t *dither,
                         uint32_t stratum, uint8_t *symbols) {
    const int16x8_t to_class = vdupq_n_s16((int16_t)(plan->class_bits - 16));
    const uint16x8_t columns = vdupq_n_u16((uint16_t)(2 * plan->largest + 1));
    const uint16x8_t largest = vdupq_n_u16((uint16_t)plan->largest);
    vu numbers[4];
    scaled_integers(y, per_unit, numbers);
    const Halves v = sixteen_halves(dither, 1, vdupq_n_u16((uint16_t)(stratum << 8)));
    Halves k = add_halves(numbers, v);
    UNROLL(2)
    for (int i = 0; i < 2; i++) {
        const uint16x8_t class = vshlq_u16(v.val[i], to_class);
        k.val[i] = vmlaq_u16(vaddq_u16(k.val[i], largest), class, columns);
    }
    store_sixteen(symbols, k);
}

/* 256 column + 255 - g of 16 coordinates; see ecdq.h. */
INLINE void points_of_sixteen(const uint8_t *columns, const uint8_t *dither, uint32_t stratum,
                              vf *points) {
    const uint8x16_t column = vld1q_u8(columns);
    const uint8x16_t g = vmvnq_u8(vaddq_u8(vld1q_u8(dither), vdupq_n_u8((uint8_t)stratum)));
    const Halves h = {{vreinterpretq_u16_u8(vzip1q_u8(g, column)),
                       vreinterpretq_u16_u8(vzip2q_u8(g, column))}};
    UNROLL(2)
    for (int i = 0; i < 2; i++) {
        points[2 * i] = (vf)vcvtq_f32_u32(vmovl_u16(vget_low_u16(h.val[i])));
        points[2 * i + 1] = (vf)vcvtq_f32_u32(vmovl_high_u16(h.val[i]));
    }
}

/* codes <- (y * per_unit + middle + v) >> 16; see lattice.h. */
INLINE void lattice_codes(const float *y, int64_t size, float per_unit, const uint8_t *dither,
                          uint32_t stratum, int32_t middle, u32 *codes) {
    const uint16x8_t turn = vdupq_n_u16((uint16_t)stratum);
    for (int64_t j = 0; j < size; j += 16) {
        vu numbers[4];
        scaled_integers(y + j, per_unit, numbers);
        UNROLL(4)
        for (int i = 0; i < 4; i++) numbers[i] += (uint32_t)middle;
        const Halves code = add_halves(numbers, sixteen_halves(dither + j, 1, turn));
        UNROLL(2)
        for (int i = 0; i < 2; i++) {
            *(vu *)(codes + j + 8 * i) = (vu)vmovl_u16(vget_low_u16(code.val[i]));
            *(vu *)(codes + j + 8 * i + LANES) = (vu)vmovl_high_u16(code.val[i]);
        }
    }
}
