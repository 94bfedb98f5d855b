/* Codes packed by fields of 8, 4, 2 and 1 bits, widest first; see bitpack.py. */
#pragma once
#include "vectors.h"

INLINE void pack_field(const uint8_t *codes, int64_t size, const int width, int shift, uint8_t *to) {
    const int lanes = 8 / width;
    const uint8_t mask = (uint8_t)((1 << width) - 1);
    const int64_t octets = size / lanes;
    for (int64_t j = 0; j < octets; j++) {
        unsigned octet = 0;
        UNROLL(8)
        for (int lane = 0; lane < lanes; lane++)
            octet |= ((codes[j + lane * octets] >> shift) & mask) << (lane * width);
        to[j] = (uint8_t)octet;
    }
}

INLINE void unpack_field(const uint8_t *from, int64_t size, const int width, int shift,
                         uint8_t *codes) {
    const int lanes = 8 / width;
    const uint8_t mask = (uint8_t)((1 << width) - 1);
    const int64_t octets = size / lanes;
    UNROLL(8)
    for (int lane = 0; lane < lanes; lane++) {
        uint8_t *to = codes + lane * octets;
        if (shift == 0)
            for (int64_t j = 0; j < octets; j++) to[j] = (from[j] >> (lane * width)) & mask;
        else
            for (int64_t j = 0; j < octets; j++)
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
