/* Runs the C kernels on the cases of cases.py, where there is no Python: for other processors under
 * qemu-user, and for other compilers. It is compiled together with rhtcomm/kernels/cpu.c.
 *
 *     driver FILE     prints how many cases there were, and exits with 1 if any of them differed
 */
#include "../../../rhtcomm/kernels/cpu.c"
#include <stdio.h>

enum { TABLES = 6 };

typedef struct {
    int64_t plans, numel, in_dtype, out_dtype, nbytes, encoded, rank, ranks, world_size, offset;
    uint64_t seed;
    int64_t step, bucket, hop;
    int64_t padded, blocks, words; /* of a lattice; of others, zeros */
    int64_t residual;              /* numel, or 0 where there is none */
    int64_t tables[TABLES];
    Plan plan[2];
} Case;

static FILE *file;

static void *read_bytes(int64_t bytes) {
    char *memory = malloc((size_t)bytes + 64);
    if (!memory || (bytes && fread(memory, (size_t)bytes, 1, file) != 1)) {
        fprintf(stderr, "the file of cases ends too early\n");
        exit(2);
    }
    return memory;
}

/* Every mode that the processor has and C programs can be in. */
static const uint64_t MODES[] = {
    DEFAULT_MODE,
#if defined(__SSE2__)
    DEFAULT_MODE | 0x8040, /* subnormal results and operands become zero */
    DEFAULT_MODE | 0x2000, /* rounding down */
    DEFAULT_MODE | 0x4000, /* rounding up */
    DEFAULT_MODE | 0xe040, /* rounding to zero, and subnormals too */
#elif defined(__aarch64__)
    1 << 24, /* subnormals become zero */
    1 << 22, 2 << 22, 3 << 22 | 1 << 24, /* other roundings */
    3 << 25,                            /* one NaN for all, and another float16 */
#else
    FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO,
#endif
};

/* What is sent and decoded, and the residual before and after. */
typedef struct {
    const char *x, *payloads, *mean, *before, *after;
} Sending;

/* What both directions make of a case, and whether the caller's mode is still there. */
static int differs(const Case *c, const Sending *of, uint64_t mode, int threads) {
    const int64_t out_bytes = c->numel * bytes_of(c->out_dtype);
    char *payload = calloc(1, (size_t)c->nbytes), *out = malloc((size_t)out_bytes);
    const char *mine = of->payloads + (c->encoded - c->rank) * c->nbytes;
    float *left = malloc(4 * (size_t)c->residual + 1);
    const int64_t starts[] = {0, c->residual / 3, c->residual};
    float *const pieces[] = {left, left + starts[1]};
    uint32_t bound = 0;
    const Residual residual = {2, starts, pieces, 0, &bound};
    const Origin origin = {{(uint32_t)c->seed, c->seed >> 32}, (uint32_t)c->bucket,
                           (uint32_t)c->step, (uint32_t)c->hop, c->offset, c->encoded,
                           c->world_size};
    const Feedback feedback = {.residual = residual, .origin = origin,
                               .payloads = (const uint8_t *)mine, .stride = c->nbytes};
    memcpy(payload, mine, 16); /* the header */
    if (c->residual) {
        memcpy(left, of->before, 4 * (size_t)c->residual);
        memcpy(out, of->x, (size_t)out_bytes);
    }
    set_mode(mode);
    int failed = JOIN(rhtcomm_encode, VARIANT)(
        c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, c->encoded,
        c->world_size, of->x, c->in_dtype, (uint8_t *)payload, c->nbytes, NULL,
        c->residual ? &residual : NULL, threads);
    failed |= JOIN(rhtcomm_decode, VARIANT)(
        c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, c->rank, c->world_size,
        c->ranks, (const uint8_t *)of->payloads, c->nbytes, 0, out, c->out_dtype,
        c->residual ? &feedback : NULL, threads);
    failed |= get_mode() != mode;
    set_mode(DEFAULT_MODE);
    failed |= memcmp(payload, mine, (size_t)c->nbytes) != 0;
    failed |= memcmp(out, of->mean, (size_t)out_bytes) != 0;
    failed |= memcmp(left, of->after, 4 * (size_t)c->residual) != 0;
    failed |= bound < largest_of(left, c->residual);
    free(payload), free(out), free(left);
    return failed != 0;
}

/* What the rank `encoded` computes of x, and what is expected of it; and of all ranks. */
typedef struct {
    const char *x, *y, *exponents, *bounds, *words, *total, *mean;
} Lattice;

static int lattice_differs(const Case *c, const Lattice *of, uint64_t mode, int threads) {
    const size_t padded = 4 * (size_t)c->padded, blocks = 4 * (size_t)c->blocks;
    const size_t words = 4 * (size_t)c->words, mean = (size_t)(c->numel * bytes_of(c->out_dtype));
    char *y = malloc(padded), *exponents = malloc(blocks), *bounds = malloc(blocks);
    char *mine = malloc(words), *out = malloc(mean);
    set_mode(mode);
    int failed = JOIN(rhtcomm_lattice_rotate, VARIANT)(
        c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, of->x, c->in_dtype,
        (float *)y, (int32_t *)exponents, (int32_t *)bounds, threads);
    failed |= JOIN(rhtcomm_lattice_encode, VARIANT)(
        c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, c->encoded, c->world_size,
        (const float *)of->y, (const int32_t *)of->exponents, (const int32_t *)of->bounds,
        (uint32_t *)mine, threads);
    failed |= JOIN(rhtcomm_lattice_decode, VARIANT)(
        c->plan, c->plans, c->seed, c->step, c->bucket, c->hop, c->offset, c->world_size,
        (const uint32_t *)of->total, (const int32_t *)of->bounds, out, c->out_dtype, threads);
    failed |= get_mode() != mode;
    set_mode(DEFAULT_MODE);
    failed |= memcmp(y, of->y, padded) != 0;
    failed |= memcmp(exponents, of->exponents, blocks) != 0;
    failed |= c->world_size == 1 && memcmp(bounds, of->bounds, blocks) != 0;
    failed |= memcmp(mine, of->words, words) != 0;
    failed |= memcmp(out, of->mean, mean) != 0;
    free(y), free(exponents), free(bounds), free(mine), free(out);
    return failed != 0;
}

/* What follows a case in the file: seven parts of a lattice; of others, the tables, x, the payloads,
 * the mean and the residuals. */
enum { PARTS_OF_CASE = TABLES + 5 };

static void read_parts(Case *c, char **parts) {
    const int64_t in = c->numel * bytes_of(c->in_dtype), out = c->numel * bytes_of(c->out_dtype);
    const int64_t of_lattice[PARTS_OF_CASE] = {in, 4 * c->padded, 4 * c->blocks, 4 * c->blocks,
                                               4 * c->words, 4 * c->words, out};
    int64_t of_others[PARTS_OF_CASE];
    memcpy(of_others, c->tables, sizeof c->tables);
    of_others[TABLES] = in, of_others[TABLES + 1] = c->ranks * c->nbytes, of_others[TABLES + 2] = out;
    of_others[TABLES + 3] = of_others[TABLES + 4] = 4 * c->residual;
    for (int i = 0; i < PARTS_OF_CASE; i++)
        parts[i] = read_bytes(c->words ? of_lattice[i] : of_others[i]);
    for (int i = 0; i < c->plans && !c->words; i++) {
        c->plan[i].levels = (float *)parts[0], c->plan[i].positions = (int32_t *)parts[1];
        c->plan[i].boundaries = (float *)parts[2], c->plan[i].half_norms = (float *)parts[3];
        c->plan[i].symbols = (uint64_t *)parts[4], c->plan[i].slots = (uint32_t *)parts[5];
    }
}

static Lattice lattice_of(char **parts) {
    return (Lattice){parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6]};
}

static int case_differs(const Case *c, char **parts, uint64_t mode, int threads) {
    const Lattice lattice = lattice_of(parts);
    if (c->words) return lattice_differs(c, &lattice, mode, threads);
    char **others = parts + TABLES;
    const Sending sending = {others[0], others[1], others[2], others[3], others[4]};
    return differs(c, &sending, mode, threads);
}

/* Opens a file of cases. */
static int open_cases(const char *path) {
    int64_t begins[2]; /* a mark that is also the version, and sizeof(Case) */
    file = fopen(path, "rb");
    return file && fread(begins, sizeof begins, 1, file) == 1 && begins[0] == ABI &&
           begins[1] == (int64_t)sizeof(Case);
}

int main(int count, char **arguments) {
    int cases = 0, wrong = 0;
    if (count != 2 || !open_cases(arguments[1])) {
        fprintf(stderr, "usage: driver FILE, made by cases.py of the same version\n");
        return 2;
    }
    for (Case c; fread(&c, sizeof c, 1, file) == 1; cases++) {
        char *parts[PARTS_OF_CASE];
        read_parts(&c, parts);
        for (size_t i = 0; i < sizeof MODES / sizeof *MODES; i++)
            for (int threads = 1; threads <= 2; threads++)
                if (case_differs(&c, parts, MODES[i], threads)) {
                    printf("case %d differs: %s %d, %d bits, mode %#llx, %d threads\n", cases,
                           c.words ? "lattice" : "quantizer", c.plan->quantizer, c.plan->bits,
                           (unsigned long long)MODES[i], threads);
                    wrong++;
                }
        for (int i = 0; i < PARTS_OF_CASE; i++) free(parts[i]);
    }
    printf("%d cases, %d modes, 1 and 2 threads: %d differ\n", cases,
           (int)(sizeof MODES / sizeof *MODES), wrong);
    return wrong || !cases;
}
