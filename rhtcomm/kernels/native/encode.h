/* Encoding of one block. */
#pragma once
#include <float.h>

#include "blocks.h"
#include "ecdq.h"
#include "eden.h"
#include "feedback.h"
#include "formats.h"
#include "hadamard.h"
#include "packing.h"
#include "quic_fl.h"
#include "vector.h"

/* The arguments of rhtcomm_encode. */
typedef struct {
    Origin origin;
    const char *x;
    int dtype;
    uint8_t *payloads;
    int64_t stride;
    float *moments;
    const Residual *residual; /* added to x; NULL: there is none */
} Encoding;

enum { PARTS = 8, MOMENTS = PARTS + 2 };

/* See block_moments() of moments.py; in units of `up`, so that no cube overflows. */
static void block_moments(const float *y, int64_t size, float down, float up, float *moments) {
    enum { COLUMNS = 32 };
    float squares[COLUMNS] = {0}, cubes[COLUMNS] = {0};
    for (int64_t j = 0; j < size; j += COLUMNS)
        for (int i = 0; i < COLUMNS; i++) {
            float z = fabsf(y[j + i] * down);
            squares[i] += z * z;
            cubes[i] += z * z * z;
        }
    memset(moments, 0, PARTS * sizeof(float) + sizeof(float));
    for (int i = 0; i < COLUMNS; i++) {
        moments[i % PARTS] += squares[i];
        moments[PARTS] += cubes[i];
    }
    moments[PARTS + 1] = up;
}

/* s.y <- d^(k/2) R (factor * from); returns its root mean square, and the largest magnitude in
 * `peak`. Fetches d `width` bytes from `next` on. */
static float rotate(const Encoding *e, const Plan *plan, Scratch s, int64_t offset,
                    const float *from, float factor, const char *next, int64_t width, uint32_t *peak) {
    const Origin *origin = &e->origin;
    const int64_t size = plan->size, each = (width + plan->rotations - 1) / plan->rotations;
    const int shared = plan->quantizer == QUIC_FL || plan->quantizer == ECDQ;
    const uint32_t rank = shared ? 0 : (uint32_t)origin->rank;
    for (int i = 0; i < plan->rotations - 1; i++, from = s.y, factor = 1.0f) {
        const int64_t now = least(width, each);
        const uint8_t *signs = draw_signs(plan, origin, i, rank, offset, s.signs);
        hadamard(s.y, from, size, signs, factor, next, now);
        next += size * now;
        width -= now;
    }
    const uint8_t *signs = draw_signs(plan, origin, plan->rotations - 1, rank, offset, s.signs);
    float sum = hadamard_measured(s.y, from, size, signs, factor, next, width, s.room, peak);
    return sqrtf(sum * (1.0f / (float)size));
}

/* Fetches the block of x that is `following`. Of ECDQ, writes no codes but the symbols, and `factor`
 * multiplies the scale. */
static void encode_block(const Encoding *e, const Plan *plan, const Scratch *scratch, Block block,
                         Block following, float factor, uint8_t *symbols) {
    const Scratch s = *scratch; /* a local copy, which stores of vectors cannot alias */
    const int64_t size = plan->size, offset = e->origin.offset + block.offset;
    const char *x = e->x + block.offset * bytes_of(e->dtype);
    uint8_t *payload = e->payloads + block.shard * e->stride, *packed = payload + block.packed;
    const float *from = s.y;
    if (e->residual)
        read_sum(e->residual, block.offset, block.numel, size, x, e->dtype, s.y);
    else if (e->dtype == FLOAT32 && block.numel == size)
        from = (const float *)x;
    else
        read_block(x, e->dtype, block.numel, size, s.y);
    if (plan->quantizer != ECDQ) /* what is stored last */
        for (int64_t i = 0; i < code_bytes(plan); i += 64) __builtin_prefetch(packed + i, 1, 2);
    uint32_t peak = largest_magnitude(from, size);
    float down, up, scale;
    powers_of_two(peak, &down, &up);
    int finite = peak < 0x7f800000;
    if (!finite) from = memset(s.y, 0, 4 * size);
    if (e->moments) block_moments(from, size, down, up, e->moments + block.number * MOMENTS);
    const char *next = e->x + following.offset * bytes_of(e->dtype);
    /* Half of it is fetched while rotating, the other half, or the residual, while quantizing. EDEN and
     * vectors fetch all of it while rotating, and no residual. */
    const int dithered = plan->quantizer == QUIC_FL || plan->quantizer == ECDQ;
    int64_t width = bytes_of(e->dtype) / (dithered && !e->residual ? 2 : 1);
    float rms = rotate(e, plan, s, offset, from, down, next, width, &peak);
    next += size * width;
    if (e->residual) next = residual_ahead(e->residual, following.offset), width = 4;
    if (plan->quantizer == ECDQ)
        scale = ecdq_quantize(plan, s.y, rms, peak, factor,
                              draw_dither(plan, &e->origin, offset, s.dither),
                              stratum(&e->origin, e->origin.rank), next, width, symbols);
    else if (plan->quantizer == QUIC_FL)
        scale = quic_fl_encode(plan, s.y, rms, peak, draw_dither(plan, &e->origin, offset, s.dither),
                               stratum(&e->origin, e->origin.rank), s.room, (i32 *)s.sum, s.codes,
                               packed + code_bytes(plan), next, width);
    else if (plan->quantizer == EDEN)
        scale = eden_encode(plan, s.y, rms, s.room, s.sum, s.codes);
    else
        scale = vector_encode(plan, s.y, rms, s.room, s.sum, s.codes);
    scale = finite ? fminf(scale * (float)plan->normalization * up, FLT_MAX) : NAN;
    memcpy(payload + block.scale, &scale, 4);
    if (plan->quantizer != ECDQ) pack(s.codes, size / plan->group, plan->bits * plan->group, packed);
}

/* Units of ECDQ side by side, from the last block to the first, the words from the end of a unit on.
 * Returns 0 where one does not fit. */
static int encode_together(const Encoding *e, const Plan *plan, const Scratch *s, const Unit *units,
                           int count, float factor) {
    uint8_t *codes[SIDE_BY_SIDE], *symbols = (uint8_t *)s->sum;
    for (int k = 0; k < count; k++) {
        Lanes *lanes = s->lanes + k;
        codes[k] = e->payloads + units[k].shard * e->stride + units[k].packed;
        for (int i = 0; i < CODER_LANES; i++) lanes->x[i] = 1 << 16;
        lanes->edge = codes[k] + STATE_BYTES;
        lanes->next = codes[k] + units[k].bytes;
    }
    for (int64_t i = units->count - 1; i >= 0; i--) {
        for (int k = 0; k < count; k++) {
            const Block following = k + 1 < count ? block_of(plan, units[k + 1], i)
                                                  : block_of(plan, units[0], i ? i - 1 : 0);
            encode_block(e, plan, s, block_of(plan, units[k], i), following, factor,
                         symbols + k * plan->size);
        }
        if (factor > 0 && !rans_encode(plan, s->lanes, count, symbols)) return 0;
    }
    for (int k = 0; k < count; k++) {
        const Lanes *lanes = s->lanes + k;
        const int64_t words = codes[k] + units[k].bytes - lanes->next;
        memmove(codes[k] + STATE_BYTES, lanes->next, (size_t)words);
        memset(codes[k] + STATE_BYTES + words, 0, (size_t)(units[k].bytes - STATE_BYTES - words));
        memcpy(codes[k], lanes->x, STATE_BYTES);
    }
    return 1;
}

/* Tries one factor after the other. */
static void encode_alone(const Encoding *e, const Plan *plan, const Scratch *s, Unit unit) {
    for (int i = 0; i < ATTEMPTS; i++)
        if (encode_together(e, plan, s, &unit, 1, factors[i])) return;
    encode_together(e, plan, s, &unit, 1, 0.0f); /* its scales are zeros, or NaN */
    memset(e->payloads + unit.shard * e->stride + unit.packed, 0, (size_t)unit.bytes);
}

/* A UnitsFunction. */
static void encode_units(const void *call, const Plan *plan, const Scratch *s, const Unit *units,
                         int count) {
    if (plan->quantizer == ECDQ) {
        if (!encode_together(call, plan, s, units, count, factors[0]))
            for (int k = 0; k < count; k++) encode_alone(call, plan, s, units[k]);
        return;
    }
    for (int k = 0; k < count; k++)
        for (int64_t i = 0; i < units[k].count; i++)
            encode_block(call, plan, s, block_of(plan, units[k], i),
                         block_of(plan, units[k], i + 1), 1.0f, NULL);
}
