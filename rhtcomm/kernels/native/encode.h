/* Encoding of one block. */
#pragma once
#include <float.h>

#include "blocks.h"
#include "ecdq.h"
#include "eden.h"
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
 * `peak`. Prefetches the block of x behind this one. */
static float rotate(const Encoding *e, const Plan *plan, Scratch s, int64_t offset,
                    const float *from, float factor, const char *next, uint32_t *peak) {
    const Origin *origin = &e->origin;
    const int64_t size = plan->size, width = bytes_of(e->dtype);
    const int shared = plan->quantizer == QUIC_FL || plan->quantizer == ECDQ;
    const uint32_t rank = shared ? 0 : (uint32_t)origin->rank;
    for (int i = 0; i < plan->rotations - 1; i++, from = s.y, factor = 1.0f, next = NULL)
        hadamard(s.y, from, size, draw_signs(plan, origin, i, rank, offset, s.signs), factor, next,
                 width);
    const uint8_t *signs = draw_signs(plan, origin, plan->rotations - 1, rank, offset, s.signs);
    float sum = hadamard_measured(s.y, from, size, signs, factor, next, width, s.room, peak);
    return sqrtf(sum * (1.0f / (float)size));
}

/* Returns 0 where its unit does not fit (ECDQ), whose scales `factor` multiplies. */
static int encode_block(const Encoding *e, const Plan *plan, const Scratch *scratch, Block block,
                        float factor) {
    const Scratch s = *scratch; /* a copy, which no vector that is stored may alias */
    const int64_t size = plan->size, offset = e->origin.offset + block.offset;
    const char *x = e->x + block.offset * bytes_of(e->dtype);
    uint8_t *payload = e->payloads + block.shard * e->stride, *packed = payload + block.packed;
    const float *from = s.y;
    if (e->dtype == FLOAT32 && block.numel == size)
        from = (const float *)x;
    else
        read_block(x, e->dtype, block.numel, size, s.y);
    uint32_t peak = largest_magnitude(from, size);
    float down, up, scale;
    powers_of_two(peak, &down, &up);
    int finite = peak < 0x7f800000;
    if (!finite) from = memset(s.y, 0, 4 * size);
    if (e->moments) block_moments(from, size, down, up, e->moments + block.number * MOMENTS);
    const char *next = x + size * bytes_of(e->dtype);
    float rms = rotate(e, plan, s, offset, from, down, next, &peak);
    if (plan->quantizer == ECDQ)
        scale = ecdq_encode(plan, s.y, rms, peak, factor,
                            draw_dither(plan, &e->origin, offset, s.dither),
                            stratum(&e->origin, e->origin.rank), s.lanes);
    else if (plan->quantizer == QUIC_FL)
        scale = quic_fl_encode(plan, s.y, rms, peak, draw_dither(plan, &e->origin, offset, s.dither),
                               stratum(&e->origin, e->origin.rank), s.room, (i32 *)s.sum, s.codes,
                               packed + code_bytes(plan));
    else if (plan->quantizer == EDEN)
        scale = eden_encode(plan, s.y, rms, s.room, s.sum, s.codes);
    else
        scale = vector_encode(plan, s.y, rms, s.room, s.sum, s.codes);
    if (scale < 0) return 0;
    scale = finite ? fminf(scale * (float)plan->normalization * up, FLT_MAX) : NAN;
    memcpy(payload + block.scale, &scale, 4);
    if (plan->quantizer != ECDQ) pack(s.codes, size / plan->group, plan->bits * plan->group, packed);
    return 1;
}

/* From the last block to the first, the words from the end of the unit on. */
static int encode_blocks(const Encoding *e, const Plan *plan, const Scratch *s, Unit unit,
                         uint8_t *codes, float factor) {
    Lanes *lanes = s->lanes;
    for (int i = 0; i < CODER_LANES; i++) lanes->x[i] = 1 << 16;
    lanes->edge = codes + STATE_BYTES;
    lanes->next = codes + unit.bytes;
    for (int64_t i = unit.count - 1; i >= 0; i--)
        if (!encode_block(e, plan, s, block_of(plan, unit, i), factor)) return 0;
    const int64_t words = codes + unit.bytes - lanes->next;
    memmove(codes + STATE_BYTES, lanes->next, (size_t)words);
    memset(codes + STATE_BYTES + words, 0, (size_t)(unit.bytes - STATE_BYTES - words));
    memcpy(codes, lanes->x, STATE_BYTES);
    return 1;
}

/* A UnitFunction. */
static void encode_unit(const void *call, const Plan *plan, const Scratch *s, Unit unit) {
    const Encoding *e = call;
    if (plan->quantizer != ECDQ) {
        for (int64_t i = 0; i < unit.count; i++)
            encode_block(e, plan, s, block_of(plan, unit, i), 1.0f);
        return;
    }
    uint8_t *payload = e->payloads + unit.shard * e->stride;
    for (int i = 0; i < ATTEMPTS; i++)
        if (encode_blocks(e, plan, s, unit, payload + unit.packed, factors[i])) return;
    encode_blocks(e, plan, s, unit, payload + unit.packed, 0.0f); /* its scales are zeros, or NaN */
    memset(payload + unit.packed, 0, (size_t)unit.bytes);
}
