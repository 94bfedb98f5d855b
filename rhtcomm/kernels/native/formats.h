/* Number formats of tensors. */
#pragma once
#include "plan.h"
#include "vectors.h"

/* float16 by integers and exact float32 steps: older compilers have no type for it. */
INLINE float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = (uint32_t)(half & 0x7fff) << 13;
    if (magnitude >= 0x0f800000) return from_bits(sign | 0x70000000 | magnitude); /* inf, NaN */
    return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));
}

INLINE uint16_t to_half(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7e00;                     /* NaN */
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00); /* 2^16 and more */
    if (magnitude < 0x38800000) /* below 2^-14: adding 1/2 rounds at the subnormals' last bit */
        return (uint16_t)(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

/* Of `count` numbers. */
INLINE void from_halves(const uint16_t *from, int64_t count, float *y) {
    int64_t j = 0;
#if defined(__aarch64__)
    for (; j + 4 <= count; j += 4) store(y + j, (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + j))));
#endif
    for (; j < count; j++) y[j] = from_half(from[j]);
}

INLINE void to_halves(const float *y, int64_t count, uint16_t *to) {
    int64_t j = 0;
#if defined(__aarch64__)
    for (; j + 4 <= count; j += 4) {
        const float32x4_t v = (float32x4_t)load(y + j);
        const uint16x4_t number = vmovn_u32(vceqq_f32(v, v)), nan = vdup_n_u16(0x7e00);
        vst1_u16(to + j, vbsl_u16(number, vreinterpret_u16_f16(vcvt_f16_f32(v)), nan));
    }
#endif
    for (; j < count; j++) to[j] = to_half(y[j]);
}

static int64_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* y[0 .. size-1] from x[0 .. count-1], then zeros. */
static void read_block(const void *x, int dtype, int64_t count, int64_t size, float *y) {
    if (dtype == FLOAT32) {
        memcpy(y, x, 4 * count);
    } else if (dtype == BFLOAT16) {
        const uint16_t *from = x;
        for (int64_t j = 0; j < count; j++) ((u32 *)y)[j] = (uint32_t)from[j] << 16;
    } else {
        from_halves(x, count, y);
    }
    memset(y + count, 0, 4 * (size - count));
}

static void write_block(const float *y, int dtype, int64_t count, void *x) {
    if (dtype == FLOAT32) {
        memcpy(x, y, 4 * count);
    } else if (dtype == BFLOAT16) {
        uint16_t *to = x;
        const u32 *bits = (const u32 *)y;
        for (int64_t j = 0; j < count; j++) { /* to nearest, ties to even; NaN stays NaN */
            uint32_t rounded = (bits[j] + 0x7fff + ((bits[j] >> 16) & 1)) >> 16;
            to[j] = (bits[j] & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
        }
    } else {
        to_halves(y, count, x);
    }
}
