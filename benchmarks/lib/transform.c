/* Transforms of adjacent rows of `size` float32, for transform.py: ours, or FFHT's. */
#include <stdint.h>

#if defined(FFHT)
int fht_float(float *row, int log_size);

static void transform_row(float *row, int64_t size) {
    fht_float(row, __builtin_ctzll((unsigned long long)size));
}
#else
#include "native/hadamard.h"

static void transform_row(float *row, int64_t size) {
    hadamard(row, row, size, NULL, 1.0f, (const char *)row, 0);
}
#endif

__attribute__((visibility("default"))) void transform_rows(float *rows, int64_t size, int64_t count) {
    for (int64_t i = 0; i < count; i++) transform_row(rows + i * size, size);
}
