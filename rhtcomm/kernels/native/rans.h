/* rANS in 32 interleaved lanes; see rans.py. Symbols are bytes: of each coordinate of a block, for one
 * unit after the other. */
#pragma once
#include "rans_memory.h"
#include "rans_registers.h"

INLINE int encode_with(const Plan *plan, Lanes *lanes, const int count, const uint8_t *symbols) {
#if defined(__AVX512F__)
    if (plan->registers) return encode_by_registers(plan, lanes, count, symbols);
#endif
    return encode_by_memory(plan, lanes, count, symbols);
}

INLINE void decode_with(const Plan *plan, Lanes *lanes, const int count, uint8_t *symbols) {
#if defined(__AVX512F__)
    if (plan->registers) {
        decode_by_registers(plan, lanes, count, symbols);
        return;
    }
#endif
    decode_by_memory(plan, lanes, count, symbols);
}

/* Encodes the block before the last one of at most SIDE_BY_SIDE units, from its last step to the first;
 * symbols are places in plan->symbols. Returns 0 where words of a unit reach its edge; they overrun it
 * by less than STATE_BYTES. */
static int rans_encode(const Plan *plan, Lanes *lanes, int count, const uint8_t *symbols) {
#if defined(__AVX2__)
    if (count == 4) return encode_with(plan, lanes, 4, symbols);
    if (count >= 2) {
        if (!encode_with(plan, lanes, 2, symbols)) return 0;
        lanes += 2, symbols += 2 * plan->size, count -= 2;
    }
#endif
    return count == 0 || encode_with(plan, lanes, 1, symbols);
}

/* Decodes the next block of at most SIDE_BY_SIDE units; symbols are classes, and become columns. */
static void rans_decode(const Plan *plan, Lanes *lanes, int count, uint8_t *symbols) {
#if defined(__AVX2__)
    if (count == 4) {
        decode_with(plan, lanes, 4, symbols);
        return;
    }
    if (count >= 2) {
        decode_with(plan, lanes, 2, symbols);
        lanes += 2, symbols += 2 * plan->size, count -= 2;
    }
#endif
    if (count) decode_with(plan, lanes, 1, symbols);
}
