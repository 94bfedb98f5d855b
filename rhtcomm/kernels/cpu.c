/* Fused encode and decode of whole blocks on CPU, bit for bit what kernels/reference.py computes.
 *
 * The file is compiled once for each instruction set (CMakeLists.txt); VARIANT names the copy. All
 * arithmetic that reaches a payload or a result is float32 additions, subtractions, multiplications,
 * divisions and square roots, each rounded once (-ffp-contract=off), in an order that does not depend
 * on the vector width, or integer. A block and its scratch stay in the first-level cache.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif !defined(__aarch64__)
#include <fenv.h>
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

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define EXPORT(name) __attribute__((visibility("default"))) JOIN(name, VARIANT)
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint64_t vl __attribute__((vector_size(4 * LANES), aligned(8), may_alias));
/* Single numbers seen as another type of the same width. */
typedef uint32_t u32 __attribute__((may_alias));
typedef int32_t i32 __attribute__((may_alias));

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { QUIC_FL, EDEN, VECTOR };
enum { SIGNS = 0, DITHER = 3 };

/* Filled by kernels/cpu.py, field by field. */
typedef struct {
    int64_t size;         /* d, coordinates in a block */
    int64_t first;        /* place of the first coordinate in its bucket */
    int64_t world_size;   /* n */
    int64_t first_rank;   /* decoding: of the first payload row */
    int64_t rows;         /* decoding: K, payload rows, of adjacent ranks */
    int64_t run;          /* B, blocks whose scales, and whose codes, lie one behind the other */
    int64_t run_stride;   /* bytes from the scales, or codes, of a run to those of the next */
    int64_t exact_capacity; /* QUIC_FL: C, exact coordinates that a block has room for */
    uint32_t seed[2];     /* Philox key */
    uint32_t bucket, step, hop;
    int32_t rotations;    /* k */
    int32_t quantizer;    /* QUIC_FL, EDEN or VECTOR */
    int32_t bits;         /* b */
    int32_t group;        /* g, coordinates that a code stands for */
    int32_t shared_bits;  /* QUIC_FL: l */
    int32_t middle;       /* QUIC_FL: node of zero, times 2^16 */
    float nodes_per_sigma;/* QUIC_FL: times 2^16 */
    float inverse_bound;  /* QUIC_FL */
    int32_t biased;       /* EDEN, VECTOR: whether the scale is that of least squared error */
    float normalization;  /* d^(-k/2); for decoding d^(-k/2) / K */
    const float *levels;      /* QUIC_FL: 2^(b+l) levels; EDEN: 2^b centroids; VECTOR: 256 x g */
    const int32_t *positions; /* QUIC_FL: positions at the nodes */
    const float *boundaries;  /* EDEN: 2^b - 1 */
    const float *half_norms;  /* VECTOR: |c_i|^2 / 2 of 128 */
} Plan;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Floating-point mode ------------------------------------------------------------------- */

/* Rounding to nearest, subnormals kept, no traps. Each thread has a mode of its own, which it takes
 * over from the one that starts it; torch.set_flush_denormal changes it, fesetround does, and so does
 * loading a library that was linked with -ffast-math. The compiler may move arithmetic across a change,
 * so what computes in another mode is a function that is not inlined. */
#if defined(__SSE2__)
enum { DEFAULT_MODE = 0x1f80 };
INLINE uint64_t get_mode(void) { return _mm_getcsr(); }
INLINE void set_mode(uint64_t mode) { _mm_setcsr((uint32_t)mode); }
#elif defined(__aarch64__)
enum { DEFAULT_MODE = 0 };
INLINE uint64_t get_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
    return mode;
}
INLINE void set_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else /* where, as on RISC-V and POWER, nothing but the rounding can change */
enum { DEFAULT_MODE = FE_TONEAREST };
INLINE uint64_t get_mode(void) { return (uint64_t)fegetround(); }
INLINE void set_mode(uint64_t mode) { fesetround((int)mode); }
#endif

/* Sets the default mode; returns the one before. */
INLINE uint64_t set_default_mode(void) {
    uint64_t before = get_mode();
    set_mode(DEFAULT_MODE);
    return before;
}

/* ---- Philox4x32-10 ------------------------------------------------------------------------- */

/* Products of the low halves of 64-bit lanes; the upper halves may hold anything. */
INLINE vl multiply_low_halves(vl a, uint32_t b) {
#if defined(__AVX512F__)
    return (vl)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (vl)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (vl)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xffffffffu) * b;
#endif
}

/* low[0], high[0], low[1], high[1], ... */
INLINE void store_pairs(uint32_t *to, vl low, vl high) {
#if defined(__AVX512F__)
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64((__m512i)low, first, (__m512i)high));
    _mm512_storeu_si512(to + LANES, _mm512_permutex2var_epi64((__m512i)low, second, (__m512i)high));
#else
    for (int i = 0; i < LANES / 2; i++) {
        memcpy(to + 4 * i, (char *)&low + 8 * i, 8);
        memcpy(to + 4 * i + 2, (char *)&high + 8 * i, 8);
    }
#endif
}

enum { ROUNDS = 10, SETS = 2 }; /* the multiplications of one set wait for each other */

/* Calls `call` .. `call + calls - 1` of a stream, four words each; writes SETS vectors of calls at a
 * time, so `out` must have room for calls rounded up to a multiple of SETS LANES / 2. */
static void philox(const Plan *plan, uint32_t purpose, uint64_t call, int64_t calls, uint32_t *out) {
    const int64_t width = LANES / 2;
    uint64_t keys[ROUNDS][2];
    for (uint32_t round = 0; round < ROUNDS; round++) {
        keys[round][0] = plan->seed[0] + round * 0x9E3779B9u;
        keys[round][1] = plan->seed[1] + round * 0xBB67AE85u;
    }
    vl lane;
    for (int i = 0; i < width; i++) lane[i] = i;
    for (int64_t at = 0; at < calls; at += SETS * width) {
        vl c[SETS][4];
#pragma GCC unroll 2
        for (int set = 0; set < SETS; set++) {
            c[set][0] = lane + (call + at + set * width);
            c[set][1] = (vl){0} + plan->bucket;
            c[set][2] = (vl){0} + plan->step;
            c[set][3] = (vl){0} + purpose;
        }
#pragma GCC unroll 10
        for (int round = 0; round < ROUNDS; round++)
#pragma GCC unroll 2
            for (int set = 0; set < SETS; set++) {
                vl p0 = multiply_low_halves(c[set][0], 0xD2511F53u);
                vl p1 = multiply_low_halves(c[set][2], 0xCD9E8D57u);
                c[set][0] = (p1 >> 32) ^ c[set][1] ^ keys[round][0];
                c[set][2] = (p0 >> 32) ^ c[set][3] ^ keys[round][1];
                c[set][1] = p1;
                c[set][3] = p0;
            }
#pragma GCC unroll 2
        for (int set = 0; set < SETS; set++) {
            vl low = (c[set][0] & 0xffffffffu) | (c[set][1] << 32);
            vl high = (c[set][2] & 0xffffffffu) | (c[set][3] << 32);
            store_pairs(out + 4 * (at + set * width), low, high);
        }
    }
}

/* The signs of one block, one bit a coordinate, and where its first coordinate's bit lies: blocks
 * smaller than 128 coordinates share a call. */
static const uint8_t *draw_signs(const Plan *plan, int rotation, uint32_t rank, int64_t first,
                                 uint32_t *room) {
    int64_t call = first / 128, stop = (first + plan->size + 127) / 128;
    philox(plan, (SIGNS + rotation) + 16 * plan->hop + 256 * rank, call, stop - call, room);
    return (const uint8_t *)room + (first / 8 - call * 16);
}

static const uint8_t *draw_dither(const Plan *plan, int64_t first, uint32_t *room) {
    philox(plan, DITHER + 16 * plan->hop, first / 16, plan->size / 16, room);
    return (const uint8_t *)room;
}

/* ---- Hadamard transform -------------------------------------------------------------------- */

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf v) { *(vf *)p = v; }

/* Lanes whose bit is set in the LANES bits of `signs` from bit j on are negated. */
INLINE vf apply_signs(vf v, const uint8_t *signs, int64_t j) {
#if defined(__AVX512F__)
    __mmask16 minus;
    memcpy(&minus, signs + j / 8, 2);
    return (vf)_mm512_mask_xor_epi32((__m512i)v, minus, (__m512i)v, _mm512_set1_epi32(INT32_MIN));
#else
    vu bit;
    for (int i = 0; i < LANES; i++) bit[i] = 1u << i;
    vu set = (vu)((((vu){0} + (uint32_t)(signs[j / 8] >> (j % 8))) & bit) != 0);
    return (vf)((vu)v ^ (set & 0x80000000u));
#endif
}

/* Lane i takes the value of lane i ^ stride. */
INLINE vf swap_lanes(vf v, const int stride) {
#if defined(__AVX512F__)
    switch (stride) {
    case 1: return (vf)_mm512_permute_ps((__m512)v, 0xB1);
    case 2: return (vf)_mm512_permute_ps((__m512)v, 0x4E);
    case 4: return (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xB1);
    default: return (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4E);
    }
#elif defined(__AVX2__)
    switch (stride) {
    case 1: return (vf)_mm256_permute_ps((__m256)v, 0xB1);
    case 2: return (vf)_mm256_permute_ps((__m256)v, 0x4E);
    default: return (vf)_mm256_permute2f128_ps((__m256)v, (__m256)v, 0x01);
    }
#else
    vf out;
    for (int i = 0; i < LANES; i++) out[i] = v[i ^ stride];
    return out;
#endif
}

/* Butterflies between the lanes of one vector: (a, b) -> (a + b, a - b), lanes `stride` apart. */
INLINE vf lane_stage(vf v, const int stride) {
    vf sign;
    for (int i = 0; i < LANES; i++) sign[i] = (i & stride) ? -1.0f : 1.0f;
    /* A multiplication by one is exact, so fusing it rounds like the plain addition. */
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)v, (__m512)sign, (__m512)swap_lanes(v, stride));
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)v, (__m256)sign, (__m256)swap_lanes(v, stride));
#else
    return swap_lanes(v, stride) + v * sign;
#endif
}

INLINE vf lane_stages(vf v) {
#pragma GCC unroll 4
    for (int stride = 1; stride < LANES; stride *= 2) v = lane_stage(v, stride);
    return v;
}

/* a - b, on units that additions leave idle; the multiplication by one is exact. */
INLINE vf subtract(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmsub_ps((__m512)a, _mm512_set1_ps(1.0f), (__m512)b);
#else
    return a - b;
#endif
}

INLINE void register_stages(vf *r, const int radix) {
#pragma GCC unroll 8
    for (int stride = 1; stride < radix; stride *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < radix; i++)
            if (!(i & stride)) {
                vf a = r[i], b = r[i + stride];
                r[i] = a + b;
                r[i + stride] = subtract(a, b);
            }
}

/* What the last pass of a transform finds about its results. */
typedef struct {
    float *squares; /* sums of a halving tree, as far as the pass has the terms at hand: h of them */
    vi peak;        /* the largest magnitude, by lanes */
} Measures;

INLINE vi larger(vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    vi first = a > b;
    return (a & first) | (b & ~first);
#endif
}

/* Strides h, 2 h, ..., radix h / 2, for h >= LANES. */
INLINE void wide_pass(float *y, int64_t size, int64_t h, const int radix, Measures *measures) {
    for (int64_t base = 0; base < size; base += h * radix)
        for (int64_t j = 0; j < h; j += LANES) {
            vf r[16], square[8];
#pragma GCC unroll 16
            for (int i = 0; i < radix; i++) r[i] = load(y + base + j + i * h);
            register_stages(r, radix);
#pragma GCC unroll 16
            for (int i = 0; i < radix; i++) store(y + base + j + i * h, r[i]);
            if (!measures) continue;
#pragma GCC unroll 8
            for (int i = 0; i < radix / 2; i++) {
                vf a = r[i], b = r[i + radix / 2];
                square[i] = a * a + b * b;
                vi magnitude = larger((vi)a & INT32_MAX, (vi)b & INT32_MAX);
                measures->peak = larger(measures->peak, magnitude);
            }
#pragma GCC unroll 4
            for (int half = radix / 4; half; half /= 2)
#pragma GCC unroll 4
                for (int i = 0; i < half; i++) square[i] = square[i] + square[i + half];
            store(measures->squares + j, square[0]);
        }
}

/* y <- d^(1/2) H (factor * signs * from), strides in ascending order; signs may be NULL. Prefetches
 * d coordinates of `width` bytes from `ahead` on a little at a time, since a processor has room for
 * few such requests and then waits. Where `measures` is given, fills it and returns its h, or 0 where a block is too small for that. */
INLINE int64_t transform(float *y, const float *from, int64_t size, const uint8_t *signs,
                         float factor, const char *ahead, int64_t width, Measures *measures) {
    int64_t h;
    if (size >= LANES * RADIX) {
        for (int64_t base = 0; base < size; base += LANES * RADIX) {
            vf r[RADIX];
#pragma GCC unroll 16
            for (int i = 0; i < RADIX; i++) {
                if (ahead) __builtin_prefetch(ahead + (base + i * LANES) * width, 0, 2);
                r[i] = load(from + base + i * LANES) * factor;
                if (signs) r[i] = apply_signs(r[i], signs + base / 8, i * LANES);
                r[i] = lane_stages(r[i]);
            }
            register_stages(r, RADIX);
#pragma GCC unroll 16
            for (int i = 0; i < RADIX; i++) store(y + base + i * LANES, r[i]);
        }
        h = LANES * RADIX;
    } else {
        for (int64_t base = 0; base < size; base += LANES) {
            vf v = load(from + base) * factor;
            if (signs) v = apply_signs(v, signs, base);
            store(y + base, lane_stages(v));
        }
        h = LANES;
    }
    for (; size / h > RADIX; h *= RADIX) wide_pass(y, size, h, RADIX, NULL);
    switch (size / h) {
    case 16: wide_pass(y, size, h, 16, measures); break;
    case 8: wide_pass(y, size, h, 8, measures); break;
    case 4: wide_pass(y, size, h, 4, measures); break;
    case 2: wide_pass(y, size, h, 2, measures); break;
    default: return 0;
    }
    return h;
}

/* ---- Sums ---------------------------------------------------------------------------------- */

/* Halving-tree sum of room[0 .. n-1]; overwrites it. n is a power of two >= LANES. */
INLINE float tree_sum(float *room, int64_t n) {
    for (; n > 1; n /= 2)
        if (n / 2 >= LANES)
            for (int64_t j = 0; j < n / 2; j += LANES)
                store(room + j, load(room + j) + load(room + j + n / 2));
        else
            for (int64_t j = 0; j < n / 2; j++) room[j] += room[j + n / 2];
    return room[0];
}

/* Halving-tree sum of a[j] b[j], d >= 2 LANES; `room` holds d / 2 floats. */
static float tree_dot(const float *a, const float *b, int64_t size, float *room) {
    int64_t half = size / 2;
    for (int64_t j = 0; j < half; j += LANES)
        store(room + j, load(a + j) * load(b + j) + load(a + j + half) * load(b + j + half));
    return tree_sum(room, half);
}

static uint32_t largest_magnitude(const float *y, int64_t size) {
    const i32 *bits = (const i32 *)y;
    int32_t largest = 0;
    for (int64_t j = 0; j < size; j++) {
        int32_t magnitude = bits[j] & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

static void hadamard(float *y, const float *from, int64_t size, const uint8_t *signs, float factor,
                     const char *ahead, int64_t width) {
    transform(y, from, size, signs, factor, ahead, width, NULL);
}

/* The same; returns the halving-tree sum of y[j]^2, and the largest magnitude in `peak`. `room` holds
 * d / 2 floats. */
static float hadamard_measured(float *y, const float *from, int64_t size, const uint8_t *signs,
                               float factor, const char *ahead, int64_t width, float *room,
                               uint32_t *peak) {
    Measures measures = {.squares = room};
    int64_t h = transform(y, from, size, signs, factor, ahead, width, &measures);
    *peak = h ? 0 : largest_magnitude(y, size);
    if (!h) return tree_dot(y, y, size, room);
    for (int i = 0; i < LANES; i++)
        if ((uint32_t)measures.peak[i] > *peak) *peak = (uint32_t)measures.peak[i];
    return tree_sum(room, h);
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

/* 2^(127 - e) and 2^(e - 127), e the biased exponent of `peak` clamped to 1 .. 253. */
INLINE void powers_of_two(uint32_t peak, float *down, float *up) {
    uint32_t exponent = peak >> 23;
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    *down = from_bits((254 - exponent) << 23);
    *up = from_bits(exponent << 23);
}

/* ---- Number formats ------------------------------------------------------------------------ */

/* float16 by integers and exact float32 steps: older compilers have no type for it. */
INLINE float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = (uint32_t)(half & 0x7fff) << 13;
    if (magnitude >= 0x0f800000) return from_bits(sign | 0x70000000 | magnitude); /* inf, NaN */
    return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));
}

INLINE uint16_t to_half(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7e00;                     /* NaN */
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00); /* 2^16 and more */
    if (magnitude < 0x38800000) /* below 2^-14: adding 1/2 rounds at the subnormals' last bit */
        return (uint16_t)(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

/* y[0 .. size-1] from x[0 .. count-1], zeros after. */
static void read_block(const void *x, int dtype, int64_t count, int64_t size, float *y) {
    if (dtype == FLOAT32) {
        memcpy(y, x, 4 * count);
    } else if (dtype == BFLOAT16) {
        const uint16_t *from = x;
        for (int64_t j = 0; j < count; j++) ((u32 *)y)[j] = (uint32_t)from[j] << 16;
    } else {
        const uint16_t *from = x;
        for (int64_t j = 0; j < count; j++) y[j] = from_half(from[j]);
    }
    memset(y + count, 0, 4 * (size - count));
}

static void write_block(const float *y, int dtype, int64_t count, void *x) {
    if (dtype == FLOAT32) {
        memcpy(x, y, 4 * count);
    } else if (dtype == BFLOAT16) {
        uint16_t *to = x;
        const u32 *bits = (const u32 *)y;
        for (int64_t j = 0; j < count; j++) { /* to nearest, ties to even; a NaN stays one */
            uint32_t rounded = (bits[j] + 0x7fff + ((bits[j] >> 16) & 1)) >> 16;
            to[j] = (bits[j] & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
        }
    } else {
        uint16_t *to = x;
        for (int64_t j = 0; j < count; j++) to[j] = to_half(y[j]);
    }
}

/* ---- Packing: fields of 8, 4, 2, 1 bits, widest first (see bitpack.py) ----------------------- */

INLINE void pack_field(const uint8_t *codes, int64_t size, const int width, int shift, uint8_t *to) {
    const int lanes = 8 / width;
    const uint8_t mask = (uint8_t)((1 << width) - 1);
    const int64_t run = size / lanes;
    for (int64_t j = 0; j < run; j++) {
        unsigned octet = 0;
#pragma GCC unroll 8
        for (int lane = 0; lane < lanes; lane++)
            octet |= ((codes[j + lane * run] >> shift) & mask) << (lane * width);
        to[j] = (uint8_t)octet;
    }
}

INLINE void unpack_field(const uint8_t *from, int64_t size, const int width, int shift,
                         uint8_t *codes) {
    const int lanes = 8 / width;
    const uint8_t mask = (uint8_t)((1 << width) - 1);
    const int64_t run = size / lanes;
#pragma GCC unroll 8
    for (int lane = 0; lane < lanes; lane++) {
        uint8_t *to = codes + lane * run;
        if (shift == 0)
            for (int64_t j = 0; j < run; j++) to[j] = (from[j] >> (lane * width)) & mask;
        else
            for (int64_t j = 0; j < run; j++)
                to[j] |= (uint8_t)(((from[j] >> (lane * width)) & mask) << shift);
    }
}

static void pack(const uint8_t *codes, int64_t size, int bits, uint8_t *to) {
    int shift = 0;
    if (bits & 8) pack_field(codes, size, 8, shift, to), to += size, shift += 8;
    if (bits & 4) pack_field(codes, size, 4, shift, to), to += size / 2, shift += 4;
    if (bits & 2) pack_field(codes, size, 2, shift, to), to += size / 4, shift += 2;
    if (bits & 1) pack_field(codes, size, 1, shift, to);
}

static void unpack(const uint8_t *from, int64_t size, int bits, uint8_t *codes) {
    int shift = 0;
    if (bits & 8) unpack_field(from, size, 8, shift, codes), from += size, shift += 8;
    if (bits & 4) unpack_field(from, size, 4, shift, codes), from += size / 2, shift += 4;
    if (bits & 2) unpack_field(from, size, 2, shift, codes), from += size / 4, shift += 2;
    if (bits & 1) unpack_field(from, size, 1, shift, codes);
}

/* ---- Quantizers ---------------------------------------------------------------------------- */

/* index[j] <- table[index[j]]. One load at a time beats the gather instructions. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-vectorize")))
#endif
static void look_up(const u32 *table, u32 *index, int64_t size) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < size; j++) index[j] = table[index[j]];
}

/* LANES dither words: that of coordinate j is its word rotated until byte j mod 4 is on top. */
INLINE vu dither_words(const uint8_t *dither, int64_t j) {
#if defined(__AVX2__)
    uint8_t from __attribute__((vector_size(4 * LANES))); /* byte i % 4 of coordinate i / 4 */
    for (int i = 0; i < 4 * LANES; i++) from[i] = (uint8_t)(i / 16 * 4 + (i / 4 + 1 + i) % 4);
#if defined(__AVX512F__)
    __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(dither + j)));
    return (vu)_mm512_shuffle_epi8(words, (__m512i)from);
#else
    __m256i words = _mm256_broadcastsi128_si256(_mm_loadl_epi64((const __m128i *)(dither + j)));
    return (vu)_mm256_shuffle_epi8(words, (__m256i)from);
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
    return (words >> right) | (words << left);
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

/* Table look-ups go by pieces of a block, which leave its other arrays in the first-level cache. */
enum { PIECE = 512 };

/* QUIC-FL's exact coordinates: a block has C ascending indices, -1 where none is needed, and then C
 * values in float16. */
INLINE int64_t index_bytes(const Plan *plan) { return plan->size <= 1 << 15 ? 2 : 4; }

INLINE int32_t read_index(const uint8_t *from, int64_t width) {
    int16_t narrow;
    int32_t wide;
    memcpy(&narrow, from, 2);
    if (width == 2) return narrow;
    memcpy(&wide, from, 4);
    return wide;
}

/* Bit i is set where lane i of |y| factor > bound. */
INLINE uint32_t lanes_beyond(vf y, float factor, float bound) {
    vf magnitude = (vf)((vu)y & 0x7fffffffu) * factor;
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)magnitude, _mm512_set1_ps(bound), _CMP_GT_OQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)(magnitude > bound));
#else
    uint32_t lanes = 0;
    for (int i = 0; i < LANES; i++) lanes |= (uint32_t)(magnitude[i] > bound) << i;
    return lanes;
#endif
}

/* The number of which `nth` of a[0 .. n-1], none of them negative, are larger: the bits of the
 * largest number that more than `nth` reach, from the highest on. */
static float nth_largest(const float *a, int64_t n, int64_t nth) {
    const i32 *bits = (const i32 *)a;
    int32_t found = 0;
    for (int32_t bit = 1 << 30; bit; bit >>= 1) {
        int64_t count = 0;
        for (int64_t i = 0; i < n; i++) count += bits[i] >= (found | bit);
        if (count > nth) found |= bit;
    }
    return from_bits((uint32_t)found);
}

/* Write the section of a block, set to zero in y what it holds, and return the scale, at least
 * `rms`. `indices` and `room` are scratch of d numbers. */
static float take_exact(const Plan *plan, float *y, float rms, const uint8_t *dither,
                        uint32_t offset, i32 *indices, float *room, uint8_t *section) {
    const int64_t capacity = plan->exact_capacity, width = index_bytes(plan);
    int64_t found = 0, used = 0;
    for (int64_t j = 0; j < plan->size; j += LANES)
        for (uint32_t lanes = lanes_beyond(load(y + j), plan->inverse_bound, rms); lanes;
             lanes &= lanes - 1)
            indices[found++] = (int32_t)j + __builtin_ctz(lanes);
    float scale = rms;
    if (found > capacity) {
        for (int64_t i = 0; i < found; i++) room[i] = fabsf(y[indices[i]]) * plan->inverse_bound;
        scale = nth_largest(room, found, capacity);
    }
    memset(section, 0xff, capacity * width);
    memset(section + capacity * width, 0, capacity * 2);
    for (int64_t i = 0; i < found; i++) {
        const int32_t j = indices[i]; /* whose first two bytes are its int16, little-endian */
        if (!(fabsf(y[j]) * plan->inverse_bound > scale)) continue;
        uint32_t word, turn = 8 * (j % 4) + 8;
        memcpy(&word, dither + (j & ~3), 4);
        uint32_t u = ((word >> (turn & 31) | word << ((32 - turn) & 31)) + 256 * offset) & 0xffff;
        uint32_t rounded = (to_bits(y[j] / scale) + (u >> 3)) & ~0x1fffu;
        uint16_t value = to_half(from_bits(rounded));
        memcpy(section + used * width, &j, width);
        memcpy(section + capacity * width + used * 2, &value, 2);
        used++;
        y[j] = 0.0f;
    }
    return scale;
}

/* What y will hold, with this rank's added, at the exact coordinates of a section of any bytes;
 * returns how many these are, and clears `finite` where one of them is not. */
static int64_t exact_sums(const Plan *plan, const uint8_t *section, float scale, int initial,
                          const float *y, i32 *indices, float *sums, int *finite) {
    const int64_t capacity = plan->exact_capacity, width = index_bytes(plan);
    int64_t count = 0;
    int32_t before = -1;
    for (int64_t i = 0; i < capacity; i++) {
        const int32_t index = read_index(section + i * width, width);
        if (index <= before) continue;
        if (index >= plan->size) break;
        before = index;
        uint16_t half;
        memcpy(&half, section + capacity * width + i * 2, 2);
        if ((half & 0x7c00) == 0x7c00) *finite = 0;
        float value = from_half(half) * scale;
        indices[count] = index;
        sums[count++] = initial ? value : y[index] + value;
    }
    return count;
}

#if defined(__AVX512VBMI__)
/* The bytes of `table` (512) at indices of nine bits: `index`, bit 7 of it again, and bit 8. */
INLINE __m512i look_up_bytes(const uint8_t *table, __m512i index, __mmask64 bit7, __mmask64 bit8) {
    __m512i quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        quarter[i] = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128 * i), index,
                                              _mm512_load_si512(table + 128 * i + 64));
    return _mm512_mask_blend_epi8(bit8, _mm512_mask_blend_epi8(bit7, quarter[0], quarter[1]),
                                  _mm512_mask_blend_epi8(bit7, quarter[2], quarter[3]));
}

/* The codes of y * unit for 1025 nodes, which is b <= 4, and whole groups of 64 coordinates.
 *
 * Node m is counted from that of zero here. position(-m) = (2^b - 1) 2^16 - position(m), so three
 * planes of bytes of the positions at m = 0 .. 511 do. With p the upper and q the lower 16 bits of
 * position(|m|), a code is p + (2^16 - 1 - v < q), and for m < 0 it is 2^b - 1 - p - (v < q). */
static void quic_fl_codes_by_bytes(const Plan *plan, const float *y, const uint8_t *dither,
                                   uint32_t offset, float unit, uint8_t *codes) {
    uint8_t planes[3][512] __attribute__((aligned(64)));
    for (int i = 0; i < 512; i += 16) {
        __m512i position = _mm512_loadu_si512(plan->positions + 512 + i);
        for (int k = 0; k < 3; k++, position = _mm512_srli_epi32(position, 8))
            _mm_store_si128((__m128i *)(planes[k] + i), _mm512_cvtepi32_epi8(position));
    }
    uint16_t upper_words __attribute__((vector_size(64)));
    for (int i = 0; i < 32; i++) upper_words[i] = (uint16_t)(2 * i + 1);
    uint8_t even __attribute__((vector_size(64))), u_of __attribute__((vector_size(64)));
    for (int i = 0; i < 64; i++) {
        even[i] = (uint8_t)(2 * i);
        /* the lower half of what dither_words gives, the upper one zero */
        u_of[i] = (uint8_t)(i % 4 < 2 ? i / 16 * 4 + (i / 4 + 1 + i) % 4 : 0x80);
    }
    const __m512i last = _mm512_set1_epi8((char)((1 << plan->bits) - 1));
    const __m512i turn = _mm512_set1_epi8((char)offset);
    const __m512i turn_u = _mm512_set1_epi32((int)(offset << 8));
    for (int64_t j = 0; j < plan->size; j += 64) {
        __m512i z[4], m[2], byte[3];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const __m128i *words = (const __m128i *)(dither + j + 16 * k);
            __m512i u = _mm512_broadcast_i32x4(_mm_loadu_si128(words));
            u = _mm512_add_epi16(_mm512_shuffle_epi8(u, (__m512i)u_of), turn_u);
            z[k] = (__m512i)to_integers(load(y + j + 16 * k) * unit);
            z[k] = _mm512_add_epi32(z[k], u);
        }
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++)
            m[k] = _mm512_permutex2var_epi16(z[2 * k], (__m512i)upper_words, z[2 * k + 1]);
        __mmask64 negative = _mm512_kunpackd(_mm512_movepi16_mask(m[1]), _mm512_movepi16_mask(m[0]));
        m[0] = _mm512_abs_epi16(m[0]);
        m[1] = _mm512_abs_epi16(m[1]);
        __m512i lower = _mm512_permutex2var_epi8(m[0], (__m512i)even, m[1]);
        __m512i upper = _mm512_permutex2var_epi8(m[0], (__m512i)(even + 1), m[1]);
        __mmask64 bit7 = _mm512_movepi8_mask(lower);
        __mmask64 bit8 = _mm512_test_epi8_mask(upper, _mm512_set1_epi8(1));
        __mmask64 end = _mm512_test_epi8_mask(upper, _mm512_set1_epi8(2)); /* |m| = 512 */
#pragma GCC unroll 3
        for (int k = 0; k < 3; k++) byte[k] = look_up_bytes(planes[k], lower, bit7, bit8);
        __m512i v1 = _mm512_loadu_si512(dither + j), v0 = _mm512_rol_epi32(v1, 8);
        v1 = _mm512_add_epi8(v1, turn);
        v1 = _mm512_mask_sub_epi8(v1, ~negative, _mm512_set1_epi8(-1), v1);
        v0 = _mm512_mask_sub_epi8(v0, ~negative, _mm512_set1_epi8(-1), v0);
        __mmask64 carry = _mm512_cmplt_epu8_mask(v1, byte[1]);
        carry |= _mm512_mask_cmplt_epu8_mask(_mm512_cmpeq_epi8_mask(v1, byte[1]), v0, byte[0]);
        __m512i code = _mm512_mask_sub_epi8(byte[2], carry, byte[2], _mm512_set1_epi8(-1));
        code = _mm512_mask_mov_epi8(code, end, last);
        code = _mm512_mask_sub_epi8(code, negative, last, code);
        _mm512_storeu_si512(codes + j, code);
    }
}
#endif

/* Codes of one block, whose root mean square and largest magnitude are given, and its exact
 * coordinates; returns its scale. `room` and `indices` are scratch of d numbers. */
static float quic_fl_encode(const Plan *plan, float *y, float rms, uint32_t peak,
                            const uint8_t *dither, uint32_t offset, float *room, i32 *indices,
                            uint8_t *codes, uint8_t *section) {
    const int64_t size = plan->size, piece = least(size, PIECE);
    const uint32_t shift = offset * 0x01000100u; /* moves u and v, the two halves of a word */
    float fitting = plan->exact_capacity
                        ? take_exact(plan, y, rms, dither, offset, indices, room, section)
                        : from_bits(peak) * plan->inverse_bound;
    float scale = rms > fitting ? rms : fitting;
    float unit = scale > 0 ? (1.0f / scale) * plan->nodes_per_sigma : 0.0f;
#if defined(__AVX512VBMI__)
    if (plan->bits <= 4 && size >= 64) {
        quic_fl_codes_by_bytes(plan, y, dither, offset, unit, codes);
        return scale;
    }
#endif
    i32 work[PIECE];
    for (int64_t base = 0; base < size; base += piece) {
        for (int64_t j = 0; j < piece; j += LANES) {
            vi u = (vi)((dither_words(dither, base + j) + shift) & 0xffff);
            vi z = to_integers(load(y + base + j) * unit);
            *(vi *)(work + j) = (z + (u + plan->middle)) >> 16; /* the node */
        }
        look_up((const u32 *)plan->positions, (u32 *)work, piece);
        for (int64_t j = 0; j < piece; j += LANES) {
            vi v = (vi)(((dither_words(dither, base + j) >> 16) + (shift & 0xffff)) & 0xffff);
            *(vi *)(work + j) = (*(const vi *)(work + j) + v) >> 16;
        }
        for (int64_t j = 0; j < piece; j++) codes[base + j] = (uint8_t)work[j];
    }
    return scale;
}

#if defined(__AVX512VBMI__)
/* quic_fl_add for at most 256 levels and whole groups of 64 coordinates. The levels, cut into four
 * planes of bytes, fit into registers, where one instruction looks up 64 bytes among 128. */
INLINE void quic_fl_add_by_bytes(const Plan *plan, const uint8_t *codes, const uint8_t *dither,
                                 uint32_t offset, float scale, int initial, float *y) {
    const int shared_bits = plan->shared_bits;
    __m512i planes[4][4] = {0};
    for (int i = 0; i < 1 << (plan->bits + shared_bits); i += 16) {
        __m512i level = _mm512_loadu_si512(plan->levels + i);
        for (int k = 0; k < 4; k++, level = _mm512_srli_epi32(level, 8))
            _mm_store_si128((__m128i *)planes[k] + i / 16, _mm512_cvtepi32_epi8(level));
    }
    const __m512i turn = _mm512_set1_epi8((char)offset);
    const __m128i left = _mm_cvtsi32_si128(shared_bits), right = _mm_cvtsi32_si128(8 - shared_bits);
    const __m512i lower = _mm512_set1_epi8((char)((1 << shared_bits) - 1));
    /* The last steps work on quarters of vectors; this makes coordinates come out in order. */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t j = 0; j < plan->size; j += 64) {
        __m512i v = _mm512_add_epi8(_mm512_loadu_si512(dither + j), turn);
        __m512i shared = _mm512_and_si512(_mm512_srl_epi16(v, right), lower);
        __m512i index = _mm512_or_si512(_mm512_sll_epi16(_mm512_loadu_si512(codes + j), left), shared);
        index = _mm512_permutexvar_epi32(order, index);
        __mmask64 upper = _mm512_movepi8_mask(index);
        __m512i byte[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            __m512i low = _mm512_permutex2var_epi8(planes[k][0], index, planes[k][1]);
            __m512i high = _mm512_permutex2var_epi8(planes[k][2], index, planes[k][3]);
            byte[k] = _mm512_mask_blend_epi8(upper, low, high);
        }
#pragma GCC unroll 4
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
#endif

/* y <- or y += scale * level(code, dither) */
static void quic_fl_add(const Plan *plan, const uint8_t *codes, const uint8_t *dither,
                        uint32_t offset, float scale, int initial, float *y) {
    const int64_t size = plan->size, piece = least(size, PIECE);
    const int shared_bits = plan->shared_bits;
#if defined(__AVX512VBMI__)
    if (plan->bits + shared_bits <= 8 && size >= 64) {
        if (initial)
            quic_fl_add_by_bytes(plan, codes, dither, offset, scale, 1, y);
        else
            quic_fl_add_by_bytes(plan, codes, dither, offset, scale, 0, y);
        return;
    }
#endif
    u32 work[PIECE];
    const float *values = (const float *)work;
    for (int64_t base = 0; base < size; base += piece, y += piece) {
        for (int64_t j = 0; j < piece; j++) {
            uint8_t v = (uint8_t)(dither[base + j] + offset);
            work[j] = ((uint32_t)codes[base + j] << shared_bits) | (v >> (8 - shared_bits));
        }
        look_up((const u32 *)plan->levels, work, piece);
        if (initial)
            for (int64_t j = 0; j < piece; j += LANES) store(y + j, load(values + j) * scale);
        else
            for (int64_t j = 0; j < piece; j += LANES)
                store(y + j, load(y + j) + load(values + j) * scale);
    }
}

/* The factor to the root mean square: |z|^2 / <z, c>, or <z, c> / |c|^2 where it may be biased. */
static float eden_correction(const Plan *plan, const float *z, const float *values, float *room) {
    float agreement = tree_dot(z, values, plan->size, room);
    if (plan->biased) return agreement / tree_dot(values, values, plan->size, room);
    return tree_dot(z, z, plan->size, room) / agreement;
}

static float eden_encode(const Plan *plan, float *y, float rms, float *room, float *values,
                         uint8_t *codes) {
    const int64_t size = plan->size;
    const int bits = plan->bits;
    float inverse = rms > 0 ? 1.0f / rms : 0.0f;
    for (int64_t j = 0; j < size; j++) {
        float z = y[j] *= inverse;
        int code = 0; /* the number of boundaries <= z, by bisection */
        for (int step = 1 << (bits - 1); step; step >>= 1)
            code += z >= plan->boundaries[code + step - 1] ? step : 0;
        codes[j] = (uint8_t)code;
        values[j] = plan->levels[code];
    }
    return rms > 0 ? rms * eden_correction(plan, y, values, room) : 0.0f;
}

static void eden_values(const Plan *plan, const uint8_t *codes, float scale, float *y) {
    for (int64_t j = 0; j < plan->size; j++) y[j] = plan->levels[codes[j]] * scale;
}

/* Codes and codewords of one block of `group` coordinates a code: LANES groups at a time against
 * each pair +-c_i in turn, which is the lowest of the best where its score is strictly greater. */
INLINE void vector_nearest(const Plan *plan, const float *y, float *values, uint8_t *codes,
                           const int group) {
    const int64_t groups = plan->size / group;
    for (int64_t base = 0; base < groups; base += LANES) {
        const int count = (int)least(LANES, groups - base);
        float columns[8][LANES] = {{0}};
        vf z[8], best = (vf){0} - INFINITY;
        vi code = {0};
        for (int lane = 0; lane < count; lane++)
            for (int k = 0; k < group; k++) columns[k][lane] = y[(base + lane) * group + k];
        for (int k = 0; k < group; k++) z[k] = load(columns[k]);
        for (int i = 0; i < 128; i++) {
            const float *codeword = plan->levels + i * group;
            vf dot = z[0] * codeword[0];
#pragma GCC unroll 8
            for (int k = 1; k < group; k++) dot = dot + z[k] * codeword[k];
            vf score = (vf)((vu)dot & 0x7fffffffu) - plan->half_norms[i];
            vi better = score > best;
            vi found = ((vi)(dot < 0) & 128) + i;
            best = (vf)(((vi)score & better) | ((vi)best & ~better));
            code = (found & better) | (code & ~better);
        }
        for (int lane = 0; lane < count; lane++) {
            codes[base + lane] = (uint8_t)code[lane];
            memcpy(values + (base + lane) * group, plan->levels + code[lane] * group,
                   sizeof(float) * group);
        }
    }
}

static float vector_encode(const Plan *plan, float *y, float rms, float *room, float *values,
                           uint8_t *codes) {
    const int64_t size = plan->size;
    float inverse = rms > 0 ? 1.0f / rms : 0.0f;
    for (int64_t j = 0; j < size; j++) y[j] *= inverse;
    switch (plan->group) {
    case 8: vector_nearest(plan, y, values, codes, 8); break;
    case 4: vector_nearest(plan, y, values, codes, 4); break;
    default: vector_nearest(plan, y, values, codes, 2); break;
    }
    return rms > 0 ? rms * eden_correction(plan, y, values, room) : 0.0f;
}

INLINE void look_up_groups(const Plan *plan, const uint8_t *codes, float scale, float *y,
                           const int group) {
    for (int64_t j = 0; j < plan->size / group; j++)
#pragma GCC unroll 8
        for (int k = 0; k < group; k++)
            y[j * group + k] = plan->levels[codes[j] * group + k] * scale;
}

static void vector_values(const Plan *plan, const uint8_t *codes, float scale, float *y) {
    switch (plan->group) {
    case 8: look_up_groups(plan, codes, scale, y, 8); break;
    case 4: look_up_groups(plan, codes, scale, y, 4); break;
    default: look_up_groups(plan, codes, scale, y, 2); break;
    }
}

/* ---- Blocks -------------------------------------------------------------------------------- */

/* Where what a block has `bytes` bytes of begins. */
INLINE int64_t place_of(const Plan *plan, int64_t block, int64_t bytes) {
    return block / plan->run * plan->run_stride + block % plan->run * bytes;
}

static int64_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

static int64_t row_bytes(const Plan *plan) {
    return plan->size * plan->bits / 8 + plan->exact_capacity * (index_bytes(plan) + 2);
}

/* Scratch of one thread. */
typedef struct {
    float *y, *sum, *room;
    uint8_t *codes;
    uint32_t *dither, *signs;
} Scratch;

enum { PHILOX_OVERRUN = 8 * SETS * LANES };

static size_t scratch_bytes(int64_t size) {
    size_t bytes = (size_t)size * (3 * sizeof(float) + 1);
    bytes += (size_t)size + PHILOX_OVERRUN;            /* dither */
    bytes += (size_t)size / 8 + 2 * PHILOX_OVERRUN;    /* signs */
    return (bytes + 63) / 64 * 64;
}

static Scratch scratch_of(char *memory, int64_t size) {
    Scratch s;
    s.y = (float *)memory, memory += 4 * size;
    s.sum = (float *)memory, memory += 4 * size;
    s.room = (float *)memory, memory += 4 * size;
    s.dither = (uint32_t *)memory, memory += size + PHILOX_OVERRUN;
    s.codes = (uint8_t *)memory, memory += size;
    s.signs = (uint32_t *)memory;
    return s;
}

enum { PARTS = 8, MOMENTS = PARTS + 2 };

/* See block_moments() of rotation.py; in units of `up`, so that no cube overflows. */
static void block_moments(const float *y, int64_t size, float down, float up, float *moments) {
    enum { RUN = 32 };
    float squares[RUN] = {0}, cubes[RUN] = {0};
    for (int64_t j = 0; j < size; j += RUN)
        for (int i = 0; i < RUN; i++) {
            float z = fabsf(y[j + i] * down);
            squares[i] += z * z;
            cubes[i] += z * z * z;
        }
    memset(moments, 0, PARTS * sizeof(float) + sizeof(float));
    for (int i = 0; i < RUN; i++) {
        moments[i % PARTS] += squares[i];
        moments[PARTS] += cubes[i];
    }
    moments[PARTS + 1] = up;
}

static void encode_block(const Plan *plan, Scratch s, int64_t first, uint32_t rank, const void *x,
                         int dtype, int64_t count, float *scale, uint8_t *packed, float *moments) {
    const int64_t size = plan->size;
    const float *from = s.y;
    if (dtype == FLOAT32 && count == size)
        from = x;
    else
        read_block(x, dtype, count, size, s.y);
    uint32_t peak = largest_magnitude(from, size);
    float down, up;
    powers_of_two(peak, &down, &up);
    int finite = peak < 0x7f800000;
    if (!finite) from = memset(s.y, 0, 4 * size);
    if (moments) block_moments(from, size, down, up, moments);
    uint32_t signs_of = plan->quantizer == QUIC_FL ? 0 : rank;
    const char *next = (const char *)x + size * bytes_of(dtype);
    float factor = down;
    for (int i = 0; i < plan->rotations - 1; i++, from = s.y, factor = 1.0f, next = NULL)
        hadamard(s.y, from, size, draw_signs(plan, i, signs_of, first, s.signs), factor, next,
                 bytes_of(dtype));
    const uint8_t *signs = draw_signs(plan, plan->rotations - 1, signs_of, first, s.signs);
    float sum = hadamard_measured(s.y, from, size, signs, factor, next, bytes_of(dtype), s.room,
                                  &peak);
    float rms = sqrtf(sum * (1.0f / (float)size));
    if (plan->quantizer == QUIC_FL) {
        uint32_t offset = (uint32_t)(256 * (int64_t)rank / plan->world_size);
        const uint8_t *dither = draw_dither(plan, first, s.dither);
        *scale = quic_fl_encode(plan, s.y, rms, peak, dither, offset, s.room, (i32 *)s.sum,
                                s.codes, packed + size * plan->bits / 8);
    } else if (plan->quantizer == EDEN) {
        *scale = eden_encode(plan, s.y, rms, s.room, s.sum, s.codes);
    } else {
        *scale = vector_encode(plan, s.y, rms, s.room, s.sum, s.codes);
    }
    *scale = finite ? fminf(*scale * plan->normalization * up, FLT_MAX) : NAN;
    pack(s.codes, size / plan->group, plan->bits * plan->group, packed);
}

/* y <- d^(k/2) R^T y but for the signs that come last, which are returned. Prefetches `out`. */
static const uint8_t *unrotate(const Plan *plan, Scratch s, int64_t first, uint32_t rank,
                               const void *out, int dtype) {
    const uint8_t *signs = NULL;
    for (int i = plan->rotations - 1; i >= 0; i--) {
        hadamard(s.y, s.y, plan->size, signs, 1.0f, i ? NULL : out, bytes_of(dtype));
        signs = draw_signs(plan, i, rank, first, s.signs);
    }
    return signs;
}

/* Row i of scales and packed begins at i * stride bytes. */
static void decode_block(const Plan *plan, Scratch s, int64_t first, const char *scales,
                         const char *packed, int64_t stride, void *out, int dtype, int64_t count) {
    const int64_t size = plan->size;
    uint32_t peak = 0;
    for (int64_t row = 0; row < plan->rows; row++) {
        uint32_t bits;
        memcpy(&bits, scales + row * stride, 4);
        bits &= 0x7fffffff;
        if (bits > peak) peak = bits;
    }
    float down, up;
    powers_of_two(peak, &down, &up);
    if (peak >= 0x7f800000) {
        for (int64_t j = 0; j < size; j++) s.y[j] = NAN;
        write_block(s.y, dtype, count, out);
        return;
    }
    const uint8_t *dither =
        plan->quantizer == QUIC_FL ? draw_dither(plan, first, s.dither) : NULL;
    int finite = 1; /* which no encoder leaves, but a payload of any bytes may */
    for (int64_t row = 0; row < plan->rows; row++) {
        const int64_t rank = plan->first_rank + row;
        float scale;
        memcpy(&scale, scales + row * stride, 4);
        scale *= down;
        unpack((const uint8_t *)packed + row * stride, size / plan->group,
               plan->bits * plan->group, s.codes);
        if (plan->quantizer == QUIC_FL) {
            uint32_t offset = (uint32_t)(256 * rank / plan->world_size);
            const uint8_t *section =
                (const uint8_t *)packed + row * stride + size * plan->bits / 8;
            i32 *indices = (i32 *)s.sum;
            int64_t count =
                exact_sums(plan, section, scale, row == 0, s.y, indices, s.room, &finite);
            quic_fl_add(plan, s.codes, dither, offset, scale, row == 0, s.y);
            for (int64_t i = 0; i < count; i++) s.y[indices[i]] = s.room[i];
        } else {
            if (plan->quantizer == EDEN)
                eden_values(plan, s.codes, scale, s.y);
            else
                vector_values(plan, s.codes, scale, s.y);
            const uint8_t *signs = unrotate(plan, s, first, (uint32_t)rank, out, dtype);
            for (int64_t j = 0; j < size; j += LANES) {
                vf value = apply_signs(load(s.y + j), signs, j);
                if (row) value = load(s.sum + j) + value;
                store(s.sum + j, value);
            }
        }
    }
    float *to = dtype == FLOAT32 && count == size ? out : s.y;
    if (plan->quantizer == QUIC_FL) {
        const uint8_t *signs = unrotate(plan, s, first, 0, out, dtype);
        for (int64_t j = 0; j < size; j += LANES)
            store(to + j, apply_signs(load(s.y + j), signs, j) * plan->normalization * up);
    } else {
        for (int64_t j = 0; j < size; j += LANES)
            store(to + j, load(s.sum + j) * plan->normalization * up);
    }
    if (!finite) /* processors differ in the NaN that they make */
        for (int64_t j = 0; j < size; j++)
            if (to[j] != to[j]) to[j] = NAN;
    if (to != out) write_block(to, dtype, count, out);
}

/* One thread's share of the blocks of rhtcomm_encode. */
static __attribute__((noinline)) int encode_share(const Plan *plan, int64_t blocks, uint32_t rank,
                                                  const char *x, int dtype, int64_t numel,
                                                  char *scales, uint8_t *packed, float *moments) {
    const int64_t size = plan->size, packed_bytes = row_bytes(plan);
    char *memory = aligned_alloc(64, scratch_bytes(size));
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        if (!memory) continue;
        int64_t at = block * size;
        encode_block(plan, scratch_of(memory, size), plan->first + at, rank,
                     x + at * bytes_of(dtype), dtype, least(size, numel - at),
                     (float *)(scales + place_of(plan, block, 4)),
                     packed + place_of(plan, block, packed_bytes),
                     moments ? moments + block * MOMENTS : NULL);
    }
    free(memory);
    return memory ? 0 : -1;
}

static __attribute__((noinline)) int decode_share(const Plan *plan, int64_t blocks,
                                                  const char *scales, const char *packed,
                                                  int64_t stride, char *out, int dtype,
                                                  int64_t numel) {
    const int64_t size = plan->size, packed_bytes = row_bytes(plan);
    char *memory = aligned_alloc(64, scratch_bytes(size));
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        if (!memory) continue;
        int64_t at = block * size;
        decode_block(plan, scratch_of(memory, size), plan->first + at,
                     scales + place_of(plan, block, 4),
                     packed + place_of(plan, block, packed_bytes), stride,
                     out + at * bytes_of(dtype), dtype, least(size, numel - at));
    }
    free(memory);
    return memory ? 0 : -1;
}

/* x: `numel` coordinates of `blocks` blocks, the rest of the last one being zeros. `moments` has room
 * for those of all blocks, or is NULL. Returns 0, or -1 where no memory was to be had. */
int EXPORT(rhtcomm_encode)(const Plan *plan, int64_t blocks, int64_t rank, const void *x, int dtype,
                           int64_t numel, char *scales, uint8_t *packed, float *moments,
                           int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
    {
        uint64_t mode = set_default_mode();
        failed = encode_share(plan, blocks, (uint32_t)rank, x, dtype, numel, scales, packed, moments);
        set_mode(mode);
    }
    return failed;
}

/* Payload rows lie `stride` bytes apart. */
int EXPORT(rhtcomm_decode)(const Plan *plan, int64_t blocks, const char *scales, const char *packed,
                           int64_t stride, void *out, int dtype, int64_t numel, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
    {
        uint64_t mode = set_default_mode();
        failed = decode_share(plan, blocks, scales, packed, stride, out, dtype, numel);
        set_mode(mode);
    }
    return failed;
}

#ifdef DISPATCH
/* Tells a library that does not fit the Python code beside it; raise it when a function changes. */
enum { ABI = 4 };
__attribute__((visibility("default"))) int rhtcomm_abi(void) {
    return (ABI << 16) + (int)sizeof(Plan);
}

/* Of the calling thread; see floating_point.py. */
__attribute__((visibility("default"))) uint64_t rhtcomm_set_default_mode(void) {
    return set_default_mode();
}

__attribute__((visibility("default"))) void rhtcomm_set_mode(uint64_t mode) { set_mode(mode); }

/* Whether this processor can run a variant: has what CMakeLists.txt compiles it for. */
__attribute__((visibility("default"))) int rhtcomm_supports(const char *variant) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(variant, "avx512vbmi"))
        return rhtcomm_supports("avx512") && __builtin_cpu_supports("avx512vbmi");
    if (!strcmp(variant, "avx512"))
        return rhtcomm_supports("avx2") && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(variant, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("popcnt");
#endif
    return !strcmp(variant, "baseline");
}
#endif
