/* QUIC-FL: codes by the table of positions, values by the table of levels. */
#pragma once
#include "exact.h"
#include "lanes.h"
#include "plan.h"
#include "vectors.h"

#if defined(__AVX512VBMI__)
#include "quic_fl_bytes.h"
#elif defined(__aarch64__)
#include "quic_fl_neon.h"
#endif

/* Coordinates of a table look-up. Their indices are in memory before the first of them is read, since
 * a load of a few bytes would wait for the store of a vector. */
enum { TILE = 4096 };

/* Keeps the compiler from loading the indices of several vectors first, for which registers are too few. */
#define IN_ORDER __asm__ volatile("" : : : "memory")

/* table[i] at LANES indices: bytes, or words whose groups of four are `apart` words apart. One load at a
 * time beats the gather instructions; indices are loaded several at a time, since loads are what limits
 * this. */
INLINE vu look_up_by_bytes(const u32 *table, const u32 *fours) {
#define FOUND(i) table[fours[(i) / 4] >> 8 * ((i) % 4) & 0xff]
    return (vu){EACH_LANE(FOUND)};
#undef FOUND
}

INLINE vu look_up_by_words(const u32 *table, const u32 *twos, const int apart) {
#define FOUND(i) table[twos[(i) / 4 * apart / 2 + (i) % 4 / 2] >> 16 * ((i) % 2) & 0xffff]
    return (vu){EACH_LANE(FOUND)};
#undef FOUND
}

/* The upper halves of a and b, four of a and four of b in turn. */
INLINE void store_upper(u32 *to, vu a, vu b) {
    a >>= 16;
    b >>= 16;
#if defined(__AVX512F__)
    _mm512_storeu_si512(to, _mm512_packus_epi32((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
    _mm256_storeu_si256((__m256i *)to, _mm256_packus_epi32((__m256i)a, (__m256i)b));
#else
    for (int i = 0; i < LANES; i++) {
        ((half *)to)[i] = (uint16_t)a[i];
        ((half *)to)[LANES + i] = (uint16_t)b[i];
    }
#endif
}

/* The dither of LANES coordinates, u or the upper v, plus `turn` by 16-bit halves. The dither word of
 * coordinate j is its word rotated until byte j mod 4 is on top; v is its upper half, u the lower one. */
INLINE vu dither_halves(const uint8_t *dither, int64_t j, const int upper, vu turn) {
    vu halves;
#if defined(__AVX2__) || defined(__aarch64__)
    /* Byte b of lane c comes from byte (c + 1 + b) mod 4 of its word; bytes 2 and 3 are zero. */
#define FROM(c, b) (uint8_t)((c) / 4 * 4 + ((c) + 1 + (b)) % 4)
#define LOWER(c) FROM(c, 0), FROM(c, 1), 0x80, 0x80
#define UPPER(c) FROM(c, 2), FROM(c, 3), 0x80, 0x80
    static const uint8_t from[2][4 * LANES]
        __attribute__((aligned(4 * LANES))) = {{EACH_LANE(LOWER)}, {EACH_LANE(UPPER)}};
#if defined(__aarch64__)
    const u32 *word = (const u32 *)(dither + j);
    halves = (vu)vqtbl1q_u8(vreinterpretq_u8_u32(vld1q_dup_u32(word)), vld1q_u8(from[upper]));
#elif defined(__AVX512F__)
    __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(dither + j)));
    halves = (vu)_mm512_shuffle_epi8(words, _mm512_load_si512(from[upper]));
#else
    long long words;
    memcpy(&words, dither + j, 8);
    halves = (vu)_mm256_shuffle_epi8(_mm256_set1_epi64x(words), *(const __m256i *)from[upper]);
#endif
#else
    vu words, right, left;
    for (int i = 0; i < LANES; i++) {
        uint32_t word;
        memcpy(&word, dither + j + (i & ~3), 4);
        words[i] = word;
        right[i] = (8 * (i & 3) + 8) & 31;
        left[i] = (32 - right[i]) & 31;
    }
    words = (words >> right) | (words << left);
    halves = words & 0xffff;
    if (upper) halves = words >> 16;
#endif
    return (vu)((vh)halves + (vh)turn);
}

/* Codes and exact coordinates of one block, given its root mean square and the bits of its largest
 * magnitude; returns its scale. `room` and `indices` are scratch of d numbers. Fetches d `width` bytes
 * from `next` on. */
static float quic_fl_encode(const Plan *plan, float *y, float rms, uint32_t peak,
                            const uint8_t *dither, uint32_t stratum, float *room, i32 *indices,
                            uint8_t *codes, uint8_t *section, const char *next, int64_t width) {
    const int64_t size = plan->size;
    float fitting = plan->exact_capacity
                        ? take_exact(plan, y, rms, dither, stratum, indices, room, section)
                        : from_bits(peak) * plan->inverse_bound;
    float scale = rms > fitting ? rms : fitting;
    float unit = scale > 0 ? (1.0f / scale) * plan->nodes_per_sigma : 0.0f;
#if defined(__AVX512VBMI__)
    if (plan->bits <= 4 && size >= 64) {
        quic_fl_codes_by_bytes(plan, y, dither, stratum, unit, next, width, codes);
        return scale;
    }
#endif
#if defined(__aarch64__)
    fetch(next, size * width);
    quic_fl_codes(plan, y, dither, stratum, unit, codes);
#else
    const u32 *positions = (const u32 *)plan->positions;
    const vu turn_v = (vu){0} + (stratum << 8), turn_u = turn_v + (uint32_t)plan->middle;
    u32 nodes[TILE / 2];
    for (int64_t base = 0; base < size; base += TILE) {
        const int64_t tile = least(size - base, TILE);
        for (int64_t j = 0; j < tile; j += 2 * LANES) {
            vu z[2];
            UNROLL(2)
            for (int i = 0; i < 2; i++) {
                const int64_t at = base + j + i * LANES;
                z[i] = (vu)to_integers(load(y + at) * unit) + dither_halves(dither, at, 0, turn_u);
            }
            store_upper(nodes + j / 2, z[0], z[1]);
        }
        for (int64_t j = 0; j < tile; j += CODER_LANES) {
            vu position[VECTORS];
            fetch(next + (base + j) * width, CODER_LANES * width);
            UNROLL(8)
            for (int i = 0; i < VECTORS; i++) {
                const u32 *from = nodes + (j + i / 2 * 2 * LANES) / 2 + i % 2 * 2;
                vu v = dither_halves(dither, base + j + i * LANES, 1, turn_v);
                position[i] = (look_up_by_words(positions, from, 8) + v) >> 16;
                IN_ORDER;
            }
            store_bytes(codes + base + j, position);
        }
    }
#endif
    return scale;
}

typedef uint8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t words __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t twice __attribute__((vector_size(32), aligned(2), may_alias));

/* The indices of CODER_LANES levels, code 2^l + the upper l bits of the dither, as bytes, or as 16-bit
 * numbers. */
INLINE void level_indices(const uint8_t *codes, const uint8_t *dither, uint32_t stratum, int shared_bits,
                          const int wide, u32 *index) {
    const uint8_t lower = (uint8_t)((1 << shared_bits) - 1);
    UNROLL(2)
    for (int i = 0; i < CODER_LANES; i += 16) {
        bytes v = *(const bytes *)(dither + i) + (uint8_t)stratum, code = *(const bytes *)(codes + i);
        bytes shared = (bytes)((words)v >> (8 - shared_bits)) & lower;
        if (wide)
            *(twice *)(index + i / 2) = __builtin_convertvector(code, twice) << shared_bits |
                                        __builtin_convertvector(shared, twice);
        else
            *(bytes *)(index + i / 4) = (bytes)((words)code << shared_bits) | shared;
    }
}

/* y <- or y += scale * level(code, dither) */
INLINE void quic_fl_look_up(const Plan *plan, const uint8_t *codes, const uint8_t *dither,
                            uint32_t stratum, float scale, const int wide, const int initial, float *y) {
    const u32 *levels = (const u32 *)plan->levels;
    const int64_t size = plan->size;
    const int shared_bits = plan->shared_bits;
    u32 index[TILE / 2];
    for (int64_t base = 0; base < size; base += TILE) {
        const int64_t tile = least(size - base, TILE);
        for (int64_t j = 0; j < tile; j += CODER_LANES)
            level_indices(codes + base + j, dither + base + j, stratum, shared_bits, wide,
                          index + j / (wide ? 2 : 4));
        for (int64_t j = 0; j < tile; j += LANES, y += LANES) {
            vu level = wide ? look_up_by_words(levels, index + j / 2, 4) : look_up_by_bytes(levels, index + j / 4);
            vf value = (vf)level * scale;
            if (!initial) value = load(y) + value;
            store(y, value);
        }
    }
}

/* y <- or y += scale * level(code, dither) */
static void quic_fl_add(const Plan *plan, const uint8_t *codes, const uint8_t *dither,
                        uint32_t stratum, float scale, int initial, float *y) {
#if defined(__AVX512VBMI__)
    if (plan->bits + plan->shared_bits <= 8 && plan->size >= 64) {
        if (initial)
            quic_fl_add_by_bytes(plan, codes, dither, stratum, scale, 1, y);
        else
            quic_fl_add_by_bytes(plan, codes, dither, stratum, scale, 0, y);
        return;
    }
#endif
#if defined(__aarch64__)
    if (initial)
        quic_fl_add_sixteens(plan, codes, dither, stratum, scale, 1, y);
    else
        quic_fl_add_sixteens(plan, codes, dither, stratum, scale, 0, y);
#else
    const int wide = plan->bits + plan->shared_bits > 8;
    if (wide && initial)
        quic_fl_look_up(plan, codes, dither, stratum, scale, 1, 1, y);
    else if (wide)
        quic_fl_look_up(plan, codes, dither, stratum, scale, 1, 0, y);
    else if (initial)
        quic_fl_look_up(plan, codes, dither, stratum, scale, 0, 1, y);
    else
        quic_fl_look_up(plan, codes, dither, stratum, scale, 0, 0, y);
#endif
}
