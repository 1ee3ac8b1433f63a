// The compiler's own header of instructions, without the warnings that GCC's gives.
#pragma once
#if defined(__F16C__) || defined(__AVX512F__)
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of what it means to leave so
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
