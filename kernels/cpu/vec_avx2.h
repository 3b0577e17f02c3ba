// Sixteen float lanes in two AVX2 registers; the operations are described in vec_portable.h.
constexpr int kLanes = 16;
constexpr bool kManyRegisters = false;

#include "x86_transpose.inc"

struct Vec {
  __m256 low, high;
};

GRISTMILL_INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
GRISTMILL_INLINE Vec set1(f16 x) {
  const __m256 all = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(x.bits)));
  return {all, all};
}
GRISTMILL_INLINE Vec iota() {
  return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)};
}
template <typename T>
GRISTMILL_INLINE Vec load(const T* p) {
  return {load8(p), load8(p + 8)};
}
GRISTMILL_INLINE Vec load(const scaled_fp8* p) {
  const __m256i half = fp8_to_f16(p);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}
// 32 e4m3 numbers times 2^-8 as f16.
GRISTMILL_INLINE void store_halves(const scaled_fp8* p, f16* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), fp8_to_f16(p));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), fp8_to_f16(p + 16));
}
GRISTMILL_INLINE Vec load_nibbles(const uint8_t* p) {
  const __m128i bytes = nibbles16(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

GRISTMILL_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
GRISTMILL_INLINE void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT));
}
GRISTMILL_INLINE void store(int8_t* p, Vec a) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

GRISTMILL_INLINE Vec add(Vec a, Vec b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
GRISTMILL_INLINE Vec sub(Vec a, Vec b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
GRISTMILL_INLINE Vec mul(Vec a, Vec b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
GRISTMILL_INLINE Vec div(Vec a, Vec b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
GRISTMILL_INLINE Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
GRISTMILL_INLINE Vec min(Vec a, Vec b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
GRISTMILL_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

// The same value, in registers by force: compilers load again what is used several times.
GRISTMILL_INLINE __m256 in_register(__m256 a) {
  __asm__("" : "+x"(a));
  return a;
}
GRISTMILL_INLINE Vec in_register(Vec a) { return {in_register(a.low), in_register(a.high)}; }

GRISTMILL_INLINE Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
GRISTMILL_INLINE __m256 copysign8(__m256 a, __m256 b) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b));
}
GRISTMILL_INLINE Vec copysign(Vec a, Vec b) { return {copysign8(a.low, b.low), copysign8(a.high, b.high)}; }

GRISTMILL_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.low, x.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.high, x.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
GRISTMILL_INLINE __m256 power_of_two8(__m256 t) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
}
GRISTMILL_INLINE Vec power_of_two(Vec t) { return {power_of_two8(t.low), power_of_two8(t.high)}; }
GRISTMILL_INLINE Vec times_power_of_two(Vec x, Vec, Vec t) { return mul(x, power_of_two(t)); }

GRISTMILL_INLINE float reduce_add(Vec a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Eight reduce_adds at once: where that adds two halves of a register, this adds halves of two registers.
GRISTMILL_INLINE __m256 reduce_add_8(const float* p) {
  __m256 four[4], two[2];  // of each output so many sums; four[l] has outputs l, 4 + l
  GRISTMILL_UNROLL
  for (int i = 0; i < 4; i++) {
    const float *low = p + 16 * i, *high = low + 64;
    const __m256 a = _mm256_add_ps(_mm256_loadu_ps(low), _mm256_loadu_ps(low + 8));
    const __m256 b = _mm256_add_ps(_mm256_loadu_ps(high), _mm256_loadu_ps(high + 8));
    four[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  GRISTMILL_UNROLL
  for (int i = 0; i < 2; i++) {
    const __m256 a = four[2 * i], b = four[2 * i + 1];
    two[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xdd));
}
GRISTMILL_INLINE Vec reduce_add_16(const float* p) { return {reduce_add_8(p), reduce_add_8(p + 128)}; }
GRISTMILL_INLINE float reduce_max(Vec a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
GRISTMILL_INLINE float first(Vec a) { return _mm256_cvtss_f32(a.low); }
GRISTMILL_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache only.
GRISTMILL_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
// What lies ahead in a stream of weights that is read at `at`: Zen 3 wants it near, in the first cache.
GRISTMILL_INLINE void prefetch_stream(const void* at, bool) { prefetch(static_cast<const char*>(at) + 384); }

struct Quads {
  __m256i even[2], odd[2];  // bytes 0 and 2, 1 and 3 of each lane as words
};
struct Factor {
  int32_t even, odd;  // words
};
struct Factors {
  __m256i even, odd;
};
struct QuadSum {
  __m256i low, high;
};
GRISTMILL_INLINE Quads load_quads(const char* p) {
  Quads quads;
  for (int i = 0; i < 2; i++) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    quads.even[i] = _mm256_and_si256(x, _mm256_set1_epi16(0xff));
    quads.odd[i] = _mm256_srli_epi16(x, 8);
  }
  return quads;
}
GRISTMILL_INLINE QuadSum no_quads() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
GRISTMILL_INLINE Factors spread_factor(const Factor* factor) {
  return {_mm256_set1_epi32(factor->even), _mm256_set1_epi32(factor->odd)};
}
GRISTMILL_INLINE __m256i quad_dots(__m256i even, __m256i odd, const Factors& factors) {
  return _mm256_add_epi32(_mm256_madd_epi16(even, factors.even), _mm256_madd_epi16(odd, factors.odd));
}
GRISTMILL_INLINE void add_quads(QuadSum& sum, const Quads& quads, const Factors& factors) {
  sum.low = _mm256_add_epi32(sum.low, quad_dots(quads.even[0], quads.odd[0], factors));
  sum.high = _mm256_add_epi32(sum.high, quad_dots(quads.even[1], quads.odd[1], factors));
}
GRISTMILL_INLINE Vec to_float(const QuadSum& sum) {
  return {_mm256_cvtepi32_ps(sum.low), _mm256_cvtepi32_ps(sum.high)};
}
GRISTMILL_INLINE void store_factors(Factor* p, Vec a, Vec unit) {
  const Vec rounded = fma(a, unit, set1(kFactorMagic));
  store_word_factors(p, rounded.low);
  store_word_factors(p + 2, rounded.high);
}

// What a register holds of a Vec: half of it.
struct Register {
  __m256 v;
};
constexpr int kRegisterLanes = 8;
GRISTMILL_INLINE Register zero_register() { return {_mm256_setzero_ps()}; }
GRISTMILL_INLINE Register load_register(const float* p) { return {_mm256_loadu_ps(p)}; }
GRISTMILL_INLINE Register in_register(Register a) { return {in_register(a.v)}; }
GRISTMILL_INLINE void store(float* p, Register a) { _mm256_storeu_ps(p, a.v); }
GRISTMILL_INLINE Register fma(Register a, Register b, Register c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
GRISTMILL_INLINE void store_registers(float* p, int64_t step, Vec a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + step, a.high);
}
