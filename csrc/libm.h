// exp and log of the C library by their first versions, which every glibc has: those of 2.29 differ from them
// in how they tell of errors, and would bar the library from systems before it.
#pragma once
#include <cmath>

#if defined(__GLIBC__) && defined(__x86_64__)
#define FUSEDLOSS_FIRST "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define FUSEDLOSS_FIRST "GLIBC_2.17"
#endif
#ifdef FUSEDLOSS_FIRST
__asm__(".symver exp, exp@" FUSEDLOSS_FIRST);
__asm__(".symver log, log@" FUSEDLOSS_FIRST);
#undef FUSEDLOSS_FIRST
#endif
