/* The coder with tables in registers, for AVX-512: the 32 lanes of a step are one vector of 16-bit
 * numbers, and one instruction looks all of them up. */
#pragma once
#include "lanes.h"

#if defined(__AVX512F__)
/* Where 128 symbols suffice: C 2^depth <= 128, 2^depth >= 2 K + 1. A slot's symbol is found by bisection.
 * The class is followed by one bit after the other, whether the slot lies above a threshold; what is
 * known of the symbol is the index of the next look-up. */
typedef struct {
    uint16_t thresholds[6][32]; /* each the last slot of the lower half of what is left */
    /* Of the last two symbols that are left: where the slots of the first and the second one begin, and
     * where those of the second one end. */
    uint16_t first[64], second[64], end[64];
    /* Of symbols that are encoded: the frequency, and the first slot. */
    uint16_t frequency[128], start[128];
} Registers;

/* The lower, or upper, halves of 32 numbers. */
INLINE __m512i halves(__m512i a, __m512i b, const int upper) {
    uint16_t from __attribute__((vector_size(64)));
    for (int i = 0; i < 32; i++) from[i] = (uint16_t)(2 * i + upper);
    return _mm512_permutex2var_epi16(a, (__m512i)from, b);
}

/* The states of a unit, lower and upper halves. */
typedef struct {
    __m512i low, high;
} States;

INLINE States load_states(const uint32_t *x) {
    const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 16);
    return (States){halves(a, b, 0), halves(a, b, 1)};
}

INLINE void store_states(uint32_t *x, States s) {
    const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i a = _mm512_unpacklo_epi16(s.low, s.high), b = _mm512_unpackhi_epi16(s.low, s.high);
    _mm512_storeu_si512(x, _mm512_permutex2var_epi64(a, lower, b));
    _mm512_storeu_si512(x + 16, _mm512_permutex2var_epi64(a, upper, b));
}

INLINE __m512i widen(const uint8_t *bytes) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
}

INLINE __m512i look_up_64(const uint16_t *table, __m512i index) {
    return _mm512_permutex2var_epi16(_mm512_loadu_si512(table), index,
                                     _mm512_loadu_si512(table + 32));
}

/* `upper`: the lanes whose index is 64 or more. */
INLINE __m512i look_up_128(const uint16_t *table, __m512i index, __mmask32 upper) {
    return _mm512_mask_mov_epi16(look_up_64(table, index), upper, look_up_64(table + 64, index));
}

/* x + 1 where the mask says so: the carry from another vector. */
INLINE __m512i carry(__m512i x, __mmask32 mask) {
    return _mm512_mask_sub_epi16(x, mask, x, _mm512_set1_epi16(-1));
}

/* 2 index + 1 where x < 0, else 2 index. */
INLINE __m512i append_sign(__m512i index, __m512i x) {
#if defined(__AVX512VBMI2__)
    return _mm512_shldi_epi16(index, x, 1);
#else
    return _mm512_sub_epi16(_mm512_add_epi16(index, index), _mm512_srai_epi16(x, 15));
#endif
}

/* Lanes that the mask has get the next words, the others those of `x`. */
INLINE __m512i expand_words(__m512i x, __mmask32 mask, const uint8_t *next) {
#if defined(__AVX512VBMI2__)
    __m512i words = _mm512_loadu_si512(next);
    __asm__("" : "+v"(words)); /* in a register: from memory, Zen 4 expands them slowly */
    return _mm512_mask_expand_epi16(x, mask, words);
#else
    const uint8_t *behind = next + 2 * __builtin_popcount(mask & 0xffff);
    __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)next));
    __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)behind));
    a = _mm512_maskz_expand_epi32((__mmask16)mask, a);
    b = _mm512_maskz_expand_epi32((__mmask16)(mask >> 16), b);
    return _mm512_mask_mov_epi16(x, mask, halves(a, b, 0));
#endif
}

/* Stores those words that the mask has, in order, before `next`; returns where they begin. */
INLINE uint8_t *compress_words(uint8_t *next, __mmask32 mask, __m512i x) {
    const int count = __builtin_popcount(mask);
    next -= 2 * count;
#if defined(__AVX512VBMI2__)
    x = _mm512_maskz_compress_epi16(mask, x);
    _mm512_mask_storeu_epi16(next, (__mmask32)((1ull << count) - 1), x);
#else
    const int lower = __builtin_popcount(mask & 0xffff);
    __m512i a = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x));
    __m512i b = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1));
    __m256i first = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32((__mmask16)mask, a));
    __m256i second = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32((__mmask16)(mask >> 16), b));
    _mm256_mask_storeu_epi16(next, (__mmask16)((1u << lower) - 1), first);
    _mm256_mask_storeu_epi16(next + 2 * lower, (__mmask16)((1u << (count - lower)) - 1), second);
#endif
    return next;
}

/* The halves of x // f, or of one less, given those of x < 2^(32 - P) f, where P >= 10. Two roundings
 * towards zero take less than 2^-22 of x / f < 2^22 off, which is less than 1. */
INLINE States divide_words(States x, __m512i f) {
    enum { CHOP = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC };
    const __m512i zero = _mm512_setzero_si512();
    __m512i lower = _mm512_unpacklo_epi16(x.low, x.high), upper = _mm512_unpackhi_epi16(x.low, x.high);
    __m512 a = _mm512_cvt_roundepu32_ps(lower, CHOP), b = _mm512_cvt_roundepu32_ps(upper, CHOP);
    a = _mm512_div_round_ps(a, _mm512_cvtepi32_ps(_mm512_unpacklo_epi16(f, zero)), CHOP);
    b = _mm512_div_round_ps(b, _mm512_cvtepi32_ps(_mm512_unpackhi_epi16(f, zero)), CHOP);
    lower = _mm512_cvttps_epi32(a);
    upper = _mm512_cvttps_epi32(b);
    uint16_t from __attribute__((vector_size(64))); /* undoes the order of unpacking */
    for (int i = 0; i < 32; i++) from[i] = (uint16_t)(i / 4 % 2 * 32 + i / 8 * 8 + i % 4 * 2);
    return (States){_mm512_permutex2var_epi16(lower, (__m512i)from, upper),
                    _mm512_permutex2var_epi16(lower, (__m512i)(from + 1), upper)};
}

/* The states x' = (x / f) 2^P + x mod f + start. */
INLINE States append_symbol(States x, __m512i f, __m512i start, const int precision) {
    const __m512i total = _mm512_set1_epi16((short)(1 << precision));
    const __m128i left = _mm_cvtsi32_si128(precision), right = _mm_cvtsi32_si128(16 - precision);
    const States q = divide_words(x, f);
    __m512i rest = _mm512_sub_epi16(x.low, _mm512_mullo_epi16(q.low, f)); /* less than 2 f */
    const __mmask32 more = _mm512_cmpge_epu16_mask(rest, f); /* where the quotient was too small */
    rest = _mm512_mask_sub_epi16(rest, more, rest, f);
    __m512i low = _mm512_add_epi16(_mm512_sll_epi16(q.low, left), _mm512_add_epi16(rest, start));
    __m512i high = _mm512_or_si512(_mm512_sll_epi16(q.high, left), _mm512_srl_epi16(q.low, right));
    __m512i sum = _mm512_mask_add_epi16(low, more, low, total);
    return (States){sum, carry(high, _mm512_cmplt_epu16_mask(sum, low))};
}

INLINE void take_states(const Lanes *lanes, const int count, States *x, uint8_t **next) {
    EACH_UNIT {
        x[k] = load_states(lanes[k].x);
        next[k] = lanes[k].next;
    }
}

INLINE void put_states(Lanes *lanes, const int count, const States *x, uint8_t **next) {
    EACH_UNIT {
        store_states(lanes[k].x, x[k]);
        lanes[k].next = next[k];
    }
}

INLINE int encode_by_registers(const Plan *plan, Lanes *lanes, const int count,
                               const uint8_t *symbols) {
    const Registers *tables = (const Registers *)plan->registers;
    const int precision = plan->precision;
    const int64_t size = plan->size;
    const __m128i to_limit = _mm_cvtsi32_si128(16 - precision);
    States x[SIDE_BY_SIDE];
    uint8_t *next[SIDE_BY_SIDE];
    take_states(lanes, count, x, next);
    for (int64_t j = size - CODER_LANES; j >= 0; j -= CODER_LANES)
        EACH_UNIT {
            const __m512i symbol = widen(symbols + k * size + j);
            const __mmask32 upper = _mm512_test_epi16_mask(symbol, _mm512_set1_epi16(64));
            const __m512i f = look_up_128(tables->frequency, symbol, upper);
            const __m512i start = look_up_128(tables->start, symbol, upper);
            /* A state's upper half alone tells whether it is at least f 2^(32 - P). */
            __mmask32 emits = _mm512_cmpge_epu16_mask(x[k].high, _mm512_sll_epi16(f, to_limit));
            next[k] = compress_words(next[k], emits, x[k].low);
            if (next[k] < lanes[k].edge) return 0;
            x[k].low = _mm512_mask_mov_epi16(x[k].low, emits, x[k].high);
            x[k].high = _mm512_maskz_mov_epi16(~emits, x[k].high);
            x[k] = append_symbol(x[k], f, start, precision);
        }
    put_states(lanes, count, x, next);
    return 1;
}

/* Whether a slot is of the second symbol that is left, and the f of the one that it is of; the slot
 * becomes its place among that symbol's. */
INLINE __mmask32 last_choice(const Registers *tables, __m512i index, __m512i *slot, __m512i *f) {
    const __m512i second = look_up_64(tables->second, index);
    const __mmask32 above = _mm512_cmpge_epu16_mask(*slot, second);
    __m512i begin = _mm512_mask_mov_epi16(look_up_64(tables->first, index), above, second);
    __m512i end = _mm512_mask_mov_epi16(second, above, look_up_64(tables->end, index));
    *f = _mm512_sub_epi16(end, begin);
    *slot = _mm512_sub_epi16(*slot, begin);
    return above;
}

/* The states f (x >> P) + place, before words are read. With F = f 2^(16 - P), F x / 2^16 is the product,
 * where the lower P bits of x are left out; f times the others of its lower half, plus the place, is
 * less than 2^16. */
INLINE States drop_symbol(States x, __m512i f, __m512i place, const int precision) {
    const __m512i slots = _mm512_set1_epi16((short)((1 << precision) - 1));
    f = _mm512_sll_epi16(f, _mm_cvtsi32_si128(16 - precision));
    __m512i rest = _mm512_add_epi16(_mm512_mulhi_epu16(f, _mm512_andnot_si512(slots, x.low)), place);
    __m512i low = _mm512_add_epi16(_mm512_mullo_epi16(f, x.high), rest);
    __m512i high = _mm512_mulhi_epu16(f, x.high);
    return (States){low, carry(high, _mm512_cmplt_epu16_mask(low, rest))};
}

INLINE void decode_by_registers(const Plan *plan, Lanes *lanes, const int count, uint8_t *symbols) {
    const Registers *tables = (const Registers *)plan->registers;
    const int precision = plan->precision;
    const int thresholds = 31 - __builtin_clz((uint32_t)(2 * plan->largest)); /* depth - 1 */
    const int64_t size = plan->size;
    const __m512i slots = _mm512_set1_epi16((short)((1 << precision) - 1));
    const __m512i pairs = _mm512_set1_epi16((short)((1 << thresholds) - 1));
    States x[SIDE_BY_SIDE];
    uint8_t *next[SIDE_BY_SIDE];
    take_states(lanes, count, x, next);
    for (int64_t j = 0; j < size; j += CODER_LANES) {
        __m512i index[SIDE_BY_SIDE], slot[SIDE_BY_SIDE];
        EACH_UNIT {
            index[k] = widen(symbols + k * size + j);
            slot[k] = _mm512_and_si512(x[k].low, slots);
        }
        for (int i = 0; i < thresholds; i++) {
            const __m512i table = _mm512_loadu_si512(tables->thresholds[i]);
            EACH_UNIT {
                __m512i threshold = _mm512_permutexvar_epi16(index[k], table);
                index[k] = append_sign(index[k], _mm512_sub_epi16(threshold, slot[k]));
            }
        }
        EACH_UNIT {
            __m512i f;
            const __mmask32 above = last_choice(tables, index[k], &slot[k], &f);
            __m512i column = _mm512_and_si512(index[k], pairs); /* without the class */
            column = carry(_mm512_add_epi16(column, column), above);
            __m256i bytes = _mm512_cvtepi16_epi8(column);
            _mm256_storeu_si256((__m256i *)(symbols + k * size + j), bytes);
            const States y = drop_symbol(x[k], f, slot[k], precision);
            const __mmask32 reads = _mm512_testn_epi16_mask(y.high, y.high);
            uint8_t room[STEP_BYTES];
            const uint8_t *from = words_of_step(next[k], lanes[k].edge, room);
            x[k].low = expand_words(y.low, reads, from);
            x[k].high = _mm512_mask_mov_epi16(y.high, reads, y.low);
            next[k] += least(lanes[k].edge - next[k], 2 * __builtin_popcount(reads));
        }
    }
    put_states(lanes, count, x, next);
}
#endif
