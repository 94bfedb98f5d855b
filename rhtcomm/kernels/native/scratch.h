/* Scratch memory of one thread. */
#pragma once
#include <stdlib.h>

#include "philox.h"
#include "lanes.h"

typedef struct {
    float *y, *sum, *room; /* d each; ECDQ has symbols in `sum`, and dithers in `room`, of units that
                              go side by side, a byte for each coordinate */
    uint8_t *codes;
    uint32_t *dither, *signs, *last_signs;
    Lanes *lanes; /* ECDQ: of K ranks */
} Scratch;

enum { PHILOX_OVERRUN = 16 * SETS * CALLS };

static size_t scratch_bytes(int64_t size, int64_t ranks) {
    size_t bytes = (size_t)size * (3 * sizeof(float) + 1);
    bytes += (size_t)size + PHILOX_OVERRUN; /* dither */
    bytes += 2 * ((size_t)size / 8 + 2 * PHILOX_OVERRUN); /* signs, last_signs */
    bytes = (bytes + 63) / 64 * 64;
    return bytes + ((size_t)ranks * sizeof(Lanes) + 63) / 64 * 64;
}

/* All NULL if out of memory. The owner frees y. */
static Scratch allocate_scratch(int64_t size, int64_t ranks) {
    Scratch s = {0};
    char *memory = aligned_alloc(64, scratch_bytes(size, ranks));
    if (!memory) return s;
    s.lanes = (Lanes *)(memory + scratch_bytes(size, 0));
    s.y = (float *)memory, memory += 4 * size;
    s.sum = (float *)memory, memory += 4 * size;
    s.room = (float *)memory, memory += 4 * size;
    s.dither = (uint32_t *)memory, memory += size + PHILOX_OVERRUN;
    s.codes = (uint8_t *)memory, memory += size;
    s.signs = (uint32_t *)memory, memory += size / 8 + 2 * PHILOX_OVERRUN;
    s.last_signs = (uint32_t *)memory;
    return s;
}
