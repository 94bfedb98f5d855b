/* The floating-point mode of the kernels: rounding to nearest, subnormals kept, no traps.
 *
 * Each thread has its own mode and inherits it from the thread that starts it.
 * torch.set_flush_denormal and fesetround change it, and so does loading a library that was linked
 * with -ffast-math. The compiler may move arithmetic across a change of the mode, so a function that
 * computes in another mode must not be inlined. */
#pragma once
#include <stdint.h>

#include "vectors.h"

#if defined(__SSE2__)
enum { DEFAULT_MODE = 0x1f80 };
INLINE uint64_t get_mode(void) { return _mm_getcsr(); }
INLINE void set_mode(uint64_t mode) { _mm_setcsr((uint32_t)mode); }
#elif defined(__aarch64__)
enum { DEFAULT_MODE = 0 };
INLINE uint64_t get_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
    return mode;
}
INLINE void set_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else /* where, as on RISC-V and POWER, nothing but the rounding can change */
#include <fenv.h>
enum { DEFAULT_MODE = FE_TONEAREST };
INLINE uint64_t get_mode(void) { return (uint64_t)fegetround(); }
INLINE void set_mode(uint64_t mode) { fesetround((int)mode); }
#endif

/* Sets the default mode; returns the previous one. */
INLINE uint64_t set_default_mode(void) {
    uint64_t before = get_mode();
    set_mode(DEFAULT_MODE);
    return before;
}
