/* Four lanes of the coder with tables in memory, for aarch64. */
#pragma once
#include "lanes.h"

typedef vu Group;
enum { GROUPS = VECTORS, WIDTH = LANES };

/* Which of four lanes a mask has: a bit for each, and 16 times their number. */
INLINE uint64_t lanes_of(uint32x4_t mask) {
    static const uint32_t lane[4] = {16 + 1, 16 + 2, 16 + 4, 16 + 8};
    return vaddvq_u32(vandq_u32(mask, vld1q_u32(lane)));
}

/* The bytes of four words: of those lanes that the mask has, in order, at the end. */
#define WORD(lane) 2 * (lane), 2 * (lane) + 1
#define WORDS(a, b, c, d) {WORD(a), WORD(b), WORD(c), WORD(d)}
static const uint8_t compressed[16][8] = {
    WORDS(0, 0, 0, 0), WORDS(0, 0, 0, 0), WORDS(0, 0, 0, 1), WORDS(0, 0, 0, 1),
    WORDS(0, 0, 0, 2), WORDS(0, 0, 0, 2), WORDS(0, 0, 1, 2), WORDS(0, 0, 1, 2),
    WORDS(0, 0, 0, 3), WORDS(0, 0, 0, 3), WORDS(0, 0, 1, 3), WORDS(0, 0, 1, 3),
    WORDS(0, 0, 2, 3), WORDS(0, 0, 2, 3), WORDS(0, 1, 2, 3), WORDS(0, 1, 2, 3)};

/* The bytes of four states, of which a lane that the mask has moves up by a word and takes the next one:
 * words have bytes 16 to 23, and follow in order. */
#define COUNT(mask) (((mask) & 1) + ((mask) >> 1 & 1) + ((mask) >> 2 & 1))
#define NEXT(mask, i) 16 + 2 * COUNT((mask) & ((1 << (i)) - 1))
#define PICK(mask, i, yes, no) (uint8_t)((mask) >> (i) & 1 ? (yes) : (no))
#define STATE(mask, i)                                                                       \
    PICK(mask, i, NEXT(mask, i), 4 * (i)), PICK(mask, i, NEXT(mask, i) + 1, 4 * (i) + 1),   \
        PICK(mask, i, 4 * (i), 4 * (i) + 2), PICK(mask, i, 4 * (i) + 1, 4 * (i) + 3)
#define STATES(mask) {STATE(mask, 0), STATE(mask, 1), STATE(mask, 2), STATE(mask, 3)}
static const uint8_t expanded[16][16] = {
    STATES(0), STATES(1), STATES(2),  STATES(3),  STATES(4),  STATES(5),  STATES(6),  STATES(7),
    STATES(8), STATES(9), STATES(10), STATES(11), STATES(12), STATES(13), STATES(14), STATES(15)};

/* The numbers of four symbols. */
INLINE void load_symbols(const uint64_t *table, const uint8_t *symbols, uint32x4_t *entry,
                         uint32x4_t *inverse) {
    const uint64x2_t a = vcombine_u64(vld1_u64(table + symbols[0]), vld1_u64(table + symbols[1]));
    const uint64x2_t b = vcombine_u64(vld1_u64(table + symbols[2]), vld1_u64(table + symbols[3]));
    *entry = vuzp1q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b));
    *inverse = vuzp2q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b));
}

/* x * inverse, shifted right by -shift; of a 64-bit lane's shift, the lowest byte counts. */
INLINE uint32x4_t divide(uint32x4_t x, uint32x4_t inverse, int32x4_t shift) {
    uint64x2_t low = vmull_u32(vget_low_u32(x), vget_low_u32(inverse));
    uint64x2_t high = vmull_high_u32(x, inverse);
    low = vshlq_u64(low, vreinterpretq_s64_s32(vzip1q_s32(shift, shift)));
    high = vshlq_u64(high, vreinterpretq_s64_s32(vzip2q_s32(shift, shift)));
    return vuzp1q_u32(vreinterpretq_u32_u64(low), vreinterpretq_u32_u64(high));
}

INLINE uint8_t *encode_group(const uint64_t *table, int precision, const uint8_t *symbols, Group *x,
                             uint8_t *next) {
    uint32x4_t entry, inverse;
    load_symbols(table, symbols, &entry, &inverse);
    const uint32x4_t old = (uint32x4_t)*x, f = vandq_u32(entry, vdupq_n_u32(FIELD));
    const uint32x4_t emits = vcgeq_u32(old, vshlq_u32(f, vdupq_n_s32(32 - precision)));
    const uint32x4_t rest = vbslq_u32(emits, vshrq_n_u32(old, 16), old);
    const int32x4_t s = vreinterpretq_s32_u32(vshrq_n_u32(entry, 26));
    const uint32x4_t quotient = divide(rest, inverse, vsubq_s32(vdupq_n_s32(-31), s));
    const uint32x4_t start = vandq_u32(vshrq_n_u32(entry, 13), vdupq_n_u32(FIELD));
    const uint32x4_t others = vsubq_u32(vdupq_n_u32(1u << precision), f);
    *x = (vu)vmlaq_u32(vaddq_u32(rest, start), quotient, others);
    const uint64_t lanes = lanes_of(emits);
    const uint8x8_t words = vreinterpret_u8_u16(vmovn_u32(old));
    vst1_u8(next - 8, vtbl1_u8(words, vld1_u8(compressed[lanes & 15])));
    return next - 2 * (lanes >> 4);
}

INLINE vu look_up_lanes(const u32 *table, uint32x4_t index) {
    uint64_t a = vgetq_lane_u64(vreinterpretq_u64_u32(index), 0);
    uint64_t b = vgetq_lane_u64(vreinterpretq_u64_u32(index), 1);
    __asm__("" : "+r"(a), "+r"(b)); /* one move from the vector, not two */
    return (vu){table[(uint32_t)a], table[a >> 32], table[(uint32_t)b], table[b >> 32]};
}

INLINE Group decode_group(const u32 *table, int precision, const uint8_t *classes, Group *x,
                          const uint8_t **next) {
    const uint32_t total = 1u << precision;
    const uint32x4_t old = (uint32x4_t)*x, place = vandq_u32(old, vdupq_n_u32(total - 1));
    const uint32x4_t class = (uint32x4_t)load_bytes(classes);
    const uint32x4_t slot =
        (uint32x4_t)look_up_lanes(table, vmlaq_u32(place, class, vdupq_n_u32(total)));
    const uint32x4_t field = vdupq_n_u32(SLOT_FIELD), f = vandq_u32(vshrq_n_u32(slot, 12), field);
    const uint32x4_t state =
        vmlaq_u32(vandq_u32(slot, field), f, vshlq_u32(old, vdupq_n_s32(-precision)));
    const uint64_t lanes = lanes_of(vcltq_u32(state, vdupq_n_u32(1 << 16)));
    uint8x16x2_t both = {{vreinterpretq_u8_u32(state), vcombine_u8(vld1_u8(*next), vdup_n_u8(0))}};
    *x = (vu)vqtbl2q_u8(both, vld1q_u8(expanded[lanes & 15]));
    *next += 2 * (lanes >> 4);
    return (vu)slot;
}

INLINE void store_columns(uint8_t *to, const Group *slots) {
    UNROLL(2)
    for (int i = 0; i < GROUPS; i += 4) {
        const uint16x8_t *s = (const uint16x8_t *)(slots + i);
        const uint16x8_t low = vuzp2q_u16(s[0], s[1]), high = vuzp2q_u16(s[2], s[3]);
        vst1q_u8(to + LANES * i, vuzp2q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)));
    }
}
