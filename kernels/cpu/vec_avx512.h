// Sixteen float lanes in one AVX-512 register; the operations are described in vec_portable.h.
constexpr int kLanes = 16;
constexpr bool kManyRegisters = true;

#include "x86_transpose.inc"
#include "x86_transpose_avx512.inc"

struct Vec {
  __m512 v;
};

GRISTMILL_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
GRISTMILL_INLINE Vec set1(f16 x) {
  return {_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(x.bits)))};
}
GRISTMILL_INLINE Vec iota() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
GRISTMILL_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
GRISTMILL_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
GRISTMILL_INLINE Vec load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
GRISTMILL_INLINE Vec load(const scaled_fp8* p) { return {_mm512_cvtph_ps(fp8_to_f16(p))}; }
// 32 e4m3 numbers times 2^-8 as f16, as fp8_to_f16 has it.
GRISTMILL_INLINE void store_halves(const scaled_fp8* p, f16* out) {
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
  _mm512_storeu_si512(out, _mm512_and_si512(_mm512_slli_epi16(wide, 7), mask));
}
GRISTMILL_INLINE Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
GRISTMILL_INLINE Vec load(const fp8* p) {
  return {_mm512_mul_ps(_mm512_cvtph_ps(fp8_to_f16(p)), _mm512_set1_ps(kFp8Unit))};
}
GRISTMILL_INLINE Vec load_nibbles(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(nibbles16(p)))};
}

GRISTMILL_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
GRISTMILL_INLINE void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
GRISTMILL_INLINE void store(int8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

GRISTMILL_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
GRISTMILL_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
GRISTMILL_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
GRISTMILL_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
GRISTMILL_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
GRISTMILL_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
GRISTMILL_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// The same value, in a register by force: compilers load again what is used several times.
GRISTMILL_INLINE Vec in_register(Vec a) {
  __asm__("" : "+v"(a.v));
  return a;
}

GRISTMILL_INLINE Vec abs(Vec a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.f), a.v)}; }
GRISTMILL_INLINE Vec copysign(Vec a, Vec b) {
  const __m512 sign = _mm512_set1_ps(-0.f);
  return {_mm512_or_ps(_mm512_andnot_ps(sign, a.v), _mm512_and_ps(sign, b.v))};
}
GRISTMILL_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
GRISTMILL_INLINE Vec power_of_two(Vec t) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(t.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)))};
}
GRISTMILL_INLINE Vec times_power_of_two(Vec x, Vec n, Vec) { return {_mm512_scalef_ps(x.v, n.v)}; }

GRISTMILL_INLINE float reduce_add(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Sixteen reduce_adds at once: where that adds two halves of a register, this adds halves of two registers.
GRISTMILL_INLINE Vec reduce_add_16(const float* p) {
  __m512 eight[8], four[4];  // of each output so many sums; four[l] has outputs l, 4 + l, 8 + l, 12 + l
  GRISTMILL_UNROLL
  for (int i = 0; i < 8; i++) {
    const int output = i % 4 + i / 4 * 8;
    const __m512 a = _mm512_loadu_ps(p + 16 * output), b = _mm512_loadu_ps(p + 16 * (output + 4));
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  GRISTMILL_UNROLL
  for (int i = 0; i < 4; i++) {
    const __m512 a = eight[i], b = eight[i + 4];
    four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  __m512 two[2];
  GRISTMILL_UNROLL
  for (int i = 0; i < 2; i++) {
    const __m512 a = four[2 * i], b = four[2 * i + 1];
    two[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  return {_mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd))};
}
GRISTMILL_INLINE float reduce_max(Vec a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
GRISTMILL_INLINE float first(Vec a) { return _mm512_cvtss_f32(a.v); }
GRISTMILL_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache only.
GRISTMILL_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
// What lies ahead in a stream of weights that is read at `at`; far: as reads_far_ahead says.
GRISTMILL_INLINE void prefetch_stream(const void* at, bool far) {
  if (far) prefetch_far(static_cast<const char*>(at) + 1536);
  else prefetch(static_cast<const char*>(at) + 384);
}

#if GRISTMILL_VNNI
// A number is 256 * high + low, both signed bytes.
struct Quads {
  __m512i bytes;
};
struct Factor {
  int32_t high, low;
  int64_t unused;  // four lanes become one factor where they are
};
struct Factors {
  __m512i high, low;
};
struct QuadSum {
  __m512i high, low;
};
GRISTMILL_INLINE Quads load_quads(const char* p) { return {_mm512_loadu_si512(p)}; }
// Each of its own by force: compilers copy one zero about.
GRISTMILL_INLINE __m512i no_dots() {
  __m512i zero;
  __asm__("vpxord %0, %0, %0" : "=v"(zero));
  return zero;
}
GRISTMILL_INLINE QuadSum no_quads() { return {no_dots(), no_dots()}; }
// In place by force: compilers copy accumulators from register to register in the middle of the loop.
GRISTMILL_INLINE void add_dots(__m512i& sum, __m512i bytes, __m512i factors) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(factors));
}
GRISTMILL_INLINE Factors spread_factor(const Factor* factor) {
  return {_mm512_set1_epi32(factor->high), _mm512_set1_epi32(factor->low)};
}
GRISTMILL_INLINE void add_quads(QuadSum& sum, const Quads& quads, const Factors& factors) {
  add_dots(sum.high, quads.bytes, factors.high);
  add_dots(sum.low, quads.bytes, factors.low);
}
GRISTMILL_INLINE Vec to_float(const QuadSum& sum) {
  return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low))};
}
// Adding 128 rounds to the nearest multiple of 256; the low byte then is 128 too large.
GRISTMILL_INLINE void store_factors(Factor* p, Vec a, Vec unit) {
  const __m512i number = _mm512_castps_si512(fma(a, unit, set1(12582912.f + 128.f)).v);
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi32(0x0d090501, 0x0c080400, -1, -1));
  const __m512i bytes = _mm512_shuffle_epi8(number, order);
  const __m512i factors = _mm512_xor_si512(bytes, _mm512_set1_epi64(int64_t(0x8080808000000000u)));
  _mm512_storeu_si512(p, factors);
}
#else
struct Quads {
  __m512i even, odd;  // bytes 0 and 2, 1 and 3 of each lane as words
};
struct Factor {
  int32_t even, odd;  // words
};
struct Factors {
  __m512i even, odd;
};
struct QuadSum {
  __m512i dots;
};
GRISTMILL_INLINE Quads load_quads(const char* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return {_mm512_and_si512(x, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(x, 8)};
}
GRISTMILL_INLINE QuadSum no_quads() { return {_mm512_setzero_si512()}; }
GRISTMILL_INLINE Factors spread_factor(const Factor* factor) {
  return {_mm512_set1_epi32(factor->even), _mm512_set1_epi32(factor->odd)};
}
GRISTMILL_INLINE void add_quads(QuadSum& sum, const Quads& quads, const Factors& factors) {
  const __m512i even = _mm512_madd_epi16(quads.even, factors.even);
  const __m512i odd = _mm512_madd_epi16(quads.odd, factors.odd);
  sum.dots = _mm512_add_epi32(sum.dots, _mm512_add_epi32(even, odd));
}
GRISTMILL_INLINE Vec to_float(const QuadSum& sum) { return {_mm512_cvtepi32_ps(sum.dots)}; }
GRISTMILL_INLINE void store_factors(Factor* p, Vec a, Vec unit) {
  const Vec rounded = fma(a, unit, set1(kFactorMagic));
  store_word_factors(p, _mm512_castps512_ps256(rounded.v));
  store_word_factors(p + 2, _mm512_extractf32x8_ps(rounded.v, 1));
}
#endif

// What a register holds of a Vec: all of it.
using Register = Vec;
constexpr int kRegisterLanes = kLanes;
GRISTMILL_INLINE Register zero_register() { return set1(0.f); }
GRISTMILL_INLINE Register load_register(const float* p) { return load(p); }
GRISTMILL_INLINE void store_registers(float* p, int64_t, Vec a) { store(p, a); }
