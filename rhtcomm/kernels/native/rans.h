/* rANS in 32 interleaved lanes; see rans.py. */
#pragma once
#include "plan.h"
#include "vectors.h"

enum { CODER_LANES = 32, STATE_BYTES = 4 * CODER_LANES, STEP_BYTES = 2 * CODER_LANES };

/* The coder of a unit between two of its blocks. */
typedef struct {
    uint32_t x[CODER_LANES];
    uint8_t *next;       /* encoding: what the word before follows; decoding: the next word */
    const uint8_t *edge; /* encoding: words must not lie before it; decoding: the end of the unit */
} Lanes;

/* A symbol that is encoded has two numbers. The lower 32 bits hold its frequency f (13 bits), the first
 * of its slots (13 bits), and s, 2^s >= f; the upper ones the least integer m >= 2^(31 + s) / f. */
enum { FIELD = 0x1fff };

/* A slot that is decoded has its symbol's column (8 bits), frequency (12), and slot - start (12). */
enum { SLOT_FIELD = 0xfff };

#if defined(__AVX2__)
enum { VECTORS = CODER_LANES / LANES };

/* The numbers of LANES symbols. */
INLINE void load_symbols(const uint64_t *symbols, vu *entry, vu *inverse) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi32(1));
    __m512i a = _mm512_loadu_si512(symbols), b = _mm512_loadu_si512(symbols + 8);
    *entry = (vu)_mm512_permutex2var_epi32(a, low, b);
    *inverse = (vu)_mm512_permutex2var_epi32(a, high, b);
#else
    __m256 a = _mm256_loadu_ps((const float *)symbols), b = _mm256_loadu_ps((const float *)(symbols + 4));
    __m256i low = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    __m256i high = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
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

/* One bit for each lane, whether a >= b. */
INLINE uint32_t at_least(vu a, vu b) {
#if defined(__AVX512F__)
    return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b);
#else
    __m256i larger = _mm256_max_epu32((__m256i)a, (__m256i)b);
    __m256i same = _mm256_cmpeq_epi32(larger, (__m256i)a);
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(same));
#endif
}

INLINE vu select_lanes(uint32_t mask, vu yes, vu no) {
#if defined(__AVX512F__)
    return (vu)_mm512_mask_mov_epi32((__m512i)no, (__mmask16)mask, (__m512i)yes);
#else
    vu bit;
    for (int i = 0; i < LANES; i++) bit[i] = 1u << i;
    vu set = (vu)((((vu){0} + mask) & bit) != 0);
    return (vu)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, (__m256i)set);
#endif
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
#endif

/* Encodes `steps` steps of symbols, the last one first. Returns 0 where their words reach the edge;
 * they overrun it by less than STATE_BYTES. */
static int rans_encode(const Plan *plan, Lanes *lanes, const uint64_t *symbols, int64_t steps) {
    const int to_limit = 32 - plan->precision;
    const uint32_t total = 1u << plan->precision;
    uint8_t *next = lanes->next;
#if defined(__AVX2__)
    vu x[VECTORS];
    memcpy(x, lanes->x, sizeof x);
    for (int64_t step = steps - 1; step >= 0; step--) {
#pragma GCC unroll 4
        for (int i = VECTORS - 1; i >= 0; i--) {
            vu entry, inverse;
            load_symbols(symbols + CODER_LANES * step + LANES * i, &entry, &inverse);
            vu f = entry & FIELD;
            const uint32_t emits = at_least(x[i], f << to_limit);
            next = store_before(next, emits, x[i]);
            x[i] = select_lanes(emits, x[i] >> 16, x[i]);
            x[i] += (entry >> 13 & FIELD) + divide(x[i], inverse, (entry >> 26) + 31) * (total - f);
        }
        if (next < lanes->edge) return 0;
    }
    memcpy(lanes->x, x, sizeof x);
#else
    for (int64_t step = steps - 1; step >= 0; step--) {
        for (int i = CODER_LANES - 1; i >= 0; i--) {
            const uint32_t entry = (uint32_t)symbols[CODER_LANES * step + i];
            const uint32_t inverse = symbols[CODER_LANES * step + i] >> 32, f = entry & FIELD;
            uint32_t x = lanes->x[i];
            const uint16_t word = (uint16_t)x;
            const uint32_t emits = x >= f << to_limit; /* which no branch could predict */
            memcpy(next - 2, &word, 2); /* overwritten where it is not emitted */
            next -= 2 * emits;
            x >>= 16 * emits;
            const uint32_t quotient = (uint32_t)((uint64_t)x * inverse >> (31 + (entry >> 26)));
            lanes->x[i] = x + (entry >> 13 & FIELD) + quotient * (total - f);
        }
        if (next < lanes->edge) return 0;
    }
#endif
    lanes->next = next;
    return 1;
}

/* Where the words of a step are: at `next`, or where the unit ends before, copied to `room`. Behind the
 * end of the unit are zeros. */
INLINE const uint8_t *words_of_step(const uint8_t *next, const uint8_t *end, uint8_t *room) {
    if (__builtin_expect(end - next >= STEP_BYTES, 1)) return next;
    memset(room, 0, STEP_BYTES);
    memcpy(room, next, (size_t)(end - next));
    return room;
}

/* Decodes a symbol, given where the slots of its class begin; returns its slot. */
INLINE uint32_t decode_lane(const u32 *table, int precision, uint32_t base, uint32_t *state,
                            const uint8_t **next) {
    const uint32_t slot = table[base + (*state & ((1u << precision) - 1))];
    const uint32_t x = (slot >> 12 & SLOT_FIELD) * (*state >> precision) + (slot & SLOT_FIELD);
    uint16_t word;
    memcpy(&word, *next, 2);
    const uint32_t reads = x < 1u << 16; /* which no branch could predict */
    *next += 2 * reads;
    *state = x << 16 * reads | (word & (0u - reads));
    return slot;
}

#if defined(__AVX2__)
/* The same of LANES lanes. */
INLINE vu decode_lanes(const u32 *table, int precision, vu base, vu *states, const uint8_t **next) {
    const vu x = *states;
    vu slot = look_up_lanes(table, (x & ((1u << precision) - 1)) + base);
    vu state = (slot >> 12 & SLOT_FIELD) * (x >> precision) + (slot & SLOT_FIELD);
    const uint32_t reads = at_least((vu){0} + 0xffff, state);
    *states = select_lanes(reads, state << 16 | load_words(*next, reads), state);
    *next += 2 * __builtin_popcount(reads);
    return slot;
}
#endif
