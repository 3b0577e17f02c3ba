// Kernels for AVX2 with FMA and F16C. Everything from here on is compiled for that instruction set, whatever
// the flags, and lives in an anonymous namespace, so that no inline function of it can stand in for another
// file's.
#include "target.h"

#if defined(GRISTMILL_X86)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fp8.h"
#include "half.h"
#include "kernels.h"

#define GRISTMILL_VNNI 0
#define GRISTMILL_DOTS "x86_dots_avx2.inc"
#define GRISTMILL_LAYOUT "x86_layout_avx2.inc"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace gristmill {
namespace {

constexpr const char* kName = "avx2";
constexpr bool kVnni = GRISTMILL_VNNI;

#include "vec_avx2.h"
#include "x86_lanes_avx2.h"
#include "x86_kernels.inc"

}  // namespace

extern const Kernels avx2_kernels = make_table(16, kDecodeRows);

}  // namespace gristmill

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
