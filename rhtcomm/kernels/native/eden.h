/* EDEN: the nearest centroid of each coordinate. */
#pragma once
#include "plan.h"
#include "sums.h"
#include "vectors.h"

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
