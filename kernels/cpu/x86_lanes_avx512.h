// Registers whose lanes are outputs, AVX-512 with and without VNNI. Included inside an anonymous namespace.
constexpr int kIntLanes = 16;
constexpr int kRowTile = 8;
constexpr int kDecodeRows = 4;

using Ints = __m512i;
using Floats = __m512;

GRISTMILL_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
GRISTMILL_INLINE Ints load_ints(const void* p) { return _mm512_load_si512(p); }
GRISTMILL_INLINE Ints set1_ints(int32_t x) { return _mm512_set1_epi32(x); }
GRISTMILL_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
GRISTMILL_INLINE Ints sub_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
GRISTMILL_INLINE Ints times_16(Ints a) { return _mm512_slli_epi32(a, 4); }
// a in 0..255, b within 16 bits (a group's sum is at most 128 * 127): one instruction where mullo takes two
GRISTMILL_INLINE Ints multiply_words(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
#if GRISTMILL_VNNI
GRISTMILL_INLINE Ints widen_words(Ints a) { return a; }
// In place by force: compilers copy accumulators from register to register in the middle of the loop.
GRISTMILL_INLINE Ints accumulate(Ints sum, Ints w, Ints a) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(a));
  return sum;
}
#else
// Sums of 16 bits, one output in each pair, to 32.
GRISTMILL_INLINE Ints widen_words(Ints a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
GRISTMILL_INLINE Ints accumulate(Ints sum, Ints w, Ints a) {
  return _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, a));
}
#endif
GRISTMILL_INLINE Ints broadcast_quad(const int8_t* a) {
  int32_t quad;
  std::memcpy(&quad, a, 4);
  return _mm512_set1_epi32(quad);
}

GRISTMILL_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
GRISTMILL_INLINE Floats set1_floats(float x) { return _mm512_set1_ps(x); }
GRISTMILL_INLINE Floats load_floats(const float* p) { return _mm512_load_ps(p); }
GRISTMILL_INLINE Floats mul_floats(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
GRISTMILL_INLINE Floats fma_floats(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

GRISTMILL_INLINE __mmask16 lanes_before(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}
GRISTMILL_INLINE Floats load_some(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(lanes_before(count), p);
}
GRISTMILL_INLINE void store_some(float* p, Floats a, int64_t count) {
  _mm512_mask_storeu_ps(p, lanes_before(count), a);
}

// 4 added to the bytes whose bit is set; they hold 0..3.
GRISTMILL_INLINE __m256i add_third_bits(__m256i low, uint32_t bits) {
  return _mm256_mask_add_epi8(low, bits, low, _mm256_set1_epi8(4));
}
