/* ECDQ: a grid with subtractive dither, entropy-coded unit by unit. */
#pragma once
#include "quic_fl.h"
#include "rans.h"

enum { ATTEMPTS = 6 };
static const float factors[ATTEMPTS] = {1.0f, 65.0f / 64, 17.0f / 16, 1.25f, 2.0f, 16.0f};

/* The symbols of CODER_LANES coordinates: k + K, plus 2 K + 1 for each class below. */
INLINE void ecdq_symbols(const Plan *plan, const float *y, float per_unit, const uint8_t *dither,
                         uint32_t stratum, uint8_t *symbols) {
    const int to_class = 16 - plan->class_bits;
    const int32_t columns = 2 * plan->largest + 1;
#if defined(__AVX512F__)
    uint8_t from __attribute__((vector_size(64))); /* those of dither_halves, side by side */
    for (int i = 0; i < 64; i++) from[i] = (uint8_t)(i / 8 % 2 * 4 + (i / 2 + 3 + i % 2) % 4);
    const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    __m512i v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)dither));
    v = _mm512_shuffle_epi8(_mm512_permutexvar_epi64(twice, v), (__m512i)from);
    v = _mm512_add_epi16(v, _mm512_set1_epi16((short)(stratum << 8)));
    const __m512i a = (__m512i)to_integers(load(y) * per_unit);
    const __m512i b = (__m512i)to_integers(load(y + LANES) * per_unit);
    const __m512i low = _mm512_add_epi16(halves(a, b, 0), v);
    const __m512i k = carry(halves(a, b, 1), _mm512_cmplt_epu16_mask(low, v));
    __m512i class = _mm512_srl_epi16(v, _mm_cvtsi32_si128(to_class));
    __m512i zero = _mm512_mullo_epi16(class, _mm512_set1_epi16((short)columns));
    zero = _mm512_add_epi16(zero, _mm512_set1_epi16((short)plan->largest));
    _mm256_storeu_si256((__m256i *)symbols, _mm512_cvtepi16_epi8(_mm512_add_epi16(k, zero)));
#elif defined(__aarch64__)
    (void)to_class, (void)columns;
    for (int i = 0; i < CODER_LANES; i += 16)
        ecdq_sixteen(plan, y + i, per_unit, dither + i, stratum, symbols + i);
#else
    vu numbers[VECTORS];
    UNROLL(8)
    for (int i = 0; i < VECTORS; i++) {
        vu v = dither_halves(dither, LANES * i, 1, (vu){0} + (stratum << 8));
        vi k = (to_integers(load(y + LANES * i) * per_unit) + (vi)v) >> 16;
        numbers[i] = (vu)(k + (vi)(v >> to_class) * columns + plan->largest);
    }
    store_bytes(symbols, numbers);
#endif
}

/* The symbols of a block, given its root mean square and the bits of its largest magnitude. Returns its
 * scale, which `factor` multiplies. Fetches d `width` bytes from `next` on. */
static float ecdq_quantize(const Plan *plan, const float *y, float rms, uint32_t peak, float factor,
                           const uint8_t *dither, uint32_t stratum, const char *next,
                           int64_t width, uint8_t *symbols) {
    const Plan p = *plan; /* a local copy, which stores of bytes cannot alias */
    const float fitting = from_bits(peak) * p.inverse_bound;
    const float scale = (rms > fitting ? rms : fitting) * factor;
    const float per_unit = scale > 0 ? (1.0f / scale) * p.per_step : 0.0f;
    for (int64_t j = 0; j < p.size; j += CODER_LANES) {
        fetch(next + j * width, CODER_LANES * width);
        ecdq_symbols(&p, y + j, per_unit, dither + j, stratum, symbols + j);
    }
    return scale * p.quarter_step;
}

/* The classes of a block's coordinates: the upper bits of their dithers. */
static void ecdq_classes(const Plan *plan, const uint8_t *dither, uint32_t stratum, uint8_t *classes) {
    typedef uint8_t bytes __attribute__((vector_size(CODER_LANES), aligned(1), may_alias));
    typedef uint32_t words __attribute__((vector_size(CODER_LANES), aligned(1), may_alias));
    const int64_t size = plan->size;
    const int to_class = 8 - plan->class_bits;
    const uint32_t mask = ((1u << plan->class_bits) - 1) * 0x01010101u;
    for (int64_t j = 0; j < size; j += CODER_LANES) {
        bytes g = *(const bytes *)(dither + j) + (uint8_t)stratum;
        *(words *)(classes + j) = (words)g >> to_class & mask;
    }
}

/* 256 column + 255 - g of CODER_LANES coordinates, g the upper bytes of their dithers. */
INLINE void ecdq_points(const uint8_t *columns, const uint8_t *dither, uint32_t stratum, vf *points) {
#if defined(__AVX2__)
    __m256i column = _mm256_loadu_si256((const __m256i *)columns);
    __m256i g = _mm256_loadu_si256((const __m256i *)dither);
    g = _mm256_sub_epi8(_mm256_set1_epi8((char)(255 - stratum)), g); /* 255 less it */
#endif
#if defined(__AVX512F__)
    __m512i words = _mm512_slli_epi16(_mm512_cvtepu8_epi16(column), 8);
    words = _mm512_or_si512(words, _mm512_cvtepu8_epi16(g));
    points[0] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)));
    points[1] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1)));
#elif defined(__AVX2__)
    /* The next steps work on halves of vectors; this makes coordinates come out in order. */
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    column = _mm256_permutevar8x32_epi32(column, order);
    g = _mm256_permutevar8x32_epi32(g, order);
    UNROLL(4)
    for (int i = 0; i < VECTORS; i++) {
        __m256i words = i < 2 ? _mm256_unpacklo_epi8(g, column) : _mm256_unpackhi_epi8(g, column);
        const __m256i zero = _mm256_setzero_si256();
        words = i % 2 ? _mm256_unpackhi_epi16(words, zero) : _mm256_unpacklo_epi16(words, zero);
        points[i] = (vf)_mm256_cvtepi32_ps(words);
    }
#elif defined(__aarch64__)
    for (int i = 0; i < CODER_LANES; i += 16)
        points_of_sixteen(columns + i, dither + i, stratum, points + i / LANES);
#else
    for (int i = 0; i < VECTORS; i++) {
        vu column = load_bytes(columns + LANES * i), g = load_bytes(dither + LANES * i) + stratum;
        points[i] = __builtin_convertvector((vi)(column << 8 | (~g & 0xff)), vf);
    }
#endif
}

/* y <- or y += scale * value(column, dither); values are multiples of 2^-7, and exact. */
INLINE void ecdq_add(const Plan *plan, const uint8_t *columns, const uint8_t *dither, uint32_t stratum,
                     float scale, const int initial, float *y) {
    const int64_t size = plan->size;
    const float middle = (float)(512 * plan->largest + 255) * 0x1p-7f;
    for (int64_t j = 0; j < size; j += CODER_LANES) {
        vf points[VECTORS];
        ecdq_points(columns + j, dither + j, stratum, points);
        UNROLL(8)
        for (int i = 0; i < VECTORS; i++) {
            vf value = (points[i] * 0x1p-6f - middle) * scale;
            if (!initial) value = load(y + j + LANES * i) + value;
            store(y + j + LANES * i, value);
        }
    }
}
