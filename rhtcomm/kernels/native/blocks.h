/* The loop over the blocks of a call, which its threads share. */
#pragma once
#include "exact.h"
#include "mode.h"
#include "scratch.h"

typedef struct {
    int64_t offset;        /* from the beginning of the tensor, in coordinates */
    int64_t numel;         /* coordinates that are no padding */
    int64_t shard;
    int64_t scale, packed; /* bytes from the beginning of the shard's payload */
    int64_t number;        /* among all blocks of the tensor */
} Block;

/* Encodes or decodes one block of a call. */
typedef void BlockFunction(const void *call, const Plan *plan, const Scratch *s, Block block);

static int64_t code_bytes(const Plan *plan) { return plan->size * plan->bits / 8; }

/* Codes and exact coordinates of a block. */
static int64_t packed_bytes(const Plan *plan) {
    return code_bytes(plan) + plan->exact_capacity * (index_bytes(plan) + 2);
}

/* What QUIC-FL adds to a rank's dither, in 1/256; see stratum() of randomness.py. */
static uint32_t stratum(const Origin *origin, int64_t rank) {
    return (uint32_t)(256 * rank / origin->world_size);
}

/* The i-th block of a plan, those of a shard one behind the other. */
static Block block_of(const Plan *plan, int64_t i, int64_t number) {
    const int64_t shard = i / plan->blocks, row = i % plan->blocks;
    const int64_t offset = plan->offset + row * plan->size;
    const Block block = {shard * plan->numel + offset,
                         least(plan->size, plan->numel - offset),
                         shard,
                         plan->scales + 4 * row,
                         plan->codes + row * packed_bytes(plan),
                         number};
    return block;
}

/* One thread's share; compilers may not move its arithmetic across the change of the mode. */
static __attribute__((noinline)) int share(const Plan *plans, int count, BlockFunction *function,
                                           const void *call) {
    const Scratch s = allocate_scratch(plans->size); /* which is the largest */
    const int failed = s.y ? 0 : -1;
    int64_t blocks = 0;
    for (int i = 0; i < count; i++) blocks += plans[i].shards * plans[i].blocks;
#pragma omp for schedule(static)
    for (int64_t number = 0; number < blocks; number++) {
        const Plan *plan = plans;
        int64_t i = number;
        for (; i >= plan->shards * plan->blocks; plan++) i -= plan->shards * plan->blocks;
        if (!failed) function(call, plan, &s, block_of(plan, i, number));
    }
    free(s.y);
    return failed;
}

/* Returns 0, or -1 where there is no memory. */
static int for_each_block(const Plan *plans, int count, BlockFunction *function, const void *call,
                          int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
    {
        uint64_t mode = set_default_mode();
        failed = share(plans, count, function, call);
        set_mode(mode);
    }
    return failed;
}
