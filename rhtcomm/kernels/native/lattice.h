/* The lattice: codes of a uniform grid that ranks can add; see lattice.py. */
#pragma once
#include "blocks.h"
#include "decode.h"
#include "formats.h"
#include "hadamard.h"
#include "quic_fl.h"

/* The arguments of the three steps; each uses some of them. */
typedef struct {
    Origin origin;
    char *x; /* the tensor */
    int dtype;
    float *y;           /* rotated coordinates, with the padding of the tail */
    int32_t *exponents; /* of this rank's blocks; y is in units of 2^exponent d^(-k/2) */
    int32_t *bounds;    /* the blocks' largest magnitudes, see bound_of() */
    uint32_t *words;    /* sums of codes */
} Summing;

enum { ZERO = INT32_MIN, NOT_FINITE = INT32_MAX }; /* bounds */

/* 2^exponent times the float with these bits, as an integer that grows with it: the exponent in its
 * upper 9 bits, and the mantissa. */
static int32_t bound_of(uint32_t bits, int32_t exponent) {
    return bits ? (int32_t)(bits + ((uint32_t)(exponent - 127) << 23)) : ZERO;
}

/* The bound's mantissa, from 1 to 2, and its exponent. */
static float split_bound(int32_t bound, int32_t *exponent) {
    *exponent = bound >> 23;
    return from_bits(0x3f800000 | (bound & 0x7fffff));
}

/* 2^exponent, the exponent being within -126 .. 127. */
static float power_of_two(int32_t exponent) { return from_bits((uint32_t)(exponent + 127) << 23); }

static int lane_bits(const Plan *plan, const Origin *origin) {
    int width = plan->bits;
    for (int64_t n = origin->world_size - 1; n; n >>= 1) width++;
    return width;
}

static Block only_block(const Plan *plan, Unit unit) { return block_of(plan, unit, 0); }

static void lattice_rotate(const Summing *c, const Plan *plan, const Scratch *scratch, Block block,
                           Block following) {
    const Scratch s = *scratch; /* a local copy, which stores of vectors cannot alias */
    const int64_t size = plan->size, offset = c->origin.offset + block.offset;
    const int64_t width = bytes_of(c->dtype);
    const char *x = c->x + block.offset * width, *next = c->x + following.offset * width;
    float *y = c->y + block.offset;
    const float *from = (const float *)x;
    if (c->dtype != FLOAT32 || block.numel < size) {
        read_block(x, c->dtype, block.numel, size, s.y);
        from = s.y;
    }
    const uint32_t peak = largest_magnitude(from, size);
    const int finite = peak < 0x7f800000;
    float factor, up;
    powers_of_two(peak, &factor, &up);
    if (!finite) from = memset(s.y, 0, 4 * size);
    for (int i = 0; i < plan->rotations; i++, from = s.y, factor = 1.0f) {
        float *to = i == plan->rotations - 1 ? y : s.y;
        hadamard(to, from, size, draw_signs(plan, &c->origin, i, 0, offset, s.signs), factor, next,
                 i ? 0 : width);
    }
    const int32_t exponent = (int32_t)(to_bits(up) >> 23) - 127;
    c->exponents[block.scale / 4] = exponent;
    c->bounds[block.scale / 4] = finite ? bound_of(largest_magnitude(y, size), exponent) : NOT_FINITE;
}

enum { BESIDE = 4 }; /* vectors of words that are packed side by side */

/* words[j .. j + LANES count - 1] <- the sums of codes[i m + j ..] 2^(i w) over the lanes i. */
INLINE void add_lanes_at(const u32 *codes, int64_t m, int width, int64_t j, const int count,
                         uint32_t *words) {
    vu word[BESIDE];
    for (int k = 0; k < count; k++) word[k] = *(const vu *)(codes + j + k * LANES);
    codes += j;
    for (int i = 1; i < 32 / width; i++) {
        codes += m;
        for (int k = 0; k < count; k++) word[k] |= *(const vu *)(codes + k * LANES) << (i * width);
    }
    for (int k = 0; k < count; k++) *(vu *)(words + j + k * LANES) = word[k];
}

/* words[j] <- the sum of codes[i m + j] 2^(i w) over the lanes i, for m words. */
static void add_lanes(const u32 *codes, int64_t m, int width, uint32_t *words) {
    if (m < LANES) { /* one by one */
        for (int64_t k = 0; k < m; k++) {
            words[k] = 0;
            for (int i = 0; i < 32 / width; i++) words[k] |= codes[i * m + k] << (i * width);
        }
        return;
    }
    int64_t j = 0;
    for (; j + BESIDE * LANES <= m; j += BESIDE * LANES) add_lanes_at(codes, m, width, j, BESIDE, words);
    for (; j < m; j += LANES) /* the last ones twice */
        add_lanes_at(codes, m, width, least(j, m - LANES), 1, words);
}

/* The inverse of add_lanes_at(). */
INLINE void split_lanes_at(const uint32_t *words, int64_t m, int width, int64_t j, const int count,
                           u32 *codes) {
    const uint32_t mask = width < 32 ? (1u << width) - 1 : UINT32_MAX;
    vu word[BESIDE];
    for (int k = 0; k < count; k++) word[k] = *(const vu *)(words + j + k * LANES);
    codes += j;
    for (int i = 0; i < 32 / width; i++) {
        for (int k = 0; k < count; k++)
            *(vu *)(codes + k * LANES) = word[k] >> (i * width) & mask;
        codes += m;
    }
}

/* The inverse of add_lanes(). */
static void split_lanes(const uint32_t *words, int64_t m, int width, u32 *codes) {
    if (m < LANES) {
        const uint32_t mask = width < 32 ? (1u << width) - 1 : UINT32_MAX;
        for (int64_t k = 0; k < m; k++)
            for (int i = 0; i < 32 / width; i++) codes[i * m + k] = words[k] >> (i * width) & mask;
        return;
    }
    int64_t j = 0;
    for (; j + BESIDE * LANES <= m; j += BESIDE * LANES)
        split_lanes_at(words, m, width, j, BESIDE, codes);
    for (; j < m; j += LANES) split_lanes_at(words, m, width, least(j, m - LANES), 1, codes);
}

static void lattice_encode(const Summing *c, const Plan *plan, const Scratch *scratch, Unit unit) {
    const Scratch s = *scratch;
    const Block block = only_block(plan, unit);
    const int64_t size = plan->size, offset = c->origin.offset + block.offset;
    const float *y = c->y + block.offset;
    const int32_t bound = c->bounds[block.scale / 4], middle = plan->middle;
    float per_unit = 0;
    if (bound != ZERO && bound != NOT_FINITE) {
        int32_t exponent;
        per_unit = 1.0f / split_bound(bound, &exponent) * plan->per_step;
        exponent = c->exponents[block.scale / 4] - exponent;
        per_unit *= power_of_two(exponent < -126 ? -126 : exponent);
    }
    const uint8_t *dither = draw_dither(plan, &c->origin, offset, s.dither);
    const uint32_t stratum = (uint32_t)(65536 * c->origin.rank / c->origin.world_size);
    u32 *codes = (u32 *)s.sum; /* up to 31 of the last lane's lie in s.room */
    memset(codes + size, 0, 4 * 32);
#if defined(__aarch64__)
    lattice_codes(y, size, per_unit, dither, stratum, middle, codes);
#else
    const vu turn = (vu){0} + stratum;
    for (int64_t j = 0; j < size; j += LANES) {
        const vu v = dither_halves(dither, j, 1, turn);
        const vi z = to_integers(load(y + j) * per_unit);
        *(vu *)(codes + j) = (vu)(z + middle + (vi)v) >> 16;
    }
#endif
    add_lanes(codes, unit.bytes / 4, lane_bits(plan, &c->origin), c->words + block.packed / 4);
}

/* s.y <- the mean of the ranks' rotated coordinates, in units of the bound. */
static void lattice_values(const Summing *c, const Plan *plan, Scratch s, Unit unit, int64_t offset) {
    const int64_t n = c->origin.world_size, twice = n * ((1 << plan->bits) - 1);
    const uint8_t *dither = draw_dither(plan, &c->origin, offset, s.dither);
    const u32 *codes = (const u32 *)s.sum;
    split_lanes(c->words + unit.packed / 4, unit.bytes / 4, lane_bits(plan, &c->origin),
                (u32 *)s.sum);
    const float unit_of_bound = 1.0f / ((float)n * plan->per_step);
    const float rest = 32768.0f * (float)(1 - twice % 2) -
                       0.5f * (float)least(n & -n, 65536);
    const uint32_t half = (uint32_t)(twice / 2);
    const vh factor = (vh)((vu){0} + (uint32_t)(n & 0xffff));
    for (int64_t j = 0; j < plan->size; j += LANES) {
        const vi f = (vi)((vh)dither_halves(dither, j, 1, (vu){0}) * factor); /* mod 2^16 */
        const vi sum = (vi)(*(const vu *)(codes + j) - half);
        const vf value = multiply_add(__builtin_convertvector(sum, vf), (vf){0} + 65536.0f,
                                      rest - __builtin_convertvector(f, vf));
        store(s.y + j, value * unit_of_bound);
    }
}

static void lattice_decode(const Summing *c, const Plan *plan, const Scratch *scratch, Unit unit) {
    const Scratch s = *scratch;
    const Block block = only_block(plan, unit);
    const int64_t size = plan->size, offset = c->origin.offset + block.offset;
    char *out = c->x + block.offset * bytes_of(c->dtype);
    float *to = c->dtype == FLOAT32 && block.numel == size ? (float *)out : s.y;
    const int32_t bound = c->bounds[block.scale / 4];
    if (bound == ZERO || bound == NOT_FINITE) {
        for (int64_t j = 0; j < size; j++) to[j] = bound == ZERO ? 0.0f : NAN;
    } else {
        lattice_values(c, plan, s, unit, offset);
        /* d^(-k) times the bound, in two factors, neither of which is subnormal. */
        int32_t exponent;
        float factor = split_bound(bound, &exponent) * (float)plan->normalization;
        const int32_t usual = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
        factor *= power_of_two(exponent - usual);
        const float factors[] = {factor, power_of_two(usual)};
        const Decoding d = {.origin = c->origin, .dtype = c->dtype};
        const uint8_t *kept[2] = {NULL, NULL};
        unrotate_from(s.y, &d, plan, s, offset, factors, out, bytes_of(c->dtype), to, kept);
    }
    if (to == s.y) write_block(to, c->dtype, block.numel, out);
}

/* UnitsFunctions; a unit is one block. */
static void lattice_rotate_units(const void *call, const Plan *plan, const Scratch *s,
                                 const Unit *units, int count) {
    for (int k = 0; k < count; k++)
        lattice_rotate(call, plan, s, only_block(plan, units[k]),
                       only_block(plan, units[k + 1 < count ? k + 1 : k]));
}

static void lattice_encode_units(const void *call, const Plan *plan, const Scratch *s,
                                 const Unit *units, int count) {
    for (int k = 0; k < count; k++) lattice_encode(call, plan, s, units[k]);
}

static void lattice_decode_units(const void *call, const Plan *plan, const Scratch *s,
                                 const Unit *units, int count) {
    for (int k = 0; k < count; k++) lattice_decode(call, plan, s, units[k]);
}
