/* Sums in the order of a halving tree, and the largest magnitude. */
#pragma once
#include "vectors.h"

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
    enum { MAXIMA = LANES > 8 ? 4 : 32 / LANES }; /* none waits for the one before */
    vi largest[MAXIMA] = {{0}};
    int64_t j = 0;
    for (; j + MAXIMA * LANES <= size; j += MAXIMA * LANES)
        UNROLL(8)
        for (int i = 0; i < MAXIMA; i++)
            largest[i] = larger(largest[i], (vi)load(y + j + i * LANES) & INT32_MAX);
    for (; j < size; j += LANES) largest[0] = larger(largest[0], (vi)load(y + j) & INT32_MAX);
    for (int i = 1; i < MAXIMA; i++) largest[0] = larger(largest[0], largest[i]);
    return largest_lane(largest[0]);
}

/* 2^(127 - e) and 2^(e - 127), e the biased exponent of `peak` clamped to 1 .. 253. */
INLINE void powers_of_two(uint32_t peak, float *down, float *up) {
    uint32_t exponent = peak >> 23;
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    *down = from_bits((254 - exponent) << 23);
    *up = from_bits(exponent << 23);
}
