/* QUIC-FL by tables of bytes in registers, for AVX-512 VBMI. */
#pragma once
#include "plan.h"
#include "vectors.h"

/* The bytes of `table` (512) at indices of nine bits: `index`, bit 7 of it again, and bit 8. */
INLINE __m512i look_up_bytes(const uint8_t *table, __m512i index, __mmask64 bit7, __mmask64 bit8) {
    __m512i quarter[4];
    UNROLL(4)
    for (int i = 0; i < 4; i++)
        quarter[i] = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128 * i), index,
                                              _mm512_load_si512(table + 128 * i + 64));
    return _mm512_mask_blend_epi8(bit8, _mm512_mask_blend_epi8(bit7, quarter[0], quarter[1]),
                                  _mm512_mask_blend_epi8(bit7, quarter[2], quarter[3]));
}

/* The positions at the node of zero and the 511 nodes above it, by bytes. */
typedef struct {
    uint8_t q0[512], q1[512]; /* bytes 0 and 1 */
    uint8_t p[64], first[64]; /* bytes 2 and 1 at every eighth node */
} Positions;

INLINE void split_positions(const Plan *plan, Positions *to) {
    uint16_t even __attribute__((vector_size(64)));
    uint8_t lower __attribute__((vector_size(64)));
    for (int i = 0; i < 32; i++) even[i] = (uint16_t)(2 * i);
    for (int i = 0; i < 64; i++) lower[i] = (uint8_t)(2 * i);
    const int32_t *from = plan->positions + 512;
    for (int i = 0; i < 512; i += 64) {
        __m512i half[2]; /* of 32 positions each, the lower halves */
        for (int k = 0; k < 2; k++)
            half[k] = _mm512_permutex2var_epi16(_mm512_loadu_si512(from + i + 32 * k), (__m512i)even,
                                                _mm512_loadu_si512(from + i + 32 * k + 16));
        _mm512_store_si512(to->q0 + i, _mm512_permutex2var_epi8(half[0], (__m512i)lower, half[1]));
        _mm512_store_si512(to->q1 + i,
                           _mm512_permutex2var_epi8(half[0], (__m512i)(lower + 1), half[1]));
    }
    for (int i = 0; i < 64; i += 16) {
        __m512i eighth = _mm512_i32gather_epi32((__m512i)(8 * (ascending + i)), from, 4);
        __m128i *p = (__m128i *)(to->p + i), *first = (__m128i *)(to->first + i);
        _mm_store_si128(first, _mm512_cvtepi32_epi8(_mm512_srli_epi32(eighth, 8)));
        _mm_store_si128(p, _mm512_cvtepi32_epi8(_mm512_srli_epi32(eighth, 16)));
    }
}

/* z <- y * unit + u of 64 coordinates, times 2^16; u_of selects the bytes of u, turn shifts it. */
INLINE void add_dither(const float *y, const uint8_t *dither, float unit, __m512i u_of, __m512i turn,
                       __m512i *z) {
    UNROLL(4)
    for (int k = 0; k < 4; k++) {
        const __m128i *words = (const __m128i *)(dither + 16 * k);
        __m512i u = _mm512_broadcast_i32x4(_mm_loadu_si128(words));
        u = _mm512_add_epi16(_mm512_shuffle_epi8(u, u_of), turn);
        z[k] = (__m512i)to_integers(load(y + 16 * k) * unit);
        z[k] = _mm512_add_epi32(z[k], u);
    }
}

/* Whether 2^16 - 1 - v < q, and where `negative` v < q; q and v by their lower and upper bytes. */
INLINE __mmask64 rounds_up(__m512i q0, __m512i q1, __m512i v0, __m512i v1, __mmask64 negative) {
    v1 = _mm512_mask_sub_epi8(v1, ~negative, _mm512_set1_epi8(-1), v1);
    v0 = _mm512_mask_sub_epi8(v0, ~negative, _mm512_set1_epi8(-1), v0);
    __mmask64 upper = _mm512_cmplt_epu8_mask(v1, q1);
    return upper | _mm512_mask_cmplt_epu8_mask(_mm512_cmpeq_epi8_mask(v1, q1), v0, q0);
}

/* The codes of y * unit for 1025 nodes, that is for b <= 4, and whole groups of 64 coordinates. Fetches d `width`
 * bytes from `next` on.
 *
 * Node m is counted from that of zero here. position(-m) = (2^b - 1) 2^16 - position(m), so the positions
 * at m = 0 .. 511 suffice. With p the upper and q the lower 16 bits of position(|m|), a code is
 * p + (2^16 - 1 - v < q), and for m < 0 it is 2^b - 1 - p - (v < q). Between m and the multiple of 8 below
 * it, positions rise by less than 2^16 - 2^8, so p is one more than there if the upper byte of q is less. */
static void quic_fl_codes_by_bytes(const Plan *plan, const float *y, const uint8_t *dither,
                                   uint32_t stratum, float unit, const char *next,
                                   int64_t width, uint8_t *codes) {
    Positions positions __attribute__((aligned(64)));
    split_positions(plan, &positions);
    const __m512i p_of = _mm512_load_si512(positions.p), first_of = _mm512_load_si512(positions.first);
    uint16_t upper_words __attribute__((vector_size(64)));
    for (int i = 0; i < 32; i++) upper_words[i] = (uint16_t)(2 * i + 1);
    uint8_t even __attribute__((vector_size(64))), u_of __attribute__((vector_size(64)));
    for (int i = 0; i < 64; i++) {
        even[i] = (uint8_t)(2 * i);
        /* as in dither_halves */
        u_of[i] = (uint8_t)(i % 4 < 2 ? i / 16 * 4 + (i / 4 + 1 + i) % 4 : 0x80);
    }
    const __m512i last = _mm512_set1_epi8((char)((1 << plan->bits) - 1));
    const __m512i turn = _mm512_set1_epi8((char)stratum), one = _mm512_set1_epi8(1);
    const __m512i turn_u = _mm512_set1_epi32((int)(stratum << 8));
    for (int64_t j = 0; j < plan->size; j += 64) {
        __m512i z[4], m[2], eighth[2];
        fetch(next + j * width, 64 * width);
        add_dither(y + j, dither + j, unit, (__m512i)u_of, turn_u, z);
        UNROLL(2)
        for (int k = 0; k < 2; k++)
            m[k] = _mm512_permutex2var_epi16(z[2 * k], (__m512i)upper_words, z[2 * k + 1]);
        __mmask64 negative = _mm512_kunpackd(_mm512_movepi16_mask(m[1]), _mm512_movepi16_mask(m[0]));
        UNROLL(2)
        for (int k = 0; k < 2; k++) {
            m[k] = _mm512_abs_epi16(m[k]);
            eighth[k] = _mm512_srli_epi16(m[k], 3);
        }
        __m512i lower = _mm512_permutex2var_epi8(m[0], (__m512i)even, m[1]);
        __m512i group = _mm512_permutex2var_epi8(eighth[0], (__m512i)even, eighth[1]);
        __mmask64 bit7 = _mm512_movepi8_mask(lower);
        __mmask64 bit8 = _mm512_test_epi8_mask(group, _mm512_set1_epi8(1 << 5));
        __mmask64 end = _mm512_test_epi8_mask(group, _mm512_set1_epi8(1 << 6)); /* |m| = 512 */
        __m512i q0 = look_up_bytes(positions.q0, lower, bit7, bit8);
        __m512i q1 = look_up_bytes(positions.q1, lower, bit7, bit8);
        __m512i first = _mm512_permutexvar_epi8(group, first_of);
        __m512i p = _mm512_permutexvar_epi8(group, p_of);
        p = _mm512_mask_add_epi8(p, _mm512_cmplt_epu8_mask(q1, first), p, one);
        __m512i v1 = _mm512_loadu_si512(dither + j), v0 = _mm512_rol_epi32(v1, 8);
        v1 = _mm512_add_epi8(v1, turn);
        p = _mm512_mask_add_epi8(p, rounds_up(q0, q1, v0, v1, negative), p, one);
        p = _mm512_mask_mov_epi8(p, end, last);
        _mm512_storeu_si512(codes + j, _mm512_mask_sub_epi8(p, negative, last, p));
    }
}

/* quic_fl_add for at most 256 levels and whole groups of 64 coordinates. Level N - 1 - i is -level(i), so
 * the first half of the N levels suffices. Cut into four planes of bytes it fits into registers, where one
 * instruction looks up 64 bytes among 128. */
INLINE void quic_fl_add_by_bytes(const Plan *plan, const uint8_t *codes, const uint8_t *dither,
                                 uint32_t stratum, float scale, int initial, float *y) {
    __m512i planes[4][2];
    const int twice = 8 - plan->bits - plan->shared_bits; /* how often a level is repeated, as a power of two */
    for (int i = 0; i < 128; i += 16) {
        __m512i bits = _mm512_permutexvar_epi32((__m512i)(ascending >> twice),
                                                _mm512_loadu_si512(plan->levels + (i >> twice)));
        for (int k = 0; k < 4; k++, bits = _mm512_srli_epi32(bits, 8))
            _mm_store_si128((__m128i *)planes[k] + i / 16, _mm512_cvtepi32_epi8(bits));
    }
    const __m512i turn = _mm512_set1_epi8((char)stratum), ones = _mm512_set1_epi8(-1);
    const __m128i left = _mm_cvtsi32_si128(8 - plan->bits), right = _mm_cvtsi32_si128(plan->bits);
    const __m512i lower = _mm512_set1_epi8((char)(0xff >> plan->bits));
    /* The last steps work on quarters of vectors; this makes coordinates come out in order. */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t j = 0; j < plan->size; j += 64) {
        __m512i v = _mm512_add_epi8(_mm512_loadu_si512(dither + j), turn);
        __m512i code = _mm512_sll_epi16(_mm512_loadu_si512(codes + j), left);
        /* code | v >> b & lower: the index of a level times 256 / N, and less than that */
        __m512i index =
            _mm512_ternarylogic_epi32(code, _mm512_srl_epi16(v, right), lower, 0xf8);
        index = _mm512_permutexvar_epi32(order, index);
        __m512i nearer = _mm512_min_epu8(index, _mm512_xor_si512(index, ones)), byte[4];
        UNROLL(4)
        for (int k = 0; k < 4; k++)
            byte[k] = _mm512_permutex2var_epi8(planes[k][0], nearer, planes[k][1]);
        byte[3] = _mm512_ternarylogic_epi32(byte[3], index, _mm512_set1_epi8(-128), 0x78);
        UNROLL(4)
        for (int k = 0; k < 4; k++) {
            __m512i a = k < 2 ? _mm512_unpacklo_epi8(byte[0], byte[1])
                              : _mm512_unpackhi_epi8(byte[0], byte[1]);
            __m512i b = k < 2 ? _mm512_unpacklo_epi8(byte[2], byte[3])
                              : _mm512_unpackhi_epi8(byte[2], byte[3]);
            vf value = (vf)(k % 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b));
            value *= scale;
            if (!initial) value = load(y + j + 16 * k) + value;
            store(y + j + 16 * k, value);
        }
    }
}
