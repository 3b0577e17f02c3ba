// 8-bit floats (e4m3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities, 448 is the
// largest) and exact conversions in plain C++.
#pragma once
#include <cstdint>

#include "half.h"

namespace gristmill {

struct fp8 {
  uint8_t bits;
};

inline float to_float(fp8 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x80) << 24, magnitude = h.bits & 0x7f;
  if (magnitude == 0x7f) return float_of(sign | 0x7fc00000);
  if (magnitude < 8) {  // zero and subnormals: mantissa * 2^-9, exact in float32
    return float_of(bits_of(static_cast<float>(magnitude) * 0.001953125f) | sign);
  }
  return float_of(sign | ((magnitude << 20) + 0x3c000000));
}

// Round to nearest even; beyond 448 gives 448.
inline fp8 to_fp8(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint8_t>(sign | 0x7f)};
  if (magnitude >= 0x43e00000) return {static_cast<uint8_t>(sign | 0x7e)};
  if (magnitude < 0x3c800000) {  // subnormal: adding 2^14 lines the mantissa up with the 2^-9 grid and rounds
    return {static_cast<uint8_t>(sign | (bits_of(float_of(magnitude) + 16384.f) - 0x46800000))};
  }
  const uint32_t odd = magnitude >> 20 & 1;
  return {static_cast<uint8_t>(sign | ((magnitude - 0x3c000000 + 0x7ffff + odd) >> 20))};
}

}  // namespace gristmill
