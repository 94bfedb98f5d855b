/* The instruction set that this copy is compiled for: its vectors, and what they do. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__FAST_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__ASSOCIATIVE_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "rhtcomm: -ffast-math and its parts (-Ofast too) change payloads; take them out of CFLAGS"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "rhtcomm: payloads are little-endian, so a big-endian processor cannot be used"
#endif
#if defined(__arm__)
#error "rhtcomm: 32-bit ARM flushes subnormal numbers in NEON, so its results would differ"
#endif
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16
#error "rhtcomm: floats are computed in a wider format here; on x86 add -msse2 -mfpmath=sse"
#endif

#if defined(__AVX512F__)
#define LANES 16
#define RADIX 16
#elif defined(__AVX2__)
#define LANES 8
#define RADIX 8
#else
#define LANES 4
#define RADIX 8
#endif

/* The loop that follows is unrolled: n times, or by Clang wholly. */
#if defined(__clang__)
#define UNROLL(n) _Pragma("clang loop unroll(full)")
#else
#define PRAGMA(text) _Pragma(#text)
#define UNROLL(n) PRAGMA(GCC unroll n)
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint64_t vl __attribute__((vector_size(4 * LANES), aligned(8), may_alias));
/* f(0), .., f(LANES - 1) */
#if LANES == 16
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), \
                     f(13), f(14), f(15)
#elif LANES == 8
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
#define EACH_LANE(f) f(0), f(1), f(2), f(3)
#endif
#define ITSELF(i) i
static const vi ascending = {EACH_LANE(ITSELF)};

/* Single numbers seen as another type of the same width. */
typedef uint32_t u32 __attribute__((may_alias));
typedef int32_t i32 __attribute__((may_alias));
typedef uint16_t half __attribute__((may_alias));

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf v) { *(vf *)p = v; }

INLINE vi larger(vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
    return (vi)vmaxq_s32((int32x4_t)a, (int32x4_t)b);
#else
    vi mask = a > b;
    return (a & mask) | (b & ~mask);
#endif
}

/* Of a vector without negative numbers. */
INLINE uint32_t largest_lane(vi v) {
#if defined(__aarch64__)
    return (uint32_t)vmaxvq_s32((int32x4_t)v);
#else
    int32_t largest = 0;
    for (int i = 0; i < LANES; i++) largest = v[i] > largest ? v[i] : largest;
    return (uint32_t)largest;
#endif
}

INLINE vi to_integers(vf v) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvttps_epi32((__m512)v);
#elif defined(__AVX2__)
    return (vi)_mm256_cvttps_epi32((__m256)v);
#elif defined(__SSE2__)
    return (vi)_mm_cvttps_epi32((__m128)v);
#else
    return __builtin_convertvector(v, vi);
#endif
}

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Brings memory into the second-level cache, to be read soon. A processor has room for few such requests
 * and then waits, so that loops should make them, a few at a time. */
INLINE void fetch(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
