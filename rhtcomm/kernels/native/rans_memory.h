/* The coder with tables in memory. */
#pragma once
#include "lanes.h"

/* A symbol that is encoded has two numbers. The lower 32 bits hold its frequency f (13 bits), the first
 * of its slots (13 bits), and s, 2^s >= f; the upper ones the least integer m >= 2^(31 + s) / f. */
enum { FIELD = 0x1fff };

/* A slot that is decoded has its symbol's column (8 bits), frequency (12), and slot - start (12). */
enum { SLOT_FIELD = 0xfff };

/* Lanes that are coded at a time. */
#if defined(__AVX2__)
typedef vu Group;
enum { GROUPS = VECTORS, WIDTH = LANES };

/* Some lanes: AVX-512 has a bit for each, AVX2 all of its bits. */
#if defined(__AVX512F__)
typedef __mmask16 Mask;
INLINE Mask at_least(vu a, vu b) { return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b); }
INLINE uint32_t bits_of(Mask mask) { return mask; }
INLINE vu select_lanes(Mask mask, vu yes, vu no) {
    return (vu)_mm512_mask_mov_epi32((__m512i)no, mask, (__m512i)yes);
}
#else
typedef __m256i Mask;
INLINE Mask at_least(vu a, vu b) {
    return _mm256_cmpeq_epi32(_mm256_max_epu32((__m256i)a, (__m256i)b), (__m256i)a);
}
INLINE uint32_t bits_of(Mask mask) {
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(mask));
}
INLINE vu select_lanes(Mask mask, vu yes, vu no) {
    return (vu)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, mask);
}
#endif

/* The numbers of two, and four, symbols. */
INLINE __m128i load_two(const uint64_t *table, const uint8_t *symbols) {
    __m128d low = _mm_castsi128_pd(_mm_loadl_epi64((const __m128i *)(table + symbols[0])));
    return _mm_castpd_si128(_mm_loadh_pd(low, (const double *)(table + symbols[1])));
}

INLINE __m256i load_four(const uint64_t *table, const uint8_t *symbols) {
    __m256i low = _mm256_castsi128_si256(load_two(table, symbols));
    return _mm256_inserti128_si256(low, load_two(table, symbols + 2), 1);
}

/* Those of LANES symbols. */
INLINE void load_symbols(const uint64_t *table, const uint8_t *symbols, vu *entry, vu *inverse) {
    __m256i a = load_four(table, symbols), b = load_four(table, symbols + 4);
#if defined(__AVX512F__)
    __m256i c = load_four(table, symbols + 8), d = load_four(table, symbols + 12);
    __m512i lower = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    __m512i upper = _mm512_inserti64x4(_mm512_castsi256_si512(c), d, 1);
    const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi32(1));
    *entry = (vu)_mm512_permutex2var_epi32(lower, low, upper);
    *inverse = (vu)_mm512_permutex2var_epi32(lower, high, upper);
#else
    __m256 lower = _mm256_castsi256_ps(a), upper = _mm256_castsi256_ps(b);
    __m256i low = _mm256_castps_si256(_mm256_shuffle_ps(lower, upper, 0x88));
    __m256i high = _mm256_castps_si256(_mm256_shuffle_ps(lower, upper, 0xdd));
    *entry = (vu)_mm256_permute4x64_epi64(low, 0xd8);
    *inverse = (vu)_mm256_permute4x64_epi64(high, 0xd8);
#endif
}

/* Products of the lower halves of 64-bit lanes, shifted right by the lower 6 bits of `shift`. */
INLINE vl multiply_shift(vl a, vl b, vl shift) {
#if defined(__AVX512F__)
    return (vl)_mm512_srlv_epi64(_mm512_mul_epu32((__m512i)a, (__m512i)b), (__m512i)(shift & 63));
#else
    return (vl)_mm256_srlv_epi64(_mm256_mul_epu32((__m256i)a, (__m256i)b), (__m256i)(shift & 63));
#endif
}

INLINE vu divide(vu x, vu inverse, vu shift) {
    vl even = multiply_shift((vl)x, (vl)inverse, (vl)shift);
    vl odd = multiply_shift((vl)x >> 32, (vl)inverse >> 32, (vl)shift >> 32);
    return (vu)(even | odd << 32);
}

#if !defined(__AVX512F__)
/* The lanes 0 .. 7 as bytes, and 0xff for each bit of a mask. */
INLINE uint64_t all_lanes(void) { return 0x0706050403020100u; }
INLINE uint64_t bytes_of_mask(uint32_t mask) { return _pdep_u64(mask, 0x0101010101010101u) * 255; }
INLINE __m256i lane_numbers(uint64_t bytes) {
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
}
#endif

/* Stores the lower halves of those lanes that the mask has, in order, before `next`; what lies before
 * them may change too. Returns where they begin. */
INLINE uint8_t *store_before(uint8_t *next, uint32_t mask, vu x) {
    const int count = __builtin_popcount(mask);
#if defined(__AVX512F__)
    __m512i packed = _mm512_maskz_compress_epi32((__mmask16)mask, (__m512i)x);
    next -= 2 * count;
    _mm256_mask_storeu_epi16(next, (__mmask16)((1u << count) - 1), _mm512_cvtepi32_epi16(packed));
    return next;
#else
    uint64_t lanes = _pext_u64(all_lanes(), bytes_of_mask(mask));
    lanes = lanes << (8 * ((8 - count) / 2)) << (8 * ((9 - count) / 2)); /* they are the last */
    __m256i packed = _mm256_permutevar8x32_epi32((__m256i)(x & 0xffff), lane_numbers(lanes));
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
    _mm_storeu_si128((__m128i *)(next - 16), words);
    return next - 2 * count;
#endif
}

/* Each lane that the mask has gets the next word. */
INLINE vu load_words(const uint8_t *next, uint32_t mask) {
#if defined(__AVX512F__)
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)next));
    return (vu)_mm512_maskz_expand_epi32((__mmask16)mask, words);
#else
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)next));
    uint64_t lanes = _pdep_u64(all_lanes(), bytes_of_mask(mask));
    return (vu)_mm256_permutevar8x32_epi32(words, lane_numbers(lanes));
#endif
}

/* Four loads from a table; on most processors they take less time than a gather instruction. */
INLINE __m128i look_up_four(const u32 *table, __m128i index) {
    const uint64_t a = (uint64_t)_mm_cvtsi128_si64(index), b = (uint64_t)_mm_extract_epi64(index, 1);
    __m128i low = _mm_cvtsi32_si128((int)table[(uint32_t)a]);
    __m128i high = _mm_cvtsi32_si128((int)table[(uint32_t)b]);
    low = _mm_insert_epi32(low, (int)table[a >> 32], 1);
    high = _mm_insert_epi32(high, (int)table[b >> 32], 1);
    return _mm_unpacklo_epi64(low, high);
}

INLINE vu look_up_lanes(const u32 *table, vu index) {
#if defined(__AVX512F__)
    __m256i low = _mm512_castsi512_si256((__m512i)index);
    __m256i high = _mm512_extracti64x4_epi64((__m512i)index, 1);
#else
    __m256i low = (__m256i)index;
#endif
    __m128i first = look_up_four(table, _mm256_castsi256_si128(low));
    __m128i second = look_up_four(table, _mm256_extracti128_si256(low, 1));
    low = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
#if defined(__AVX512F__)
    first = look_up_four(table, _mm256_castsi256_si128(high));
    second = look_up_four(table, _mm256_extracti128_si256(high, 1));
    high = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    return (vu)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
    return (vu)low;
#endif
}

/* Encodes symbols; what they emit goes before `next`. Returns where that begins. */
INLINE uint8_t *encode_group(const uint64_t *table, int precision, const uint8_t *symbols, Group *x,
                             uint8_t *next) {
    vu entry, inverse;
    load_symbols(table, symbols, &entry, &inverse);
    const vu f = entry & FIELD, old = *x;
    const Mask emits = at_least(old, f << (32 - precision));
    const vu rest = select_lanes(emits, old >> 16, old);
    const vu quotient = divide(rest, inverse, (entry >> 26) + 31);
    *x = rest + (entry >> 13 & FIELD) + quotient * ((1u << precision) - f);
    return store_before(next, bits_of(emits), old);
}

/* Decodes symbols, given their classes; returns their slots. */
INLINE Group decode_group(const u32 *table, int precision, const uint8_t *classes, Group *x,
                          const uint8_t **next) {
    const vu old = *x, base = load_bytes(classes) << precision;
    const vu slot = look_up_lanes(table, (old & ((1u << precision) - 1)) + base);
    const vu state = (slot >> 12 & SLOT_FIELD) * (old >> precision) + (slot & SLOT_FIELD);
    const Mask reads = at_least((vu){0} + 0xffff, state);
    *x = select_lanes(reads, state << 16 | load_words(*next, bits_of(reads)), state);
    *next += 2 * __builtin_popcount(bits_of(reads));
    return slot;
}

INLINE void store_columns(uint8_t *to, const Group *slots) {
    vu columns[VECTORS];
    for (int i = 0; i < VECTORS; i++) columns[i] = slots[i] >> 24;
    store_bytes(to, columns);
}
#elif defined(__aarch64__)
#include "rans_neon.h"
#else
typedef uint32_t Group;
enum { GROUPS = CODER_LANES, WIDTH = 1 };

INLINE uint8_t *encode_group(const uint64_t *table, int precision, const uint8_t *symbols, Group *x,
                             uint8_t *next) {
    const uint64_t symbol = table[*symbols];
    const uint32_t entry = (uint32_t)symbol, inverse = symbol >> 32, f = entry & FIELD;
    const uint16_t word = (uint16_t)*x;
    const uint32_t emits = *x >= f << (32 - precision); /* which no branch could predict */
    memcpy(next - 2, &word, 2);                         /* overwritten if it is not emitted */
    const uint32_t rest = *x >> 16 * emits;
    const uint32_t quotient = (uint32_t)((uint64_t)rest * inverse >> (31 + (entry >> 26)));
    *x = rest + (entry >> 13 & FIELD) + quotient * ((1u << precision) - f);
    return next - 2 * emits;
}

INLINE Group decode_group(const u32 *table, int precision, const uint8_t *classes, Group *x,
                          const uint8_t **next) {
    const uint32_t base = (uint32_t)*classes << precision;
    const uint32_t slot = table[base + (*x & ((1u << precision) - 1))];
    const uint32_t state = (slot >> 12 & SLOT_FIELD) * (*x >> precision) + (slot & SLOT_FIELD);
    uint16_t word;
    memcpy(&word, *next, 2);
    const uint32_t reads = state < 1u << 16; /* which no branch could predict */
    *next += 2 * reads;
    *x = state << 16 * reads | (word & (0u - reads));
    return slot;
}

INLINE void store_columns(uint8_t *to, const Group *slots) {
    for (int i = 0; i < GROUPS; i++) to[i] = (uint8_t)(slots[i] >> 24);
}
#endif

INLINE void take_groups(const Lanes *lanes, const int count, Group (*x)[GROUPS], uint8_t **next) {
    EACH_UNIT {
        memcpy(x[k], lanes[k].x, sizeof x[k]);
        next[k] = lanes[k].next;
    }
}

INLINE void put_groups(Lanes *lanes, const int count, Group (*x)[GROUPS], uint8_t **next) {
    EACH_UNIT {
        memcpy(lanes[k].x, x[k], sizeof x[k]);
        lanes[k].next = next[k];
    }
}

INLINE int encode_by_memory(const Plan *plan, Lanes *lanes, const int count, const uint8_t *symbols) {
    const uint64_t *table = plan->symbols;
    const int precision = plan->precision;
    const int64_t size = plan->size;
    Group x[SIDE_BY_SIDE][GROUPS];
    uint8_t *next[SIDE_BY_SIDE];
    take_groups(lanes, count, x, next);
    for (int64_t j = size - CODER_LANES; j >= 0; j -= CODER_LANES)
        EACH_UNIT {
            const uint8_t *from = symbols + k * size + j;
            UNROLL(8)
            for (int i = GROUPS - 1; i >= 0; i--)
                next[k] = encode_group(table, precision, from + WIDTH * i, &x[k][i], next[k]);
            if (next[k] < lanes[k].edge) return 0;
        }
    put_groups(lanes, count, x, next);
    return 1;
}

INLINE void decode_by_memory(const Plan *plan, Lanes *lanes, const int count, uint8_t *symbols) {
    const u32 *table = plan->slots;
    const int precision = plan->precision;
    const int64_t size = plan->size;
    Group x[SIDE_BY_SIDE][GROUPS];
    uint8_t *next[SIDE_BY_SIDE];
    take_groups(lanes, count, x, next);
    for (int64_t j = 0; j < size; j += CODER_LANES)
        EACH_UNIT {
            uint8_t room[STEP_BYTES], *at = symbols + k * size + j;
            const uint8_t *from = words_of_step(next[k], lanes[k].edge, room), *begin = from;
            Group slots[GROUPS];
            UNROLL(8)
            for (int i = 0; i < GROUPS; i++)
                slots[i] = decode_group(table, precision, at + WIDTH * i, &x[k][i], &from);
            store_columns(at, slots);
            next[k] += least(lanes[k].edge - next[k], from - begin);
        }
    put_groups(lanes, count, x, next);
}
