// 16-bit and 8-bit floats: storage types and exact conversions in plain C++. Vector code converts with instructions
// that give the same bits.
#pragma once
#include <cstdint>
#include <cstring>

// For functions over registers: a call would send them through memory.
#define GRISTMILL_INLINE inline __attribute__((always_inline))
#define GRISTMILL_APART inline __attribute__((noinline))  // spares the registers of the loops around it
// Loops over arrays of registers must vanish, at any level of optimization.
#if defined(__clang__)
#define GRISTMILL_UNROLL _Pragma("unroll")
#else
#define GRISTMILL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace gristmill {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
// An e4m3 number times 2^-8: its seven lower bits are those of an f16 with another bias, subnormals too, which
// makes reading it two operations and a conversion. The two NaNs, which nobody writes, count as 480.
struct scaled_fp8 {
  uint8_t bits;
};
constexpr float kFp8Unit = 256.f;

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(bf16 h) { return float_of(static_cast<uint32_t>(h.bits) << 16); }

inline float to_float(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float32
    return float_of(bits_of(static_cast<float>(mantissa) * 5.9604644775390625e-8f) | sign);
  }
  if (exponent == 31) {  // a signaling NaN comes back quiet, as the conversion instruction does it
    return float_of(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
  }
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline f16 to_f16(scaled_fp8 x) {
  return {static_cast<uint16_t>((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7)};
}
inline float to_float(scaled_fp8 x) { return to_float(to_f16(x)); }

// Round to nearest even; overflow gives infinity.
inline f16 to_f16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 1023))};
  if (magnitude >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 lines the mantissa up with the 2^-24 grid and rounds
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000))};
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13))};
}

}  // namespace gristmill
