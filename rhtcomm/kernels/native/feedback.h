/* Error feedback: the residual of a tensor x, which the blocks of x update. The equations are those of
 * rhtcomm/kernels/feedback.py. */
#pragma once
#include "formats.h"
#include "plan.h"

/* A residual in pieces of memory: coordinates starts[i] to starts[i + 1] are at pieces[i]. */
typedef struct {
    int64_t count;
    const int64_t *starts;
    float *const *pieces;
    int64_t offset; /* where x begins in the residual */
    uint32_t *bound; /* the bits of a float, at least all magnitudes of the residual; or NULL */
} Residual;

/* What decoding needs to update a residual. kernels/cpu.py fills it. */
typedef struct {
    Residual residual;
    Origin origin;           /* of what this rank sent of x */
    const uint8_t *payloads; /* which are these, one per shard, `stride` bytes apart */
    int64_t stride;
    const float *mean;       /* what was encoded for the second hop, of the coordinates of x that lie */
    int64_t first, stop;     /* from `first` to before `stop` */
    float weight;            /* of the error of this second encoding */
} Feedback;

/* The address of x's coordinate `at` in the residual; reduces `count` to those that follow it there. */
static float *residual_at(const Residual *r, int64_t at, int64_t *count) {
    int64_t low = 0, high = r->count;
    at += r->offset;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (r->starts[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    if (*count > r->starts[low + 1] - at) *count = r->starts[low + 1] - at;
    return r->pieces[low] + (at - r->starts[low]);
}

/* What to prefetch of the residual from x's coordinate `at` on. */
INLINE const char *residual_ahead(const Residual *r, int64_t at) {
    int64_t count = 0;
    return (const char *)residual_at(r, at, &count);
}

/* Several threads may do this. */
static void raise_bound(const Residual *r, uint32_t magnitude) {
    if (!r->bound) return;
    uint32_t before = __atomic_load_n(r->bound, __ATOMIC_RELAXED);
    while (magnitude > before && !__atomic_compare_exchange_n(r->bound, &before, magnitude, 1,
                                                              __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

/* The bits of the largest magnitude of any number of floats. */
static uint32_t largest_of(const float *y, int64_t count) {
    uint32_t largest = 0;
    for (int64_t j = 0; j < count; j++) {
        const uint32_t magnitude = ((const u32 *)y)[j] & INT32_MAX;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

enum { PART = 256 };

/* `count` coordinates of x in float32, which are x itself or, at most PART of them, in `room`. */
INLINE const float *widened(const char *x, int dtype, int64_t count, float *room) {
    if (dtype == FLOAT32) return (const float *)x;
    read_block(x, dtype, count, count, room);
    return room;
}

/* The most coordinates that one call of widened() is for. */
INLINE int64_t part_of(int64_t numel, int dtype) {
    return dtype == FLOAT32 ? numel : least(numel, PART);
}

/* y[0 .. size-1] from the `numel` coordinates of x + residual from `first` on, then zeros. */
static void read_sum(const Residual *r, int64_t first, int64_t numel, int64_t size, const char *x,
                     int dtype, float *y) {
    float room[PART];
    for (int64_t done = 0, count; done < numel; done += count) {
        count = part_of(numel - done, dtype);
        const float *from = residual_at(r, first + done, &count);
        const float *wide = widened(x + done * bytes_of(dtype), dtype, count, room);
        for (int64_t j = 0; j < count; j++) y[done + j] = wide[j] + from[j];
    }
    memset(y + numel, 0, 4 * (size - numel));
}

/* residual <- x + residual - sent, where `sent` is what this rank's payload decodes to. */
static void keep_error(const Residual *r, int64_t first, int64_t numel, const char *x, int dtype,
                       const float *sent) {
    float room[PART];
    vi largest = {0};
    for (int64_t done = 0, count; done < numel; done += count) {
        count = part_of(numel - done, dtype);
        float *to = residual_at(r, first + done, &count);
        const float *wide = widened(x + done * bytes_of(dtype), dtype, count, room);
        int64_t j = 0; /* no error is -0.0 */
        for (; j + LANES <= count; j += LANES) {
            const vf left = load(wide + j) + load(to + j) - load(sent + done + j) + 0.0f;
            largest = larger(largest, (vi)left & INT32_MAX);
            store(to + j, left);
        }
        for (; j < count; j++) {
            to[j] = wide[j] + to[j] - sent[done + j] + 0.0f;
            raise_bound(r, to_bits(fabsf(to[j])));
        }
    }
    raise_bound(r, largest_lane(largest));
}

/* residual <- residual + weight (mean - decoded) + (decoded - out): the errors of encoding the mean
 * again, and of rounding what was decoded to the dtype of `out`. */
static void keep_second_errors(const Feedback *f, int64_t first, int64_t numel, const float *decoded,
                               const char *out, int dtype) {
    const Residual *r = &f->residual;
    const int again = f->mean && f->first <= first && first < f->stop;
    if (!again && dtype == FLOAT32) return;
    float room[PART];
    for (int64_t done = 0, count; done < numel; done += count) {
        count = part_of(numel - done, dtype);
        float *to = residual_at(r, first + done, &count);
        const float *now = decoded + done;
        if (again) {
            const float *before = f->mean + (first - f->first + done);
            for (int64_t j = 0; j < count; j++) to[j] += f->weight * (before[j] - now[j]);
        }
        if (dtype != FLOAT32) {
            const float *wide = widened(out + done * bytes_of(dtype), dtype, count, room);
            for (int64_t j = 0; j < count; j++) to[j] += now[j] - wide[j];
        }
        raise_bound(r, largest_of(to, count));
    }
}
