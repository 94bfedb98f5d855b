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

/* A symbol that is encoded: its frequency f (10 bits are enough, 13 reserved), the first of its slots
 * (13 bits), and s for which 2^s >= f; the smallest integer above 2^(31 + s) / f. */
INLINE uint32_t frequency_of(uint32_t entry) { return entry & 0x1fff; }
INLINE uint32_t start_of(uint32_t entry) { return entry >> 13 & 0x1fff; }
INLINE uint32_t shift_of(uint32_t entry) { return 31 + (entry >> 26); }

/* A slot that is decoded: its symbol's column (8 bits), frequency (12), and slot - start (12). */
INLINE uint32_t column_of(uint32_t entry) { return entry >> 24; }

/* Encodes the symbols of `steps` steps, the last one first. Returns 0 where their words reach the edge.
 * The words of a step lie before those of the step behind it; where they overrun the edge, then by at
 * most STEP_BYTES. */
static int rans_encode(const Plan *plan, Lanes *lanes, const u32 *index, int64_t steps) {
    const int precision = plan->precision;
    const uint32_t total = 1u << precision;
    const u32 *table = plan->symbols;
    uint8_t *next = lanes->next;
#if defined(__AVX512F__)
    __m512i x[2];
    for (int i = 0; i < 2; i++) x[i] = _mm512_loadu_si512(lanes->x + 16 * i);
    const __m512i odd = _mm512_set1_epi64((int64_t)0xffffffff00000000u);
    for (int64_t step = steps - 1; step >= 0; step--) {
        const u32 *of_step = index + CODER_LANES * step;
        for (int i = 1; i >= 0; i--) {
            __m512i at = _mm512_loadu_si512(of_step + 16 * i);
            __m512i entry = _mm512_i32gather_epi32(at, table, 8);
            __m512i inverse = _mm512_i32gather_epi32(at, table + 1, 8);
            __m512i f = _mm512_and_si512(entry, _mm512_set1_epi32(0x1fff));
            __m512i start = _mm512_and_si512(_mm512_srli_epi32(entry, 13), _mm512_set1_epi32(0x1fff));
            __m512i shift = _mm512_add_epi32(_mm512_srli_epi32(entry, 26), _mm512_set1_epi32(31));
            __m512i limit = _mm512_sll_epi32(f, _mm_cvtsi32_si128(32 - precision));
            __mmask16 emits = _mm512_cmpge_epu32_mask(x[i], limit);
            __m256i words = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(emits, x[i]));
            int count = __builtin_popcount(emits);
            next -= 2 * count;
            _mm256_mask_storeu_epi16(next, (__mmask16)((1u << count) - 1), words);
            x[i] = _mm512_mask_srli_epi32(x[i], emits, x[i], 16);
            /* q = x // f, the even lanes and then the odd ones */
            __m512i even_shift = _mm512_and_si512(shift, _mm512_set1_epi64(63));
            __m512i q = _mm512_srlv_epi64(_mm512_mul_epu32(x[i], inverse), even_shift);
            __m512i q1 = _mm512_mul_epu32(_mm512_srli_epi64(x[i], 32), _mm512_srli_epi64(inverse, 32));
            q1 = _mm512_srlv_epi64(q1, _mm512_srli_epi64(shift, 32));
            q = _mm512_or_si512(q, _mm512_and_si512(_mm512_slli_epi64(q1, 32), odd));
            __m512i rest = _mm512_sub_epi32(_mm512_set1_epi32((int)total), f);
            x[i] = _mm512_add_epi32(_mm512_add_epi32(x[i], start), _mm512_mullo_epi32(q, rest));
        }
        if (next < lanes->edge) return 0;
    }
    for (int i = 0; i < 2; i++) _mm512_storeu_si512(lanes->x + 16 * i, x[i]);
#else
    for (int64_t step = steps - 1; step >= 0; step--) {
        const u32 *of_step = index + CODER_LANES * step;
        for (int i = CODER_LANES - 1; i >= 0; i--) {
            const uint32_t entry = table[2 * of_step[i]], inverse = table[2 * of_step[i] + 1];
            const uint32_t f = frequency_of(entry);
            uint32_t x = lanes->x[i];
            const uint16_t word = (uint16_t)x;
            const int emits = (uint64_t)x >= (uint64_t)f << (32 - precision);
            memcpy(next - 2, &word, 2); /* overwritten where it is not emitted */
            next -= 2 * emits;
            x = emits ? x >> 16 : x;
            const uint32_t q = (uint32_t)((uint64_t)x * inverse >> shift_of(entry));
            lanes->x[i] = x + start_of(entry) + q * (total - f);
        }
        if (next < lanes->edge) return 0;
    }
#endif
    lanes->next = next;
    return 1;
}

/* Decodes `steps` steps: column[j] is the symbol of coordinate j, whose class's slots begin at base[j]
 * of the table. Never reads outside of the unit. */
static void rans_decode(const Plan *plan, Lanes *lanes, const u32 *base, int64_t steps, u32 *column) {
    const int precision = plan->precision;
    const u32 *table = plan->slots;
    const uint8_t *next = lanes->next, *end = lanes->edge;
    uint8_t rest[STEP_BYTES];
#if defined(__AVX512F__)
    const __m512i mask = _mm512_set1_epi32((1 << precision) - 1), low = _mm512_set1_epi32(0xfff);
    __m512i x[2];
    for (int i = 0; i < 2; i++) x[i] = _mm512_loadu_si512(lanes->x + 16 * i);
#endif
    for (int64_t step = 0; step < steps; step++, base += CODER_LANES, column += CODER_LANES) {
        const uint8_t *from = next;
        if (end - next < STEP_BYTES) { /* behind the end of the unit are zeros */
            memset(rest, 0, STEP_BYTES);
            memcpy(rest, next, (size_t)(end - next));
            from = rest;
        }
        const uint8_t *begin = from;
#if defined(__AVX512F__)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512i slot = _mm512_and_si512(x[i], mask);
            slot = _mm512_add_epi32(slot, _mm512_loadu_si512(base + 16 * i));
            __m512i entry = _mm512_i32gather_epi32(slot, table, 4);
            __m512i f = _mm512_and_si512(_mm512_srli_epi32(entry, 12), low);
            __m512i high = _mm512_srl_epi32(x[i], _mm_cvtsi32_si128(precision));
            x[i] = _mm512_add_epi32(_mm512_mullo_epi32(f, high), _mm512_and_si512(entry, low));
            _mm512_storeu_si512(column + 16 * i, _mm512_srli_epi32(entry, 24));
            __mmask16 reads = _mm512_cmplt_epu32_mask(x[i], _mm512_set1_epi32(1 << 16));
            __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
            words = _mm512_maskz_expand_epi32(reads, words);
            x[i] = _mm512_mask_or_epi32(x[i], reads, _mm512_slli_epi32(x[i], 16), words);
            from += 2 * __builtin_popcount(reads);
        }
#else
        for (int i = 0; i < CODER_LANES; i++) {
            uint32_t x = lanes->x[i];
            const uint32_t entry = table[base[i] + (x & ((1u << precision) - 1))];
            x = (entry >> 12 & 0xfff) * (x >> precision) + (entry & 0xfff);
            column[i] = column_of(entry);
            uint16_t word;
            memcpy(&word, from, 2);
            const int reads = x < 1u << 16;
            from += 2 * reads;
            lanes->x[i] = reads ? x << 16 | word : x;
        }
#endif
        next = least(end - next, from - begin) + next;
    }
#if defined(__AVX512F__)
    for (int i = 0; i < 2; i++) _mm512_storeu_si512(lanes->x + 16 * i, x[i]);
#endif
    lanes->next = (uint8_t *)next;
}
