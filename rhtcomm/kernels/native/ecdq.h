/* ECDQ: a grid with subtractive dither, entropy-coded unit by unit. */
#pragma once
#include "quic_fl.h"
#include "rans.h"

enum { ATTEMPTS = 6 };
static const float factors[ATTEMPTS] = {1.0f, 65.0f / 64, 17.0f / 16, 1.25f, 2.0f, 16.0f};

/* The v of LANES coordinates, of the rank with this stratum. */
INLINE vu shared_dither(const uint8_t *dither, int64_t j, uint32_t stratum) {
    return ((dither_words(dither, j) >> 16) + (stratum << 8)) & 0xffff;
}

/* Encodes a block before those that `lanes` has, given its root mean square and the bits of its largest
 * magnitude. Returns its scale, or -1 where the unit does not fit. With the factor 0 it has no codes. */
static float ecdq_encode(const Plan *plan, const float *y, float rms, uint32_t peak, float factor,
                         const uint8_t *dither, uint32_t stratum, Lanes *lanes) {
    const float fitting = from_bits(peak) * plan->inverse_bound;
    const float scale = (rms > fitting ? rms : fitting) * factor;
    const float per_unit = scale > 0 ? (1.0f / scale) * plan->per_step : 0.0f;
    const int to_class = 16 - plan->class_bits;
    const uint32_t columns = 2 * plan->largest + 1;
    const int64_t tile = least(plan->size, TILE);
    uint32_t index[TILE];
    uint64_t symbols[TILE];
    for (int64_t base = plan->size - tile; factor > 0 && base >= 0; base -= tile) {
        for (int64_t j = 0; j < tile; j += LANES) {
            vu v = shared_dither(dither, base + j, stratum);
            vi k = (to_integers(load(y + base + j) * per_unit) + (vi)v) >> 16;
            *(vu *)(index + j) = (vu)(k + plan->largest) + (v >> to_class) * columns;
        }
        for (int64_t j = 0; j < tile; j++) symbols[j] = plan->symbols[index[j]];
        if (!rans_encode(plan, lanes, symbols, tile / CODER_LANES)) return -1;
    }
    return scale * plan->quarter_step;
}

/* The integers of the grid, given the columns of their symbols and the upper bytes of their dithers. */
#define GRID(column, g) (512 * ((column) - largest) - 2 * (g) + 255)

#if defined(__AVX2__)
/* The upper bytes of the v of LANES coordinates. */
INLINE vu shared_bytes(const uint8_t *dither, uint32_t stratum) {
#if defined(__AVX512F__)
    vu bytes = (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)dither));
#else
    vu bytes = (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)dither));
#endif
    return (bytes + stratum) & 0xff;
}
#endif

/* Units that are decoded side by side, which on vectors takes less time than one behind the other. */
#if defined(__AVX2__)
enum { SIDE_BY_SIDE = 2 };
#else
enum { SIDE_BY_SIDE = 1 };
#endif

/* values[k] <- those of the next block of the k-th unit, in units of its scale. */
INLINE void ecdq_values(const Plan *plan, Lanes *lanes, const int count, const uint8_t *dither,
                        const uint32_t *strata, float *const *values) {
    const u32 *table = plan->slots;
    const int precision = plan->precision, to_class = 8 - plan->class_bits;
    const int32_t largest = plan->largest;
    const int64_t size = plan->size;
#if defined(__AVX2__)
    vu states[2][VECTORS]; /* in registers, where there are enough */
#pragma GCC unroll 2
    for (int k = 0; k < count; k++)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) states[k][i] = *(const vu *)(lanes[k].x + LANES * i);
#endif
    for (int64_t j = 0; j < size; j += CODER_LANES)
#pragma GCC unroll 2
        for (int k = 0; k < count; k++) {
            uint8_t room[STEP_BYTES];
            const uint8_t *from = words_of_step(lanes[k].next, lanes[k].edge, room), *begin = from;
            float *to = values[k] + j;
#if defined(__AVX2__)
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; i++) {
                vu g = shared_bytes(dither + j + LANES * i, strata[k]);
                vu base = (g >> to_class) << precision;
                vi slot = (vi)decode_lanes(table, precision, base, &states[k][i], &from);
                vi grid = GRID((vi)((vu)slot >> 24), (vi)g);
                store(to + LANES * i, __builtin_convertvector(grid, vf) * 0x1p-7f);
            }
#else
            for (int i = 0; i < CODER_LANES; i++) {
                const uint8_t g = (uint8_t)(dither[j + i] + strata[k]);
                const uint32_t base = (uint32_t)(g >> to_class) << precision;
                uint32_t slot = decode_lane(table, precision, base, lanes[k].x + i, &from);
                to[i] = (float)GRID((int32_t)(slot >> 24), g) * 0x1p-7f;
            }
#endif
            lanes[k].next += least(lanes[k].edge - lanes[k].next, from - begin);
        }
#if defined(__AVX2__)
#pragma GCC unroll 2
    for (int k = 0; k < count; k++)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) *(vu *)(lanes[k].x + LANES * i) = states[k][i];
#endif
}

static void ecdq_values_of_one(const Plan *plan, Lanes *lanes, const uint8_t *dither,
                               const uint32_t *strata, float *const *values) {
    ecdq_values(plan, lanes, 1, dither, strata, values);
}

static void ecdq_values_of_two(const Plan *plan, Lanes *lanes, const uint8_t *dither,
                               const uint32_t *strata, float *const *values) {
    ecdq_values(plan, lanes, 2, dither, strata, values);
}
