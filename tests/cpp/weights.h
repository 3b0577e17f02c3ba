// Random weights of every format that has scales, read back bit by bit as the artifact's description has it, and
// activations to go with them.
#pragma once
#include "check.h"

namespace gristmill {

inline std::string name_of(Format format) {
  switch (format) {
    case Format::f32: return "f32";
    case Format::f16: return "f16";
    case Format::bf16: return "bf16";
    case Format::fp8: return "fp8";
    case Format::int8: return "int8";
    case Format::int4: return "int4";
    case Format::int3: return "int3";
    case Format::int2: return "int2";
  }
  return "";
}

inline int block_size(Format format) {  // bytes of 64 columns
  switch (format) {
    case Format::int4: return 32;
    case Format::int3: return 24;
    case Format::int2: return 16;
    default: return 64;
  }
}

// e4m3 by its definition; the two NaNs count as 480.
inline float e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return static_cast<float>(code & 0x80 ? -size : size);
}

struct StoredMatrix {
  Matrix matrix;
  Buffer<uint8_t> data, zero;
  Buffer<f16> half_scale;
  Buffer<float> float_scale;
  std::string name;

  int value(int64_t n, int64_t c) const {
    const int64_t size = block_size(matrix.format), row = (matrix.k + 63) / 64 * size, i = c % 64;
    const uint8_t* block = data.data() + n * row + c / 64 * size;
    switch (matrix.format) {
      case Format::int4: return i < 32 ? block[i] & 15 : block[i - 32] >> 4;
      case Format::int3: return (block[i % 16] >> i / 16 * 2 & 3) + 4 * (block[16 + i / 8] >> i % 8 & 1);
      case Format::int2: return block[i % 16] >> i / 16 * 2 & 3;
      default: return static_cast<int8_t>(block[i]);
    }
  }
  int zero_of(int64_t n, int64_t g) const {
    const int64_t groups = matrix.groups();
    if (matrix.format == Format::int8) return matrix.symmetric ? 0 : static_cast<int8_t>(zero[n * groups + g]);
    if (matrix.symmetric) return matrix.format == Format::int4 ? 8 : matrix.format == Format::int3 ? 4 : 2;
    return zero[n * ((groups + 1) / 2) + g / 2] >> (g % 2 ? 4 : 0) & 15;
  }
  float scale_of(int64_t n, int64_t g) const {
    const int64_t at = n * matrix.groups() + g;
    return matrix.scale_is_f32 ? float_scale[at] : to_float(half_scale[at]);
  }
  // The weight as float32; what it is multiplied with is exact or rounded once.
  float weight(int64_t n, int64_t c) const {
    const int64_t g = matrix.group ? c / matrix.group : 0;
    if (matrix.format == Format::fp8) return scale_of(n, g) * e4m3(data[n * ((matrix.k + 63) / 64 * 64) + c]);
    return scale_of(n, g) * static_cast<float>(value(n, c) - zero_of(n, g));
  }
};

// Rows of the extremes among the random ones: int8 of -128, all bits set elsewhere.
inline void fill_values(StoredMatrix& w) {
  const int64_t n = w.matrix.n, k = w.matrix.k, row = (k + 63) / 64 * block_size(w.matrix.format);
  w.data = Buffer<uint8_t>(n * row);
  for (int64_t i = 0; i < w.data.size(); i++) w.data[i] = static_cast<uint8_t>(random_bits());
  if (is_unsigned(w.matrix.format)) {
    if (n > 1) std::fill(w.data.data(), w.data.data() + row, uint8_t{0xff});
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    uint8_t* at = w.data.data() + i * row;
    if (i % 3 == 0 && w.matrix.format == Format::int8) std::fill(at, at + k, uint8_t{0x80});
    std::fill(at + k, at + row, uint8_t{0});
  }
}

inline void fill_scales(StoredMatrix& w) {
  const int64_t groups = w.matrix.groups(), n = w.matrix.n;
  const bool single = w.matrix.scale_is_f32;
  w.half_scale = Buffer<f16>(single ? 0 : n * groups);
  w.float_scale = Buffer<float>(single ? n * groups : 0);
  for (int64_t i = 0; i < n * groups; i++) {
    const float scale = normal() * 0.02f;
    if (single) w.float_scale[i] = scale;
    else w.half_scale[i] = to_f16(scale);
  }
  if (w.matrix.symmetric) return;
  w.zero = Buffer<uint8_t>(w.matrix.format == Format::int8 ? n * groups : n * ((groups + 1) / 2));
  for (int64_t i = 0; i < w.zero.size(); i++) w.zero[i] = static_cast<uint8_t>(random_bits());
}

inline StoredMatrix scaled_weights(Format format, int64_t n, int64_t k, int64_t group, bool symmetric,
                              bool scale_is_f32) {
  StoredMatrix w;
  w.matrix.format = format;
  w.matrix.n = n;
  w.matrix.k = k;
  w.matrix.group = group >= k ? 0 : group;
  w.matrix.symmetric = symmetric;
  w.matrix.scale_is_f32 = scale_is_f32;
  fill_values(w);
  fill_scales(w);
  w.matrix.data = w.data.data();
  w.matrix.zero = symmetric ? nullptr : w.zero.data();
  w.matrix.scale = scale_is_f32 ? static_cast<const void*>(w.float_scale.data()) : w.half_scale.data();
  w.name = name_of(format) + " n" + std::to_string(n) + " k" + std::to_string(k) + " g" + std::to_string(group) +
           (symmetric ? " sym" : " asym") + (scale_is_f32 ? " f32" : " f16");
  return w;
}

// ---- activations ----

struct Rows {
  QuantizedRows view;
  Buffer<int8_t> q;
  Buffer<float> scale;
  Buffer<int32_t> sum;
  Rows(int64_t rows, int64_t k, int64_t group) {
    view.k = k;
    view.group = group;
    q = Buffer<int8_t>(rows * view.kp());
    scale = Buffer<float>(rows * view.groups());
    sum = Buffer<int32_t>(rows * view.groups());
    view.q = q.data();
    view.scale = scale.data();
    view.sum = sum.data();
  }
};

inline void reference_quantize(const float* x, int64_t ldx, int64_t rows, QuantizedRows& out) {
  for (int64_t t = 0; t < rows; t++) {
    for (int64_t g = 0; g < out.groups(); g++) {
      const int64_t begin = g * out.group, end = std::min(begin + out.group, out.k);
      float amax = 0;
      for (int64_t c = begin; c < end; c++) amax = std::max(amax, std::fabs(x[t * ldx + c]));
      const float inverse = amax > 0 ? 127.f / amax : 0.f;
      int32_t sum = 0;
      for (int64_t c = begin; c < end; c++) {
        const float scaled = x[t * ldx + c] * inverse;
        sum += out.q[t * out.kp() + c] = static_cast<int8_t>(std::nearbyint(scaled));
      }
      out.scale[t * out.groups() + g] = amax / 127.f;
      out.sum[t * out.groups() + g] = sum;
    }
  }
}

// Rows with a group of zeros and rows where every column is +-amax.
inline Buffer<float> activations(int64_t rows, int64_t k, int64_t ldx) {
  Buffer<float> x(rows * ldx);
  for (int64_t t = 0; t < rows; t++) {
    for (int64_t c = 0; c < k; c++) {
      const bool extreme = t % 4 == 1, empty = t % 3 == 2 && c < 128;
      x[t * ldx + c] = empty ? 0.f : extreme ? (random_bits() % 8 ? 3.f : -3.f) : normal();
    }
  }
  return x;
}

}  // namespace gristmill
