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
    int only_own;   /* whether it only takes what this rank sent off x + residual, of which `out` holds x */
    int64_t own;    /* which of the ranks this one is, if it does that as well as decode; otherwise -1 */
} Decoding;

/* What the ranks sent of a block: `stride` bytes lie between the scales, and codes, of two ranks. */
typedef struct {
    const uint8_t *scale, *packed;
    int64_t ranks, stride;
} Sent;

static Sent sent_of(const Decoding *d, Block block) {
    const uint8_t *payload = d->payloads + block.shard * d->shard_stride;
    const Sent sent = {payload + block.scale, payload + block.packed, d->ranks, d->rank_stride};
    return sent;
}

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

/* s.y <- d^(k/2) R^T s.y without the signs that come last, which are returned. Prefetches d `width` bytes
 * from `ahead` on. */
static const uint8_t *unrotate(const Decoding *d, const Plan *plan, Scratch s, int64_t offset,
                               uint32_t rank, const void *ahead, int64_t width) {
    const uint8_t *signs = NULL;
    for (int i = plan->rotations - 1; i >= 0; i--) {
        hadamard(s.y, s.y, plan->size, signs, 1.0f, ahead, i ? 0 : width);
        signs = draw_signs(plan, &d->origin, i, rank, offset, s.signs);
    }
    return signs;
}

/* to <- d^(k/2) R^T from * factors[0] * factors[1]; s.y is scratch, and may be `from`. Signs that
 * `kept` has are not drawn again. Prefetches d `width` bytes from `ahead` on. */
static void unrotate_from(const float *from, const Decoding *d, const Plan *plan, Scratch s,
                          int64_t offset, const float *factors, const void *ahead, int64_t width,
                          float *to, const uint8_t **kept) {
    const uint8_t *signs = NULL;
    for (int i = plan->rotations - 1; i > 0; i--, from = s.y) {
        hadamard(s.y, from, plan->size, signs, 1.0f, NULL, 0);
        signs = kept[1] ? kept[1] : draw_signs(plan, &d->origin, i, 0, offset, s.signs);
    }
    if (plan->rotations == 2) kept[1] = signs; /* with more, s.signs has only the last ones */
    if (!kept[0]) kept[0] = draw_signs(plan, &d->origin, 0, 0, offset, s.last_signs);
    const Finish finish = {to, kept[0], {factors[0], factors[1]}};
    hadamard_finished(s.y, from, plan->size, signs, ahead, width, &finish);
}

/* y <- (initial) or y += the values of the ranks first .. stop - 1, whose rotation is the same. Returns
 * whether all exact coordinates are finite, which no encoder breaks, but a payload of any bytes may. */
static int add_quic_fl(const Decoding *d, const Plan *plan, Scratch s, const uint8_t *dither,
                       Sent sent, int64_t first, int64_t stop, float down, int initial, float *y) {
    i32 *indices = (i32 *)s.sum;
    int finite = 1;
    for (int64_t i = first; i < stop; i++, initial = 0) {
        float scale = unpack_codes(plan, s, sent, i) * down;
        const uint8_t *exact = sent.packed + i * sent.stride + code_bytes(plan);
        const uint32_t shift = stratum(&d->origin, d->origin.rank + i);
        int64_t count = exact_sums(plan, exact, scale, initial, y, indices, s.room, &finite);
        quic_fl_add(plan, s.codes, dither, shift, scale, initial, y);
        for (int64_t k = 0; k < count; k++) y[indices[k]] = s.room[k];
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
                     uint8_t *symbols, Sent sent, int64_t first, int64_t stop, float down, int initial,
                     float *y) {
    for (int64_t i = first; i < stop; i++, initial = 0) {
        if (i && i % SIDE_BY_SIDE == 0) {
            const int64_t count = least(SIDE_BY_SIDE, sent.ranks - i);
            draw_classes(d, plan, dither, i, count, symbols);
            rans_decode(plan, s.lanes + i, (int)count, symbols);
        }
        float scale;
        memcpy(&scale, sent.scale + i * sent.stride, 4);
        const uint8_t *columns = symbols + i % SIDE_BY_SIDE * plan->size;
        const uint32_t shift = stratum(&d->origin, d->origin.rank + i);
        if (initial)
            ecdq_add(plan, columns, dither, shift, scale * down, 1, y);
        else
            ecdq_add(plan, columns, dither, shift, scale * down, 0, y);
    }
}

/* Either of these. */
static int add_ranks(const Decoding *d, const Plan *plan, Scratch s, const uint8_t *dither,
                     uint8_t *symbols, Sent sent, int64_t first, int64_t stop, float down, int initial,
                     float *y) {
    if (plan->quantizer == QUIC_FL)
        return add_quic_fl(d, plan, s, dither, sent, first, stop, down, initial, y);
    add_ecdq(d, plan, s, dither, symbols, sent, first, stop, down, initial, y);
    return 1;
}

/* The sum of all ranks' values, in their order; s.own holds those of this rank. It is s.own or s.y. */
static const float *add_to_own(const Decoding *d, const Plan *plan, Scratch s, const uint8_t *dither,
                               uint8_t *symbols, Sent sent, float down, int *finite) {
    float *sum = s.own;
    int64_t done = 1;
    if (d->own == 1) { /* a sum of two does not depend on their order */
        *finite &= add_ranks(d, plan, s, dither, symbols, sent, 0, 1, down, 0, sum);
        done = 2;
    } else if (d->own > 1) {
        sum = s.y;
        *finite &= add_ranks(d, plan, s, dither, symbols, sent, 0, d->own, down, 1, sum);
        for (int64_t j = 0; j < plan->size; j += LANES) store(sum + j, load(sum + j) + load(s.own + j));
        done = d->own + 1;
    }
    *finite &= add_ranks(d, plan, s, dither, symbols, sent, done, sent.ranks, down, 0, sum);
    return sum;
}

/* s.sum <- the sum of the ranks' blocks, each of which has a rotation of its own; s.own <- this rank's. */
static void add_unrotated(const Decoding *d, const Plan *plan, Scratch s, int64_t offset, Sent sent,
                          float down, const void *ahead, int64_t width) {
    for (int64_t i = 0; i < sent.ranks; i++) {
        float scale = unpack_codes(plan, s, sent, i) * down;
        if (plan->quantizer == EDEN)
            eden_values(plan, s.codes, scale, s.y);
        else
            vector_values(plan, s.codes, scale, s.y);
        const uint32_t rank = (uint32_t)(d->origin.rank + i);
        const uint8_t *signs = unrotate(d, plan, s, offset, rank, ahead, width);
        for (int64_t j = 0; j < plan->size; j += LANES) {
            vf value = apply_signs(load(s.y + j), signs, j);
            if (i == d->own) store(s.own + j, value);
            if (i) value = load(s.sum + j) + value;
            store(s.sum + j, value);
        }
    }
}

/* NaN <- NaN: processors produce different ones. */
static void canonicalize(float *y, int64_t size) {
    for (int64_t j = 0; j < size; j++)
        if (y[j] != y[j]) y[j] = NAN;
}

/* Whether the values of this rank, times the power of two that fits those of all ranks, are not so small
 * that they would be rounded. */
static int is_near(Sent sent, int64_t rank, uint32_t peak) {
    uint32_t scale;
    memcpy(&scale, sent.scale + rank * sent.stride, 4);
    const uint32_t exponent = (scale & 0x7fffffff) >> 23;
    return peak < 0x7f800000 && exponent >= 1 && (peak >> 23) - exponent <= 64;
}

/* The decoding of what this rank sent. */
static Decoding of_own(const Decoding *d) {
    const Feedback *f = d->feedback;
    const Decoding own = {f->origin, 1, f->payloads, 0, f->stride, d->out, d->dtype, f, 1, -1};
    return own;
}

/* Prefetches the block of the result that is `following`. `dither`: of QUIC-FL and ECDQ; `symbols`:
 * ECDQ's, for add_ecdq(). */
static void decode_block(const Decoding *d, const Plan *plan, const Scratch *scratch, Block block,
                         Block following, const uint8_t *dither, uint8_t *symbols) {
    Scratch s = *scratch; /* a local copy, which stores of vectors cannot alias */
    const int64_t size = plan->size, offset = d->origin.offset + block.offset;
    const Sent sent = sent_of(d, block);
    char *out = d->out + block.offset * bytes_of(d->dtype);
    const char *residual_next =
        d->feedback ? residual_ahead(&d->feedback->residual, following.offset) : NULL;
    const int64_t width = d->only_own ? 4 : bytes_of(d->dtype);
    const char *next = d->only_own ? residual_next : d->out + following.offset * width;
    const uint32_t peak = largest_scale(sent);
    const int finite = peak < 0x7f800000, with_own = d->own >= 0;
    /* A whole block is decoded where it belongs: two would not fit into the first-level cache. */
    const int in_place =
        d->dtype == FLOAT32 && block.numel == size && (uintptr_t)out % 64 == 0 && !d->only_own;
    float *to = in_place ? (float *)out : s.y;
    if (!with_own) s.y = to; /* otherwise x is still there */
    float down, up;
    powers_of_two(peak, &down, &up);
    const float alone[] = {(float)plan->normalization, up};
    const float factors[] = {(float)(plan->normalization / (double)d->ranks), up};
    if (plan->quantizer == QUIC_FL || plan->quantizer == ECDQ) {
        const uint8_t *kept[2] = {NULL, NULL};
        const float *sum = s.y;
        int sound = 1;
        if (with_own) {
            sound = add_ranks(d, plan, s, dither, symbols, sent, d->own, d->own + 1, down, 1, s.own);
            unrotate_from(s.own, d, plan, s, offset, alone, residual_next, 4, s.y, kept);
            keep_error(&d->feedback->residual, block.offset, block.numel, out, d->dtype, s.y);
            s.y = to;
            sum = add_to_own(d, plan, s, dither, symbols, sent, down, &sound);
        } else { /* ECDQ's units go on, finite or not */
            sound = add_ranks(d, plan, s, dither, symbols, sent, 0, sent.ranks, down, 1, s.y);
        }
        if (finite) unrotate_from(sum, d, plan, s, offset, factors, next, width, to, kept);
        if (!sound) canonicalize(to, size);
    } else if (finite) {
        add_unrotated(d, plan, s, offset, sent, down, next, width);
        if (with_own) {
            for (int64_t j = 0; j < size; j += LANES)
                store(s.own + j, load(s.own + j) * alone[0] * alone[1]);
            keep_error(&d->feedback->residual, block.offset, block.numel, out, d->dtype, s.own);
        }
        for (int64_t j = 0; j < size; j += LANES)
            store(to + j, load(s.sum + j) * factors[0] * factors[1]);
    }
    if (!finite)
        for (int64_t j = 0; j < size; j++) to[j] = NAN;
    if (d->only_own) {
        keep_error(&d->feedback->residual, block.offset, block.numel, out, d->dtype, to);
        return;
    }
    if (!in_place) write_block(to, d->dtype, block.numel, out);
    if (d->feedback)
        keep_second_errors(d->feedback, block.offset, block.numel, to, out, d->dtype);
}

/* The same, of a block of which this rank's values may be too small to be taken together with others'. */
static void decode_either(const Decoding *d, const Plan *plan, const Scratch *s, Block block,
                          Block following, const uint8_t *dither, uint8_t *symbols) {
    Decoding rest = *d;
    if (d->own >= 0) {
        const Sent sent = sent_of(d, block);
        if (!is_near(sent, d->own, largest_scale(sent))) {
            const Decoding own = of_own(d);
            uint8_t *columns = symbols ? symbols + d->own * plan->size : NULL;
            decode_block(&own, plan, s, block, following, dither, columns);
            rest.own = -1;
        }
    }
    decode_block(&rest, plan, s, block, following, dither, symbols);
}

/* Units of ECDQ side by side. */
static void decode_together(const Decoding *d, const Plan *plan, const Scratch *s, const Unit *units,
                            int count) {
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
            decode_either(d, plan, s, block, following, dither[k], symbols + k * first * size);
        }
    }
}

/* Blocks of other quantizers. */
static void decode_alone(const Decoding *d, const Plan *plan, const Scratch *s, Unit unit) {
    for (int64_t i = 0; i < unit.count; i++) {
        const Block block = block_of(plan, unit, i), following = block_of(plan, unit, i + 1);
        const uint8_t *dither = NULL;
        if (plan->quantizer == QUIC_FL)
            dither = draw_dither(plan, &d->origin, d->origin.offset + block.offset, s->dither);
        decode_either(d, plan, s, block, following, dither, NULL);
    }
}

/* A UnitsFunction. */
static void decode_units(const void *call, const Plan *plan, const Scratch *s, const Unit *units,
                         int count) {
    Decoding d = *(const Decoding *)call, own = d;
    int apart = 0;
    if (d.feedback) {
        /* What this rank sent is among the payloads of the first hop, if those of its rank are. */
        const int64_t first = plan->quantizer == ECDQ ? least(SIDE_BY_SIDE, d.ranks) : d.ranks;
        const int64_t number = d.feedback->origin.rank - d.origin.rank;
        apart = d.feedback->origin.hop != d.origin.hop || number < 0 || number >= first;
        if (!apart) d.own = number;
        own = of_own(&d);
    }
    /* The error is taken before the mean takes the place of x. */
    if (plan->quantizer == ECDQ) {
        if (apart) decode_together(&own, plan, s, units, count);
        decode_together(&d, plan, s, units, count);
        return;
    }
    for (int k = 0; k < count; k++) {
        if (apart) decode_alone(&own, plan, s, units[k]);
        decode_alone(&d, plan, s, units[k]);
    }
}
