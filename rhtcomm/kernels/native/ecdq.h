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

/* room <- the values of the next block of `count` ranks, one or two, in units of their scales. */
static void ecdq_values(const Plan *plan, Lanes *lanes, int count, const uint8_t *dither,
                        const uint32_t *strata, float *const *room) {
    const int to_class = 16 - plan->class_bits;
    u32 *base[2] = {(u32 *)room[0], (u32 *)room[1]};
    for (int k = 0; k < count; k++)
        for (int64_t j = 0; j < plan->size; j += LANES) {
            vu v = shared_dither(dither, j, strata[k]);
            *(vu *)(base[k] + j) = (v >> to_class) << plan->precision;
        }
    rans_decode(plan, lanes, count, base, plan->size / CODER_LANES);
    for (int k = 0; k < count; k++)
        for (int64_t j = 0; j < plan->size; j += LANES) {
            vi g = (vi)(shared_dither(dither, j, strata[k]) >> 8);
            vi grid = 512 * (*(const vi *)(base[k] + j) - plan->largest) - 2 * g + 255;
            store(room[k] + j, __builtin_convertvector(grid, vf) * 0x1p-7f);
        }
}
