/* The Hadamard transform. */
#pragma once
#include "sums.h"
#include "vectors.h"

/* The vectors of the first pass, and those that a later one has side by side. */
#if defined(__aarch64__) /* which has 32 registers, and loads and stores two at a time */
enum { FIRST = 16, SIDE = 2 };
#else
enum { FIRST = RADIX, SIDE = 1 };
#endif

/* The highest bits are `signs` from bit j on, which begin in lane 0; others follow. May read, and ignore,
 * the 3 bytes behind. */
INLINE vu highest_signs(const uint8_t *signs, int64_t j) {
    uint32_t word;
#if defined(__aarch64__) /* 32 bits at a time */
    memcpy(&word, signs + (uint64_t)j / 32 * 4, 4);
    const vu last = ((vu){0} + word) << (3 - (vu)ascending); /* from bit 28 on */
    return last << (28 - (uint32_t)j % 32);
#else
    memcpy(&word, signs + j / 8, 4);
    if (LANES < 8) word >>= j % 8;
    return ((vu){0} + word) << (31 - (vu)ascending);
#endif
}

/* Lanes whose bit is set in the LANES bits of `signs` from bit j on are negated. May read, and ignore,
 * the 3 bytes behind these. */
INLINE vf apply_signs(vf v, const uint8_t *signs, int64_t j) {
#if defined(__AVX512F__)
    const __m512i highest = (__m512i)highest_signs(signs, j); /* v ^ highest & INT32_MIN: */
    return (vf)_mm512_ternarylogic_epi32((__m512i)v, highest, _mm512_set1_epi32(INT32_MIN), 0x78);
#elif defined(__aarch64__)
    const uint32x4_t bits = (uint32x4_t)((vu)v ^ highest_signs(signs, j));
    return (vf)vbslq_u32(vdupq_n_u32(0x80000000u), bits, (uint32x4_t)v);
#else
    return (vf)((vu)v ^ (highest_signs(signs, j) & 0x80000000u));
#endif
}

/* The same of v * factor, where factor >= 0. */
INLINE vf times_signed(vf v, float factor, const uint8_t *signs, int64_t j) {
#if defined(__aarch64__)
    const uint32x4_t bits = (uint32x4_t)highest_signs(signs, j);
    return v * (vf)vbslq_u32(vdupq_n_u32(0x80000000u), bits, vdupq_n_u32(to_bits(factor)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256 plus = _mm256_set1_ps(factor), minus = _mm256_set1_ps(-factor);
    return v * (vf)_mm256_blendv_ps(plus, minus, (__m256)highest_signs(signs, j));
#else
    return apply_signs(v * factor, signs, j);
#endif
}

/* Lane i takes the value of lane i ^ stride. */
INLINE vf swap_lanes(vf v, const int stride) {
#if defined(__AVX512F__)
    switch (stride) {
    case 1: return (vf)_mm512_permute_ps((__m512)v, 0xB1);
    case 2: return (vf)_mm512_permute_ps((__m512)v, 0x4E);
    case 4: return (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xB1);
    default: return (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4E);
    }
#elif defined(__AVX2__)
    switch (stride) {
    case 1: return (vf)_mm256_permute_ps((__m256)v, 0xB1);
    case 2: return (vf)_mm256_permute_ps((__m256)v, 0x4E);
    default: return (vf)_mm256_permute2f128_ps((__m256)v, (__m256)v, 0x01);
    }
#elif defined(__aarch64__)
    return stride == 1 ? (vf)vrev64q_f32((float32x4_t)v)
                       : (vf)vextq_f32((float32x4_t)v, (float32x4_t)v, 2);
#else
    vf out;
    for (int i = 0; i < LANES; i++) out[i] = v[i ^ stride];
    return out;
#endif
}

/* a * b + c, where a * b is exact, so that fusing the two rounds like two steps. */
INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* Butterflies between the lanes of one vector: (a, b) -> (a + b, a - b), lanes `stride` apart. */
INLINE vf lane_stage(vf v, const int stride) {
    const vi minus = (ascending & stride) != 0;
    const vf sign = (vf)((to_bits(1.0f) + (vu){0}) | ((vu)minus & 0x80000000u));
    return multiply_add(v, sign, swap_lanes(v, stride));
}

INLINE vf lane_stages(vf v) {
    UNROLL(4)
    for (int stride = 1; stride < LANES; stride *= 2) v = lane_stage(v, stride);
    return v;
}

/* a - b, on units that additions leave idle. */
INLINE vf subtract(vf a, vf b) {
#if defined(__AVX2__)
    return multiply_add(b, (vf){0} - 1.0f, a);
#else
    return a - b;
#endif
}

INLINE void register_stages(vf *r, const int radix) {
    UNROLL(8)
    for (int stride = 1; stride < radix; stride *= 2)
        UNROLL(16)
        for (int i = 0; i < radix; i++)
            if (!(i & stride)) {
                vf a = r[i], b = r[i + stride];
                r[i] = a + b;
                r[i + stride] = subtract(a, b);
            }
}

/* What the last pass of a transform measures of its results. */
typedef struct {
    float *squares; /* sums of a halving tree, as far as the pass has the terms at hand: h of them */
    vi peak;        /* the largest magnitude, by lanes */
} Measures;

/* What the last pass of a transform does to its results: to <- signs * results * factors[0] * factors[1]. */
typedef struct {
    float *to;
    const uint8_t *signs;
    float factors[2];
} Finish;

/* v belongs at j + ahead, where `ahead` is a multiple of 8. */
INLINE void store_finished(const Finish *finish, int64_t j, int64_t ahead, vf v) {
    v = times_signed(v, finish->factors[0], finish->signs + ahead / 8, j) * finish->factors[1];
    store(finish->to + j + ahead, v);
}

/* The squares of results that lie side by side in r, and their largest magnitude. */
INLINE void measure(Measures *measures, int64_t j, const vf *r, const int radix) {
    vf square[8];
    UNROLL(8)
    for (int i = 0; i < radix / 2; i++) {
        vf a = r[i], b = r[i + radix / 2];
        square[i] = a * a + b * b;
        vi magnitude = larger((vi)a & INT32_MAX, (vi)b & INT32_MAX);
        measures->peak = larger(measures->peak, magnitude);
    }
    UNROLL(4)
    for (int half = radix / 4; half; half /= 2)
        UNROLL(4)
        for (int i = 0; i < half; i++) square[i] = square[i] + square[i + half];
    store(measures->squares + j, square[0]);
}

/* Strides h, 2 h, ..., radix h / 2, for h >= LANES SIDE. */
INLINE void wide_pass(float *y, int64_t size, int64_t h, const int radix, Measures *measures,
                      const Finish *finish) {
    for (int64_t base = 0; base < size; base += h * radix)
        for (int64_t j = 0; j < h; j += LANES * SIDE) {
            vf r[SIDE][16];
            UNROLL(16)
            for (int i = 0; i < radix; i++)
                UNROLL(2)
                for (int k = 0; k < SIDE; k++) r[k][i] = load(y + base + j + k * LANES + i * h);
            UNROLL(2)
            for (int k = 0; k < SIDE; k++) register_stages(r[k], radix);
            UNROLL(16)
            for (int i = 0; i < radix; i++)
                UNROLL(2)
                for (int k = 0; k < SIDE; k++)
                    if (finish) /* `|` shows compilers that both share the word of their signs */
                        store_finished(finish, (base + j) | (k * LANES), i * h, r[k][i]);
                    else
                        store(y + base + j + k * LANES + i * h, r[k][i]);
            if (!measures) continue;
            UNROLL(2)
            for (int k = 0; k < SIDE; k++) measure(measures, j + k * LANES, r[k], radix);
        }
}

/* y <- factor * signs * from, or from where signs is NULL, and strides up to LANES radix / 2. A stage goes
 * through all vectors before the next one, since each step of a vector waits for the one before. */
INLINE void first_pass(float *y, const float *from, int64_t size, const uint8_t *signs, float factor,
                       const char *ahead, int64_t width, const int radix) {
    for (int64_t base = 0; base < size; base += LANES * radix) {
        vf r[16];
        if (width) fetch(ahead + base * width, LANES * radix * width);
        UNROLL(16)
        for (int i = 0; i < radix; i++) {
            r[i] = load(from + base + i * LANES);
            if (signs) r[i] = times_signed(r[i], factor, signs + base / 8, i * LANES);
        }
        UNROLL(4)
        for (int stride = 1; stride < LANES; stride *= 2)
            UNROLL(16)
            for (int i = 0; i < radix; i++) r[i] = lane_stage(r[i], stride);
        register_stages(r, radix);
        UNROLL(16)
        for (int i = 0; i < radix; i++) store(y + base + i * LANES, r[i]);
    }
}

/* y <- d^(1/2) H (factor * signs * from), or of `from` where signs is NULL, strides ascending. Fetches
 * d `width` bytes from `ahead` on, which may be NULL if that is 0. Where `measures` or `finish` is given,
 * fills or obeys it, and returns the h of measures, or returns 0 where a block is too small for that. */
INLINE int64_t transform(float *y, const float *from, int64_t size, const uint8_t *signs,
                         float factor, const char *ahead, int64_t width, Measures *measures,
                         const Finish *finish) {
    int64_t h;
    if (size >= LANES * FIRST) {
        if (signs)
            first_pass(y, from, size, signs, factor, ahead, width, FIRST);
        else
            first_pass(y, from, size, NULL, factor, ahead, width, FIRST);
        h = LANES * FIRST;
    } else if (FIRST > RADIX) { /* size = LANES RADIX */
        if (signs)
            first_pass(y, from, size, signs, factor, ahead, width, RADIX);
        else
            first_pass(y, from, size, NULL, factor, ahead, width, RADIX);
        h = LANES * RADIX;
    } else {
        for (int64_t base = 0; base < size; base += LANES) {
            vf v = load(from + base);
            if (signs) v = times_signed(v, factor, signs, base);
            store(y + base, lane_stages(v));
        }
        h = LANES;
    }
    for (; size / h > RADIX; h *= RADIX) wide_pass(y, size, h, RADIX, NULL, NULL);
    switch (size / h) {
    case 16: wide_pass(y, size, h, 16, measures, finish); break;
    case 8: wide_pass(y, size, h, 8, measures, finish); break;
    case 4: wide_pass(y, size, h, 4, measures, finish); break;
    case 2: wide_pass(y, size, h, 2, measures, finish); break;
    default: return 0;
    }
    return h;
}

static void hadamard(float *y, const float *from, int64_t size, const uint8_t *signs, float factor,
                     const char *ahead, int64_t width) {
    transform(y, from, size, signs, factor, ahead, width, NULL, NULL);
}

/* The same; returns the halving-tree sum of y[j]^2, and the largest magnitude in `peak`. `room` holds
 * d / 2 floats. */
static float hadamard_measured(float *y, const float *from, int64_t size, const uint8_t *signs,
                               float factor, const char *ahead, int64_t width, float *room,
                               uint32_t *peak) {
    Measures measures = {.squares = room};
    int64_t h = transform(y, from, size, signs, factor, ahead, width, &measures, NULL);
    *peak = h ? largest_lane(measures.peak) : largest_magnitude(y, size);
    if (!h) return tree_dot(y, y, size, room);
    return tree_sum(room, h);
}

/* finish->to <- d^(1/2) H (signs * from), then as `finish` says; y is scratch, and may be `from`. */
static void hadamard_finished(float *y, const float *from, int64_t size, const uint8_t *signs,
                              const char *ahead, int64_t width, const Finish *finish) {
    const Finish f = *finish; /* a local copy, which stores of vectors cannot alias */
    if (!transform(y, from, size, signs, 1.0f, ahead, width, NULL, &f))
        for (int64_t j = 0; j < size; j += LANES) store_finished(&f, j, 0, load(y + j));
}
