/* The nearest codeword of each group of coordinates. */
#pragma once
#include "eden.h"
#include "plan.h"
#include "vectors.h"

/* Codes and codewords of one block of `group` coordinates per code: LANES groups at a time against
 * each pair +-c_i in turn. A strictly greater score replaces the best, so the lowest of equals wins. */
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
            UNROLL(8)
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
        UNROLL(8)
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
