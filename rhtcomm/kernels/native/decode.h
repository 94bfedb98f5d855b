/* Decoding of one block: the mean over K ranks. */
#pragma once
#include "blocks.h"
#include "ecdq.h"
#include "eden.h"
#include "feedback.h"
#include "formats.h"
#include "hadamard.h"
#include "packing.h"
#include "quic_fl.h"
#include "vector.h"

/* The arguments of rhtcomm_decode. */
typedef struct {
    Origin origin;
    int64_t ranks; /* K */
    const uint8_t *payloads;
    int64_t rank_stride, shard_stride; /* bytes from a payload to that of the next rank, or shard */
    char *out;
    int dtype;
    const Feedback *feedback; /* NULL: there is none */
    int own; /* whether it only takes what this rank sent off x + residual, of which `out` holds x */
} Decoding;

/* What the ranks sent of a block: `stride` bytes lie between the scales, and codes, of two ranks. */
typedef struct {
    const uint8_t *scale, *packed;
    int64_t ranks, stride;
} Sent;

static uint32_t largest_scale(Sent sent) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < sent.ranks; i++) {
        uint32_t bits;
        memcpy(&bits, sent.scale + i * sent.stride, 4);
        bits &= 0x7fffffff;
        if (bits > largest) largest = bits;
    }
    return largest;
}

/* The scale of the i-th rank; its codes go to s.codes. */
static float unpack_codes(const Plan *plan, Scratch s, Sent sent, int64_t i) {
    float scale;
    memcpy(&scale, sent.scale + i * sent.stride, 4);
    const uint8_t *packed = sent.packed + i * sent.stride;
    fetch((const char *)packed + code_bytes(plan), code_bytes(plan)); /* those of the next block */
    unpack(packed, plan->size / plan->group, plan->bits * plan->group, s.codes);
    return scale;
}

/* s.y <- d^(k/2) R^T s.y without the signs that come last, which are returned. Prefetches `out`. */
static const uint8_t *unrotate(const Decoding *d, const Plan *plan, Scratch s, int64_t offset,
                               uint32_t rank, const void *out) {
    const uint8_t *signs = NULL;
    for (int i = plan->rotations - 1; i >= 0; i--) {
        hadamard(s.y, s.y, plan->size, signs, 1.0f, out, i ? 0 : bytes_of(d->dtype));
        signs = draw_signs(plan, &d->origin, i, rank, offset, s.signs);
    }
    return signs;
}

/* to <- d^(k/2) R^T s.y * factors[0] * factors[1]; overwrites s.y. Prefetches `out`. */
static void unrotate_to(const Decoding *d, const Plan *plan, Scratch s, int64_t offset,
                        const float *factors, const void *out, float *to) {
    const uint8_t *signs = NULL;
    for (int i = plan->rotations - 1; i > 0; i--) {
        hadamard(s.y, s.y, plan->size, signs, 1.0f, NULL, 0);
        signs = draw_signs(plan, &d->origin, i, 0, offset, s.signs);
    }
    const uint8_t *last = draw_signs(plan, &d->origin, 0, 0, offset, s.last_signs);
    const Finish finish = {to, last, {factors[0], factors[1]}};
    hadamard_finished(s.y, plan->size, signs, out, bytes_of(d->dtype), &finish);
}

/* s.y <- the sum of the ranks' values, whose rotation is the same. Returns whether all exact
 * coordinates are finite, which no encoder breaks, but a payload of any bytes may. */
static int add_quic_fl(const Decoding *d, const Plan *plan, Scratch s, const uint8_t *dither,
                       Sent sent, float down) {
    i32 *indices = (i32 *)s.sum;
    int finite = 1;
    for (int64_t i = 0; i < sent.ranks; i++) {
        float scale = unpack_codes(plan, s, sent, i) * down;
        const uint8_t *exact = sent.packed + i * sent.stride + code_bytes(plan);
        const uint32_t shift = stratum(&d->origin, d->origin.rank + i);
        int64_t count = exact_sums(plan, exact, scale, i == 0, s.y, indices, s.room, &finite);
        quic_fl_add(plan, s.codes, dither, shift, scale, i == 0, s.y);
        for (int64_t k = 0; k < count; k++) s.y[indices[k]] = s.room[k];
    }
    return finite;
}

/* symbols <- the classes of a block's coordinates, for `count` ranks from the i-th on. */
static void draw_classes(const Decoding *d, const Plan *plan, const uint8_t *dither, int64_t i,
                         int64_t count, uint8_t *symbols) {
    for (int64_t k = 0; k < count; k++, symbols += plan->size)
        ecdq_classes(plan, dither, stratum(&d->origin, d->origin.rank + i + k), symbols);
}

/* The same of the next block of a unit, given the symbols of the first SIDE_BY_SIDE ranks. Those of
 * further ranks are decoded here, and take their place. */
static void add_ecdq(const Decoding *d, const Plan *plan, Scratch s, const uint8_t *dither,
                     uint8_t *symbols, Sent sent, float down) {
    for (int64_t i = 0; i < sent.ranks; i++) {
        if (i && i % SIDE_BY_SIDE == 0) {
            const int64_t count = least(SIDE_BY_SIDE, sent.ranks - i);
            draw_classes(d, plan, dither, i, count, symbols);
            rans_decode(plan, s.lanes + i, (int)count, symbols);
        }
        float scale;
        memcpy(&scale, sent.scale + i * sent.stride, 4);
        const uint8_t *columns = symbols + i % SIDE_BY_SIDE * plan->size;
        const uint32_t shift = stratum(&d->origin, d->origin.rank + i);
        if (i == 0)
            ecdq_add(plan, columns, dither, shift, scale * down, 1, s.y);
        else
            ecdq_add(plan, columns, dither, shift, scale * down, 0, s.y);
    }
}

/* s.sum <- the sum of the ranks' blocks, each of which has a rotation of its own. */
static void add_unrotated(const Decoding *d, const Plan *plan, Scratch s, int64_t offset, Sent sent,
                          float down, const void *out) {
    for (int64_t i = 0; i < sent.ranks; i++) {
        float scale = unpack_codes(plan, s, sent, i) * down;
        if (plan->quantizer == EDEN)
            eden_values(plan, s.codes, scale, s.y);
        else
            vector_values(plan, s.codes, scale, s.y);
        const uint32_t rank = (uint32_t)(d->origin.rank + i);
        const uint8_t *signs = unrotate(d, plan, s, offset, rank, out);
        for (int64_t j = 0; j < plan->size; j += LANES) {
            vf value = apply_signs(load(s.y + j), signs, j);
            if (i) value = load(s.sum + j) + value;
            store(s.sum + j, value);
        }
    }
}

/* Prefetches the block of the result that is `following`. `dither`: of QUIC-FL and ECDQ; `symbols`:
 * ECDQ's, for add_ecdq(). */
static void decode_block(const Decoding *d, const Plan *plan, const Scratch *scratch, Block block,
                         Block following, const uint8_t *dither, uint8_t *symbols) {
    Scratch s = *scratch; /* a local copy, which stores of vectors cannot alias */
    const int64_t size = plan->size, offset = d->origin.offset + block.offset;
    const float normalization = (float)(plan->normalization / (double)d->ranks);
    const uint8_t *payload = d->payloads + block.shard * d->shard_stride;
    const Sent sent = {payload + block.scale, payload + block.packed, d->ranks, d->rank_stride};
    char *out = d->out + block.offset * bytes_of(d->dtype);
    const char *next = d->out + following.offset * bytes_of(d->dtype);
    /* A whole block is decoded where it belongs: two would not fit into the first-level cache. */
    const int in_place =
        d->dtype == FLOAT32 && block.numel == size && (uintptr_t)out % 64 == 0 && !d->own;
    if (in_place) s.y = (float *)out;
    float *to = s.y;
    const uint32_t peak = largest_scale(sent);
    float down, up;
    powers_of_two(peak, &down, &up);
    int finite = peak < 0x7f800000;
    if (plan->quantizer == ECDQ) add_ecdq(d, plan, s, dither, symbols, sent, down); /* finite or not */
    if (!finite) {
        for (int64_t j = 0; j < size; j++) to[j] = NAN;
    } else if (plan->quantizer == QUIC_FL || plan->quantizer == ECDQ) {
        if (plan->quantizer == QUIC_FL) finite = add_quic_fl(d, plan, s, dither, sent, down);
        const float factors[] = {normalization, up};
        unrotate_to(d, plan, s, offset, factors, next, to);
    } else {
        add_unrotated(d, plan, s, offset, sent, down, next);
        for (int64_t j = 0; j < size; j += LANES)
            store(to + j, load(s.sum + j) * normalization * up);
    }
    if (!finite) /* processors produce different NaNs */
        for (int64_t j = 0; j < size; j++)
            if (to[j] != to[j]) to[j] = NAN;
    if (d->own) {
        keep_error(&d->feedback->residual, block.offset, block.numel, out, d->dtype, to);
        return;
    }
    if (!in_place) write_block(to, d->dtype, block.numel, out);
    if (d->feedback)
        keep_second_errors(d->feedback, block.offset, block.numel, to, out, d->dtype);
}

/* The decoding of what this rank sent. */
static Decoding of_own(const Decoding *d) {
    const Feedback *f = d->feedback;
    const Decoding own = {f->origin, 1, f->payloads, 0, f->stride, d->out, d->dtype, f, 1};
    return own;
}

/* Units of ECDQ side by side. `own`, if not NULL, is among the first ranks of them. */
static void decode_together(const Decoding *d, const Decoding *own, const Plan *plan,
                            const Scratch *s, const Unit *units, int count) {
    const int64_t size = plan->size, ranks = d->ranks, first = least(SIDE_BY_SIDE, ranks);
    for (int64_t i = 0; i < count * ranks; i++) {
        const Unit *unit = units + i / ranks;
        const uint8_t *payload = d->payloads + unit->shard * d->shard_stride;
        const uint8_t *codes = payload + i % ranks * d->rank_stride + unit->packed;
        Lanes *lanes = s->lanes + i;
        memcpy(lanes->x, codes, STATE_BYTES);
        lanes->next = (uint8_t *)codes + STATE_BYTES;
        lanes->edge = codes + unit->bytes;
    }
    uint8_t *symbols = (uint8_t *)s->sum;
    for (int64_t i = 0; i < units->count; i++) {
        const uint8_t *dither[SIDE_BY_SIDE];
        for (int64_t k = 0; k < count; k++) {
            const int64_t offset = d->origin.offset + block_of(plan, units[k], i).offset;
            uint32_t *room = (uint32_t *)s->room + k * size / 4;
            dither[k] = draw_dither(plan, &d->origin, offset, room);
            draw_classes(d, plan, dither[k], 0, first, symbols + k * first * size);
        }
        rans_decode(plan, s->lanes, (int)(count * first), symbols);
        for (int64_t k = 0; k < count; k++) {
            const Block block = block_of(plan, units[k], i);
            const Block following =
                k + 1 < count ? block_of(plan, units[k + 1], i) : block_of(plan, units[0], i + 1);
            uint8_t *columns = symbols + k * first * size;
            if (own)
                decode_block(own, plan, s, block, following, dither[k],
                             columns + (own->origin.rank - d->origin.rank) * size);
            decode_block(d, plan, s, block, following, dither[k], columns);
        }
    }
}

/* Blocks of other quantizers. The first hop's dither serves what this rank sent, too. */
static void decode_alone(const Decoding *d, const Decoding *own, const Plan *plan, const Scratch *s,
                         Block block, Block following) {
    const int64_t offset = d->origin.offset + block.offset;
    const uint8_t *dither = NULL;
    if (own) { /* before the mean takes the place of x */
        if (plan->quantizer == QUIC_FL) dither = draw_dither(plan, &own->origin, offset, s->dither);
        decode_block(own, plan, s, block, following, dither, NULL);
    }
    if (plan->quantizer == QUIC_FL && !(own && own->origin.hop == d->origin.hop))
        dither = draw_dither(plan, &d->origin, offset, s->dither);
    decode_block(d, plan, s, block, following, dither, NULL);
}

/* A UnitsFunction. */
static void decode_units(const void *call, const Plan *plan, const Scratch *s, const Unit *units,
                         int count) {
    const Decoding *d = call;
    const Feedback *f = d->feedback;
    const Decoding own = f ? of_own(d) : *d;
    if (plan->quantizer == ECDQ) {
        /* What this rank sent in the first hop is among the payloads. */
        const int among = f && own.origin.hop == d->origin.hop &&
                          own.origin.rank - d->origin.rank < least(SIDE_BY_SIDE, d->ranks);
        if (f && !among) decode_together(&own, NULL, plan, s, units, count);
        decode_together(d, among ? &own : NULL, plan, s, units, count);
        return;
    }
    for (int k = 0; k < count; k++)
        for (int64_t i = 0; i < units[k].count; i++)
            decode_alone(d, f ? &own : NULL, plan, s, block_of(plan, units[k], i),
                         block_of(plan, units[k], i + 1));
}
