/* Fused encode and decode of whole blocks on CPU, bit for bit what kernels/reference.py computes.
 *
 * The file is compiled once for each instruction set (CMakeLists.txt); VARIANT names the copy. All
 * arithmetic that reaches a payload or a result is float32 additions, subtractions, multiplications,
 * divisions and square roots, each rounded once (-ffp-contract=off), in an order that does not depend
 * on the vector width, or integer. A block and its scratch stay in the caches of a core.
 */
#include "native/decode.h"
#include "native/encode.h"
#include "native/lattice.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define EXPORT __attribute__((visibility("default")))

/* Encodes a tensor x by its `count` plans, at most two. `payloads` holds one payload per shard,
 * `stride` bytes apart. `moments` has room for the moments of all blocks, or is NULL. `residual` is
 * added to x, or is NULL. Returns 0, or -1 if out of memory. */
EXPORT int JOIN(rhtcomm_encode, VARIANT)(const Plan *plans, int count, uint64_t seed, uint32_t step,
                                         uint32_t bucket, uint32_t hop, int64_t offset,
                                         int64_t rank, int64_t world_size, const void *x, int dtype,
                                         uint8_t *payloads, int64_t stride, float *moments,
                                         const Residual *residual, int threads) {
    const Origin origin = {{(uint32_t)seed, seed >> 32}, bucket, step, hop,
                           offset, rank, world_size};
    const Encoding call = {origin, x, dtype, payloads, stride, moments, residual};
    return for_each_unit(plans, count, encode_units, &call, 1, SIDE_BY_SIDE, threads);
}

/* Decodes the mean of the payloads of `ranks` adjacent ranks, starting with `rank`, to the tensor
 * `out`. The strides between ranks and between shards are in bytes. With `feedback`, which may be
 * NULL, `out` holds x, and the residual becomes this rank's error. Returns 0, or -1 if out of memory. */
EXPORT int JOIN(rhtcomm_decode, VARIANT)(const Plan *plans, int count, uint64_t seed, uint32_t step,
                                         uint32_t bucket, uint32_t hop, int64_t offset,
                                         int64_t rank, int64_t world_size, int64_t ranks,
                                         const uint8_t *payloads, int64_t rank_stride,
                                         int64_t shard_stride, void *out, int dtype,
                                         const Feedback *feedback, int threads) {
    const Origin origin = {{(uint32_t)seed, seed >> 32}, bucket, step, hop,
                           offset, rank, world_size};
    const Decoding call = {origin, ranks, payloads, rank_stride, shard_stride, out, dtype,
                           feedback, 0, -1};
    return for_each_unit(plans, count, decode_units, &call, ranks,
                         (int)(ranks < SIDE_BY_SIDE ? SIDE_BY_SIDE / ranks : 1), threads);
}

/* The lattice's three steps, on a tensor x by its plans; see native/lattice.h. The arrays have an entry
 * for each block. */

/* Rotates x to y, and finds the exponents and bounds of its blocks. y may be x, if that is float32 and
 * has whole blocks. Returns 0, or -1 if out of memory, as the next two do. */
EXPORT int JOIN(rhtcomm_lattice_rotate, VARIANT)(const Plan *plans, int count, uint64_t seed,
                                                 uint32_t step, uint32_t bucket, uint32_t hop,
                                                 int64_t offset, const void *x, int dtype, float *y,
                                                 int32_t *exponents, int32_t *bounds, int threads) {
    const Summing call = {.origin = {{(uint32_t)seed, seed >> 32}, bucket, step, hop, offset, 0, 1},
                          .x = (char *)x, .dtype = dtype, .y = y, .exponents = exponents,
                          .bounds = bounds};
    return for_each_unit(plans, count, lattice_rotate_units, &call, 1, SIDE_BY_SIDE, threads);
}

/* Quantizes y to words, given the bounds of all ranks. */
EXPORT int JOIN(rhtcomm_lattice_encode, VARIANT)(const Plan *plans, int count, uint64_t seed,
                                                 uint32_t step, uint32_t bucket, uint32_t hop,
                                                 int64_t offset, int64_t rank, int64_t world_size,
                                                 const float *y, const int32_t *exponents,
                                                 const int32_t *bounds, uint32_t *words,
                                                 int threads) {
    const Summing call = {.origin = {{(uint32_t)seed, seed >> 32}, bucket, step, hop, offset, rank,
                                     world_size},
                          .y = (float *)y, .exponents = (int32_t *)exponents,
                          .bounds = (int32_t *)bounds, .words = words};
    return for_each_unit(plans, count, lattice_encode_units, &call, 1, SIDE_BY_SIDE, threads);
}

/* Writes the mean to `out`, given the sum of all ranks' words. */
EXPORT int JOIN(rhtcomm_lattice_decode, VARIANT)(const Plan *plans, int count, uint64_t seed,
                                                 uint32_t step, uint32_t bucket, uint32_t hop,
                                                 int64_t offset, int64_t world_size,
                                                 const uint32_t *words, const int32_t *bounds,
                                                 void *out, int dtype, int threads) {
    const Summing call = {.origin = {{(uint32_t)seed, seed >> 32}, bucket, step, hop, offset, 0,
                                     world_size},
                          .x = out, .dtype = dtype, .bounds = (int32_t *)bounds,
                          .words = (uint32_t *)words};
    return for_each_unit(plans, count, lattice_decode_units, &call, 1, SIDE_BY_SIDE, threads);
}

#ifdef DISPATCH
/* Detects a library that was built from another version than the Python code; raise it when a
 * function, a structure or a table that it points to changes. */
enum { ABI = 12 };
EXPORT int rhtcomm_abi(void) {
    return (ABI << 16) + (int)(sizeof(Plan) + sizeof(Residual) + sizeof(Feedback));
}

/* The mode of the calling thread; see floating_point.py. */
EXPORT uint64_t rhtcomm_set_default_mode(void) { return set_default_mode(); }

EXPORT void rhtcomm_set_mode(uint64_t mode) { set_mode(mode); }

/* Whether this processor has the instructions for which CMakeLists.txt compiles a variant. */
EXPORT int rhtcomm_supports(const char *variant) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(variant, "avx512vbmi"))
        return rhtcomm_supports("avx512") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vbmi2");
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
