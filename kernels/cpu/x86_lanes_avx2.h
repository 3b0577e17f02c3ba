// Registers whose lanes are outputs, AVX2. Included inside an anonymous namespace.
constexpr int kIntLanes = 8;
constexpr int kRowTile = 4;
constexpr int kDecodeRows = 8;

using Ints = __m256i;
using Floats = __m256;

GRISTMILL_INLINE Ints zero_ints() { return _mm256_setzero_si256(); }
GRISTMILL_INLINE Ints load_ints(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
GRISTMILL_INLINE Ints set1_ints(int32_t x) { return _mm256_set1_epi32(x); }
GRISTMILL_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
GRISTMILL_INLINE Ints sub_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
GRISTMILL_INLINE Ints times_16(Ints a) { return _mm256_slli_epi32(a, 4); }
// a in 0..255, b within 16 bits (a group's sum is at most 128 * 127): one instruction where mullo takes two
GRISTMILL_INLINE Ints multiply_words(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
// Sums of 16 bits, one output in each pair, to 32.
GRISTMILL_INLINE Ints widen_words(Ints a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
GRISTMILL_INLINE Ints accumulate(Ints sum, Ints w, Ints a) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, a));
}
GRISTMILL_INLINE Ints broadcast_quad(const int8_t* a) {
  int32_t quad;
  std::memcpy(&quad, a, 4);
  return _mm256_set1_epi32(quad);
}

GRISTMILL_INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
GRISTMILL_INLINE Floats set1_floats(float x) { return _mm256_set1_ps(x); }
GRISTMILL_INLINE Floats load_floats(const float* p) { return _mm256_load_ps(p); }
GRISTMILL_INLINE Floats mul_floats(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
GRISTMILL_INLINE Floats fma_floats(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

GRISTMILL_INLINE Ints lanes_before(int64_t count) {
  const int limit = static_cast<int>(std::max<int64_t>(std::min<int64_t>(count, 8), 0));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GRISTMILL_INLINE Floats load_some(const float* p, int64_t count) {
  return count >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, lanes_before(count));
}
GRISTMILL_INLINE void store_some(float* p, Floats a, int64_t count) {
  if (count >= 8) _mm256_storeu_ps(p, a);
  else _mm256_maskstore_ps(p, lanes_before(count), a);
}

// 4 added to the bytes whose bit is set; they hold 0..3.
GRISTMILL_INLINE __m256i add_third_bits(__m256i low, uint32_t bits) {
  const __m256i from = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i own = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits)), from);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own);
  return _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(4)));
}
