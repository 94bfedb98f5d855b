/* The loop over the blocks of a call, which its threads share. */
#pragma once
#include "exact.h"
#include "mode.h"
#include "scratch.h"

typedef struct {
    int64_t offset;        /* from the beginning of the tensor, in coordinates */
    int64_t numel;         /* coordinates without padding */
    int64_t shard;
    int64_t scale, packed; /* bytes from the beginning of the shard's payload; packed: of its unit */
    int64_t number;        /* among all blocks of the tensor */
} Block;

/* Blocks that are coded together. */
typedef struct {
    int64_t first, count; /* among those of a shard */
    int64_t shard;
    int64_t packed, bytes; /* offset of its codes in the shard's payload, and their length */
    int64_t number;        /* index of its first block among all blocks of the tensor */
} Unit;

/* Encodes or decodes some units of a call, with equal numbers of blocks. */
typedef void UnitsFunction(const void *call, const Plan *plan, const Scratch *s, const Unit *units,
                           int count);

static int64_t code_bytes(const Plan *plan) { return plan->size * plan->bits / 8; }

/* What QUIC-FL adds to a rank's dither, in 1/256; see stratum() of randomness.py. */
static uint32_t stratum(const Origin *origin, int64_t rank) {
    return (uint32_t)(256 * rank / origin->world_size);
}

static int64_t units_of_shard(const Plan *plan) {
    return (plan->blocks + plan->unit - 1) / plan->unit;
}

/* The i-th unit of a plan, those of a shard one behind the other; `before` blocks of other plans lie
 * before its own. */
static Unit unit_of(const Plan *plan, int64_t i, int64_t before) {
    const int64_t units = units_of_shard(plan), shard = i / units, row = i % units;
    const int64_t first = row * plan->unit;
    const Unit unit = {first,
                       least(plan->unit, plan->blocks - first),
                       shard,
                       plan->codes + row * plan->unit_bytes,
                       row == units - 1 ? plan->last_unit_bytes : plan->unit_bytes,
                       before + shard * plan->blocks + first};
    return unit;
}

/* The i-th block of a unit. */
static Block block_of(const Plan *plan, Unit unit, int64_t i) {
    const int64_t row = unit.first + i, offset = plan->offset + row * plan->size;
    const Block block = {unit.shard * plan->numel + offset,
                         least(plan->size, plan->numel - offset),
                         unit.shard,
                         plan->scales + 4 * row,
                         unit.packed,
                         unit.number + i};
    return block;
}

/* Calls the function on the units from number `first` on, of all plans, that go side by side: at most
 * `most`, and none from number `stop` on. Returns how many these are. */
static int64_t work_on(const Plan *plan, UnitsFunction *function, const void *call, const Scratch *s,
                       int64_t first, int64_t stop, int most) {
    int64_t before = 0;
    for (; first >= plan->shards * units_of_shard(plan); plan++) {
        first -= plan->shards * units_of_shard(plan);
        stop -= plan->shards * units_of_shard(plan);
        before += plan->shards * plan->blocks;
    }
    stop = least(stop, plan->shards * units_of_shard(plan));
    Unit units[SIDE_BY_SIDE];
    int count = 0;
    for (; count < most && first + count < stop; count++) {
        units[count] = unit_of(plan, first + count, before);
        if (units[count].count != units[0].count) break;
    }
    function(call, plan, s, units, count);
    return count;
}

/* One thread's shares; compilers may not move its arithmetic across the change of the mode. */
static __attribute__((noinline)) int share(const Plan *plans, int count, UnitsFunction *function,
                                           const void *call, int64_t ranks, int most, int shares) {
    const Scratch s = allocate_scratch(plans->size, ranks * most); /* which is the largest */
    const int failed = s.y ? 0 : -1;
    int64_t units = 0;
    for (int i = 0; i < count; i++) units += plans[i].shards * units_of_shard(plans + i);
#pragma omp for schedule(static)
    for (int i = 0; i < shares; i++) {
        const int64_t stop = units * (i + 1) / shares;
        for (int64_t number = units * i / shares; number < stop && !failed;)
            number += work_on(plans, function, call, &s, number, stop, most);
    }
    free(s.y);
    return failed;
}

/* Returns 0, or -1 where there is no memory. `ranks` are those that a unit is decoded from; `most`, the
 * units that go side by side. */
static int for_each_unit(const Plan *plans, int count, UnitsFunction *function, const void *call,
                         int64_t ranks, int most, int threads) {
    if (!count) return 0; /* there may be no array of plans either */
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
    {
        uint64_t mode = set_default_mode();
        failed = share(plans, count, function, call, ranks, most, threads > 1 ? threads : 1);
        set_mode(mode);
    }
    return failed;
}
