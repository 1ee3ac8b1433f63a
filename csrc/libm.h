// exp and log of the C library by their first versions, which every glibc has: those of 2.29 differ from them
// in how they tell of errors, and would bar a shared library from systems before it.
#pragma once
#include <cmath>

#if defined(__GLIBC__) && defined(__PIC__) && !defined(__PIE__)
#if defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17");
__asm__(".symver log, log@GLIBC_2.17");
#endif
#endif
