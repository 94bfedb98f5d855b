/* ECDQ: a grid with subtractive dither, entropy-coded unit by unit. */
#pragma once
#include "quic_fl.h"
#include "rans.h"

enum { ATTEMPTS = 6 };
static const float factors[ATTEMPTS] = {1.0f, 65.0f / 64, 17.0f / 16, 1.25f, 2.0f, 16.0f};

/* The upper half of a dither word, of LANES coordinates, in rank order. */
INLINE vu shared_dither(const uint8_t *dither, int64_t j, uint32_t stratum) {
    return ((dither_words(dither, j) >> 16) + (stratum << 8)) & 0xffff;
}

/* Encodes a block before those that `lanes` has, given its root mean square and the bits of its largest
 * magnitude. Returns its scale, or -1 where the unit does not fit. With the factor 0 it has no codes.
 * `index` is scratch of d numbers. */
static float ecdq_encode(const Plan *plan, const float *y, float rms, uint32_t peak, float factor,
                         const uint8_t *dither, uint32_t stratum, Lanes *lanes, u32 *index) {
    const float fitting = from_bits(peak) * plan->inverse_bound;
    const float scale = (rms > fitting ? rms : fitting) * factor;
    const float per_unit = scale > 0 ? (1.0f / scale) * plan->per_step : 0.0f;
    const int to_class = 16 - plan->class_bits;
    const uint32_t columns = 2 * plan->largest + 1;
    for (int64_t j = 0; j < plan->size; j += LANES) {
        vu v = shared_dither(dither, j, stratum);
        vi k = (to_integers(load(y + j) * per_unit) + (vi)v) >> 16;
        *(vu *)(index + j) = (vu)(k + plan->largest) + (v >> to_class) * columns;
    }
    if (factor > 0 && !rans_encode(plan, lanes, index, plan->size / CODER_LANES)) return -1;
    return scale * plan->quarter_step;
}

/* y <- or y += scale * value, of the next block. `room` is scratch of d numbers. */
static void ecdq_add(const Plan *plan, Lanes *lanes, const uint8_t *dither, uint32_t stratum,
                     float scale, int initial, u32 *room, float *y) {
    const int to_class = 16 - plan->class_bits;
    for (int64_t j = 0; j < plan->size; j += LANES)
        *(vu *)(room + j) = (shared_dither(dither, j, stratum) >> to_class) << plan->precision;
    rans_decode(plan, lanes, room, plan->size / CODER_LANES, room);
    for (int64_t j = 0; j < plan->size; j += LANES) {
        vi g = (vi)(shared_dither(dither, j, stratum) >> 8);
        vi grid = 512 * (*(const vi *)(room + j) - plan->largest) - 2 * g + 255;
        vf value = __builtin_convertvector(grid, vf) * 0x1p-7f * scale;
        if (!initial) value = load(y + j) + value;
        store(y + j, value);
    }
}
