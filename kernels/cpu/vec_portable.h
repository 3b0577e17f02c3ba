// Sixteen float lanes in plain C++. Included inside one file's anonymous namespace; vec_avx2.h and
// vec_avx512.h offer the same operations.
//
// Every kernel in float32 is written once over Vec. Lanes, order of operations and rounding are the same for
// every instruction set, so results are the same bits everywhere. For that one rule holds in all kernels: a
// product that enters a sum goes through fma(), because compilers would fuse it on some machines only.
constexpr int kLanes = 16;
constexpr bool kManyRegisters = false;
constexpr const char* kName = "portable";

struct Vec {
  float lane[kLanes];
};

template <typename F>
GRISTMILL_INLINE Vec each(F f) {
  Vec out;
  for (int i = 0; i < kLanes; i++) out.lane[i] = f(i);
  return out;
}

GRISTMILL_INLINE Vec set1(float x) {
  return each([&](int) { return x; });
}
GRISTMILL_INLINE Vec set1(f16 x) { return set1(to_float(x)); }
GRISTMILL_INLINE Vec iota() {
  return each([](int i) { return static_cast<float>(i); });
}
GRISTMILL_INLINE Vec load(const float* p) {
  return each([&](int i) { return p[i]; });
}
GRISTMILL_INLINE Vec load(const f16* p) {
  return each([&](int i) { return to_float(p[i]); });
}
GRISTMILL_INLINE Vec load(const bf16* p) {
  return each([&](int i) { return to_float(p[i]); });
}
GRISTMILL_INLINE Vec load(const scaled_fp8* p) {
  return each([&](int i) { return to_float(p[i]); });
}
// 32 e4m3 numbers times 2^-8 as f16.
GRISTMILL_INLINE void store_halves(const scaled_fp8* p, f16* out) {
  for (int i = 0; i < 32; i++) out[i] = to_f16(p[i]);
}
GRISTMILL_INLINE Vec load(const int8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
GRISTMILL_INLINE Vec load(const fp8* p) {
  return each([&](int i) { return to_float(p[i]); });
}
// 16 nibbles of 8 bytes, the low one of each byte first, as 0 to 15.
GRISTMILL_INLINE Vec load_nibbles(const uint8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i / 2] >> i % 2 * 4 & 15); });
}
// Two f16 side by side, at any address.
struct Two {
  float first, second;
};
GRISTMILL_INLINE Two two_halves(const char* p) {
  f16 both[2];
  std::memcpy(both, p, sizeof both);
  return {to_float(both[0]), to_float(both[1])};
}

GRISTMILL_INLINE void store(float* p, Vec a) {
  for (int i = 0; i < kLanes; i++) p[i] = a.lane[i];
}
GRISTMILL_INLINE void store(f16* p, Vec a) {
  for (int i = 0; i < kLanes; i++) p[i] = to_f16(a.lane[i]);
}
// Rounds to nearest even; lanes are within +-127, or not a number (then any value).
GRISTMILL_INLINE void store(int8_t* p, Vec a) {
  for (int i = 0; i < kLanes; i++) {
    p[i] = a.lane[i] > -127.5f && a.lane[i] < 127.5f ? static_cast<int8_t>(__builtin_nearbyintf(a.lane[i]))
                                                     : int8_t{-128};
  }
}

GRISTMILL_INLINE Vec add(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
GRISTMILL_INLINE Vec sub(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
GRISTMILL_INLINE Vec mul(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
GRISTMILL_INLINE Vec div(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
GRISTMILL_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
// The second operand wins when either is not a number, as the instructions of x86 have it.
GRISTMILL_INLINE Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
GRISTMILL_INLINE Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
GRISTMILL_INLINE Vec in_register(Vec a) { return a; }
GRISTMILL_INLINE Vec abs(Vec a) {
  return each([&](int i) { return float_of(bits_of(a.lane[i]) & 0x7fffffff); });
}
GRISTMILL_INLINE Vec copysign(Vec a, Vec sign) {
  return each([&](int i) {
    return float_of((bits_of(a.lane[i]) & 0x7fffffff) | (bits_of(sign.lane[i]) & 0x80000000));
  });
}
// a < b ? x : y
GRISTMILL_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
}
// 2^n where the low bits of t hold n (t = n + 1.5 * 2^23).
GRISTMILL_INLINE Vec power_of_two(Vec t) {
  return each([&](int i) { return float_of((bits_of(t.lane[i]) << 23) + 0x3f800000); });
}
// x * 2^n, where t = n + 1.5 * 2^23 and the result is no subnormal.
GRISTMILL_INLINE Vec times_power_of_two(Vec x, Vec, Vec t) { return mul(x, power_of_two(t)); }

// The fixed tree: i + (i + 8), then + 4, + 2, + 1.
GRISTMILL_INLINE float reduce_add(Vec a) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) a.lane[i] += a.lane[i + half];
  }
  return a.lane[0];
}
GRISTMILL_INLINE float reduce_max(Vec a) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) a.lane[i] = a.lane[i] > a.lane[i + half] ? a.lane[i] : a.lane[i + half];
  }
  return a.lane[0];
}
GRISTMILL_INLINE float first(Vec a) { return a.lane[0]; }
GRISTMILL_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
GRISTMILL_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
// What lies ahead in a stream of weights that is read at `at`.
GRISTMILL_INLINE void prefetch_stream(const void* at, bool) { prefetch(static_cast<const char*>(at) + 384); }

// What a machine's registers hold of a Vec; here all of it.
using Register = Vec;
constexpr int kRegisterLanes = kLanes;
GRISTMILL_INLINE Register zero_register() { return set1(0.f); }
GRISTMILL_INLINE Register load_register(const float* p) { return load(p); }
// Stores the registers of a Vec `step` floats apart.
GRISTMILL_INLINE void store_registers(float* p, int64_t, Vec a) { store(p, a); }
// Lane i: reduce_add of the sixteen floats from p + 16 i on.
GRISTMILL_INLINE Vec reduce_add_16(const float* p) {
  return each([&](int i) { return reduce_add(load(p + kLanes * i)); });
}

// out[i * ld + j] = row[j][i] for 16 rows of 16.
template <typename T>
GRISTMILL_INLINE void transpose_16x16(const T* const* row, int64_t column, float* out, int64_t ld) {
  for (int j = 0; j < kLanes; j++) {
    const Vec a = load(row[j] + column);
    for (int i = 0; i < kLanes; i++) out[i * ld + j] = a.lane[i];
  }
}

// ---- products of bytes with numbers of sixteen bits, four at a time ----
//
// A quad is four unsigned bytes in one 32-bit lane; a Factor is what four numbers within +-kQuadLimit become to
// meet them. Sums are exact while they fit 32 bits.
struct Quads {
  const uint8_t* bytes;
};
struct Factor {
  int16_t number[4];
};
using Factors = Factor;  // in front of every lane
constexpr float kFactorMagic = 12582912.f;  // adding it rounds to an integer, which is in the low bits then
struct QuadSum {
  int32_t lane[kLanes];
};
GRISTMILL_INLINE Quads load_quads(const char* p) { return {reinterpret_cast<const uint8_t*>(p)}; }
GRISTMILL_INLINE QuadSum no_quads() { return {}; }
GRISTMILL_INLINE Factors spread_factor(const Factor* factor) { return *factor; }
GRISTMILL_INLINE void add_quads(QuadSum& sum, const Quads& quads, const Factors& factors) {
  for (int i = 0; i < kLanes; i++) {
    for (int n = 0; n < 4; n++) sum.lane[i] += quads.bytes[4 * i + n] * factors.number[n];
  }
}
GRISTMILL_INLINE Vec to_float(const QuadSum& sum) {
  return each([&](int i) { return static_cast<float>(sum.lane[i]); });
}
// a * unit, rounded to nearest even; numbers within +-32639. Of what is not a number any factor is made.
GRISTMILL_INLINE void store_factors(Factor* p, Vec a, Vec unit) {
  const Vec rounded = fma(a, unit, set1(kFactorMagic));
  for (int i = 0; i < kLanes; i++)
    p[i / 4].number[i % 4] = static_cast<int16_t>(static_cast<uint16_t>(bits_of(rounded.lane[i])));
}
