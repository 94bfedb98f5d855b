/* Runs one step of the first case of a file, for benchmarks/instructions.py to count what it executes.
 *
 *     instructions FILE rotate|encode|decode TIMES       exits with 1 if the case gives wrong bits
 */
#define main check_cases
#include "../../tests/kernels/cross/driver.c"
#undef main

static char *room(int64_t bytes) { return aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64); }

static void lattice_step(const Case *c, const Lattice *of, const char *step, char *y, char *out) {
    int32_t *exponents = (int32_t *)of->exponents, *bounds = (int32_t *)of->bounds;
    if (*step == 'r')
        JOIN(rhtcomm_lattice_rotate, VARIANT)(
            c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, of->x, c->in_dtype,
            (float *)y, (int32_t *)out, (int32_t *)out + c->blocks, 1);
    else if (*step == 'e')
        JOIN(rhtcomm_lattice_encode, VARIANT)(
            c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, c->encoded,
            c->world_size, (const float *)of->y, exponents, bounds, (uint32_t *)out, 1);
    else
        JOIN(rhtcomm_lattice_decode, VARIANT)(
            c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, c->world_size,
            (const uint32_t *)of->total, bounds, out, c->out_dtype, 1);
}

static void payload_step(const Case *c, char **parts, const char *step, char *out) {
    if (*step == 'e')
        JOIN(rhtcomm_encode, VARIANT)(
            c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, c->encoded,
            c->world_size, parts[TABLES], c->in_dtype, (uint8_t *)out, c->nbytes, NULL, NULL, 1);
    else
        JOIN(rhtcomm_decode, VARIANT)(
            c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, c->rank,
            c->world_size, c->ranks, (const uint8_t *)parts[TABLES + 1], c->nbytes, 0, out,
            c->out_dtype, NULL, 1);
}

int main(int count, char **arguments) {
    Case c;
    char *parts[PARTS_OF_CASE];
    if (count != 4 || !open_cases(arguments[1]) || fread(&c, sizeof c, 1, file) != 1) return 2;
    read_parts(&c, parts);
    if (case_differs(&c, parts, DEFAULT_MODE, 1)) return 1;
    const Lattice lattice = lattice_of(parts);
    char *y = room(4 * c.padded), *out = room(8 * c.numel);
    for (int i = 0; i < atoi(arguments[3]); i++)
        if (c.words)
            lattice_step(&c, &lattice, arguments[2], y, out);
        else
            payload_step(&c, parts, arguments[2], out);
    return 0;
}
