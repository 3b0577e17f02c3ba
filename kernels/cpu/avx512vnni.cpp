// Kernels for AVX-512 (F, BW, DQ, VL) with VNNI. Everything from here on is compiled for that instruction
// set, whatever the flags, and lives in an anonymous namespace, so that no inline function of it can stand in
// for another file's.
#include "target.h"

#if defined(GRISTMILL_X86)
// GCC's own headers start from a register "undefined on purpose" and then warn about it (GCC bug 105593)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "fp8.h"
#include "half.h"
#include "kernels.h"

#define GRISTMILL_VNNI 1
#define GRISTMILL_DOTS "x86_dots_avx512.inc"
#define GRISTMILL_LAYOUT "x86_layout_avx512.inc"
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace gristmill {
namespace {

constexpr const char* kName = "avx512vnni";
constexpr bool kVnni = GRISTMILL_VNNI;

#include "vec_avx512.h"
#include "x86_lanes_avx512.h"
#include "x86_kernels.inc"

}  // namespace

extern const Kernels avx512vnni_kernels = make_table(32, kDecodeRows);

}  // namespace gristmill

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
