/* The arguments that the Python code passes to the kernels. */
#pragma once
#include <stdint.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { QUIC_FL, EDEN, VECTOR, ECDQ };
enum { SIGNS = 0, DITHER = 3 };

/* The blocks of one size in the payloads of a tensor: what is the same in all calls on tensors of one
 * length. kernels/cpu.py fills it, field by field (of the LATTICE, lattice_cpu.py). A tensor has one for
 * each size, the largest first. */
typedef struct {
    int64_t size;         /* d, coordinates in a block */
    int64_t shards;       /* of the tensor; each has a payload */
    int64_t numel;        /* coordinates in a shard */
    int64_t offset;       /* coordinates from the beginning of a shard to its first block */
    int64_t blocks;       /* B, in a shard */
    int64_t unit;         /* blocks that are coded together; the last of a shard may be fewer */
    int64_t unit_bytes, last_unit_bytes; /* of the codes of a unit, and of a shard's last one */
    int64_t scales, codes;  /* bytes from the beginning of a payload to those of the first block; LATTICE:
                               from the beginning of the bounds, and of the words */
    int64_t exact_capacity; /* QUIC_FL: C, exact coordinates that a block has room for */
    double normalization; /* d^(-k/2); LATTICE: d^(-k) */
    int32_t rotations;    /* k */
    int32_t quantizer;    /* QUIC_FL, EDEN, VECTOR or ECDQ; nothing for the LATTICE */
    int32_t bits;         /* b; not of ECDQ */
    int32_t group;        /* g, coordinates that a code stands for */
    int32_t shared_bits;  /* QUIC_FL: l */
    int32_t middle;       /* QUIC_FL: node of zero, LATTICE: code of zero, times 2^16 */
    float nodes_per_sigma;/* QUIC_FL: times 2^16 */
    float inverse_bound;  /* QUIC_FL, ECDQ */
    float per_step;       /* ECDQ: 2^16 / D; LATTICE: where the bound is 1 */
    float quarter_step;   /* ECDQ: D / 4 */
    int32_t precision;    /* ECDQ: P */
    int32_t class_bits;   /* ECDQ: C = 2^class_bits */
    int32_t largest;      /* ECDQ: K */
    int32_t biased;       /* EDEN, VECTOR: whether the scale is that of least squared error */
    const float *levels;      /* QUIC_FL: 2^(b+l) levels; EDEN: 2^b centroids; VECTOR: 256 x g */
    const int32_t *positions; /* QUIC_FL: positions at the nodes */
    const float *boundaries;  /* EDEN: 2^b - 1 */
    const float *half_norms;  /* VECTOR: |c_i|^2 / 2 of 128 */
    const uint64_t *symbols;  /* ECDQ: C (2 K + 1), see rans_memory.h */
    const uint32_t *slots;    /* ECDQ: C 2^P, see rans_memory.h */
    const uint16_t *registers; /* ECDQ: see rans_registers.h; NULL where it has too many symbols */
} Plan;

/* The inputs of a call's random numbers. */
typedef struct {
    uint32_t seed[2];     /* Philox key */
    uint32_t bucket, step, hop;
    int64_t offset;       /* of the tensor in its bucket, in coordinates */
    int64_t rank;         /* decoding: of the first of K adjacent ranks */
    int64_t world_size;   /* n */
} Origin;
