/* Coders of ECDQ's units: what their two kinds, of tables in memory and in registers, share. */
#pragma once
#include "plan.h"
#include "vectors.h"

enum { CODER_LANES = 32, STATE_BYTES = 4 * CODER_LANES, STEP_BYTES = 2 * CODER_LANES };
enum { VECTORS = CODER_LANES / LANES };

/* Units that are coded side by side, at most: a step waits for the one before, but not for those of
 * other units. */
#if defined(__AVX2__)
enum { SIDE_BY_SIDE = 4 };
#else
enum { SIDE_BY_SIDE = 1 };
#endif

/* The loop over them; unrolled, so that what they hold may lie in registers. */
#define EACH_UNIT UNROLL(4) for (int k = 0; k < count; k++)

/* The coder of a unit between two of its blocks. */
typedef struct {
    uint32_t x[CODER_LANES];
    uint8_t *next;       /* encoding: what the word before follows; decoding: the next word */
    const uint8_t *edge; /* encoding: words must not lie before it; decoding: the end of the unit */
} Lanes;

/* Where the words of a step are: at `next`, or where the unit ends before, copied to `room`. Behind the
 * end of the unit are zeros. */
INLINE const uint8_t *words_of_step(const uint8_t *next, const uint8_t *end, uint8_t *room) {
    if (__builtin_expect(end - next >= STEP_BYTES, 1)) return next;
    memset(room, 0, STEP_BYTES);
    memcpy(room, next, (size_t)(end - next));
    return room;
}

/* LANES bytes as numbers. */
INLINE vu load_bytes(const uint8_t *bytes) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
#elif defined(__aarch64__)
    const uint8x8_t four = vreinterpret_u8_u32(vld1_dup_u32((const u32 *)bytes));
    return (vu)vmovl_u16(vget_low_u16(vmovl_u8(four)));
#else
    vu numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = bytes[i];
    return numbers;
#endif
}

/* CODER_LANES numbers below 256 as bytes. */
INLINE void store_bytes(uint8_t *to, const vu *numbers) {
#if defined(__AVX512F__)
    for (int i = 0; i < VECTORS; i++)
        _mm_storeu_si128((__m128i *)to + i, _mm512_cvtepi32_epi8((__m512i)numbers[i]));
#elif defined(__AVX2__)
    __m256i low = _mm256_packus_epi32((__m256i)numbers[0], (__m256i)numbers[1]);
    __m256i high = _mm256_packus_epi32((__m256i)numbers[2], (__m256i)numbers[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    low = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256((__m256i *)to, low);
#else
    const u32 *from = (const u32 *)numbers;
    for (int i = 0; i < CODER_LANES; i++) to[i] = (uint8_t)from[i];
#endif
}
