// Products with rows of floats, and weights of every format back to floats.
#include "weights.h"

using namespace gristmill;

namespace {

struct FloatWeights {
  Matrix matrix;
  Buffer<uint8_t> data;
  float value(int64_t n, int64_t c) const {
    const int64_t at = n * matrix.k + c;
    if (matrix.format == Format::f32) return reinterpret_cast<const float*>(data.data())[at];
    if (matrix.format == Format::f16) return to_float(reinterpret_cast<const f16*>(data.data())[at]);
    return to_float(reinterpret_cast<const bf16*>(data.data())[at]);
  }
};

FloatWeights float_weights(Format format, int64_t n, int64_t k) {
  FloatWeights w;
  w.matrix.format = format;
  w.matrix.n = n;
  w.matrix.k = k;
  w.data = Buffer<uint8_t>(n * w.matrix.row_bytes());
  for (int64_t i = 0; i < n * k; i++) {
    const float value = normal();
    if (format == Format::f32) reinterpret_cast<float*>(w.data.data())[i] = value;
    if (format == Format::f16) reinterpret_cast<f16*>(w.data.data())[i] = to_f16(value);
    if (format == Format::bf16)
      reinterpret_cast<bf16*>(w.data.data())[i] = {static_cast<uint16_t>(bits_of(value) >> 16)};
  }
  w.matrix.data = w.data.data();
  return w;
}

float reference_dot(const FloatWeights& w, int64_t n, const float* x) {
  float sum[16] = {};
  for (int64_t c = 0; c < w.matrix.k; c++) sum[c % 16] = std::fma(w.value(n, c), x[c], sum[c % 16]);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) sum[i] += sum[i + half];
  }
  return sum[0];
}

Buffer<float> reference_product(const FloatWeights& w, const Buffer<float>& x, int64_t ldx, int64_t rows) {
  const int64_t n = w.matrix.n, k = w.matrix.k;
  Buffer<float> y(rows * n);
  for (int64_t t = 0; t < rows; t++) {
    for (int64_t i = 0; i < n; i++) {
      y[t * n + i] = reference_dot(w, i, x.data() + t * ldx);
      double exact = 0, size = 0;
      for (int64_t c = 0; c < k; c++) {
        exact += static_cast<double>(w.value(i, c)) * x[t * ldx + c];
        size += std::fabs(static_cast<double>(w.value(i, c)) * x[t * ldx + c]);
      }
      check_near("reference of a float product", y[t * n + i], exact, 1e-6 * size);
    }
  }
  return y;
}

// Products of `w`, all of it or without its first rows, with one row of x or more: the same bits everywhere.
void test_product(const std::string& name, const Matrix& w, const Buffer<float>& x, int64_t ldx, int64_t rows,
                  const Buffer<float>& expected) {
  for (const Kernels* kernels : all_kernels()) {
    Buffer<uint8_t> scratch(static_cast<int64_t>(kernels->product_scratch_bytes(w.k)));
    for (int64_t count : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 19, 140}) {
      if (count > rows) break;
      const int64_t n0 = count % 2 ? 0 : w.n / 3, ldy = w.n - n0 + 2;
      Buffer<float> y(count * ldy - 2);
      kernels->product_float(w, x.data(), ldx, count, n0, w.n, y.data(), ldy, scratch.data());
      for (int64_t t = 0; t < count; t++) {
        check_equal(std::string(kernels->name) + " float product " + name + " rows" + std::to_string(count),
                    y.data() + t * ldy, expected.data() + t * w.n + n0, w.n - n0);
      }
    }
  }
}

void test_float_product(Format format, int64_t n, int64_t k, int64_t rows) {
  const int64_t ldx = k + 1;
  const FloatWeights w = float_weights(format, n, k);
  const Buffer<float> x = activations(rows, k, ldx);
  test_product(name_of(format) + " n" + std::to_string(n) + " k" + std::to_string(k), w.matrix, x, ldx, rows,
               reference_product(w, x, ldx, rows));
}

// Weights with scales times floats are the floats they stand for, times floats.
void test_widened_product(const StoredMatrix& w, int64_t rows) {
  const int64_t n = w.matrix.n, k = w.matrix.k, ldx = k + 1;
  const Buffer<float> x = activations(rows, k, ldx);
  FloatWeights wide = float_weights(Format::f32, n, k);
  for (int64_t i = 0; i < n * k; i++)
    reinterpret_cast<float*>(wide.data.data())[i] = w.weight(i / k, i % k);
  test_product(w.name, w.matrix, x, ldx, rows, reference_product(wide, x, ldx, rows));
}

// Rows past a multiple of what one pass takes, outputs past what has sums at a time, columns past a tile's.
void test_float_products() {
  for (const Format format : {Format::f32, Format::f16, Format::bf16}) {
    for (int64_t k : {1, 15, 31, 64, 172, 520, 2048}) test_float_product(format, uniform(1, 23), k, 19);
    test_float_product(format, 71, 1043, 9);
    test_float_product(format, 37, 530, 140);
  }
}

constexpr Format kScaled[] = {Format::fp8, Format::int8, Format::int4, Format::int3, Format::int2};

void test_widened_products() {
  for (const Format format : kScaled) {
    for (int64_t group : {32, 64, 128, 0}) {
      for (int64_t k : {1, 31, 64, 172, 600}) {
        const bool symmetric = format == Format::fp8 || group == 32;
        test_widened_product(scaled_weights(format, uniform(1, 23), k, group, symmetric, group == 64), 9);
      }
    }
    test_widened_product(scaled_weights(format, 37, 700, 32, format == Format::fp8, false), 140);
  }
}

void test_dequantize(const Kernels& kernels) {
  for (const Format format : kScaled) {
    for (int64_t group : {32, 128, 0}) {
      const bool symmetric = format == Format::fp8 || group == 32;
      const StoredMatrix w = scaled_weights(format, 5, 172, group, symmetric, false);
      Buffer<float> out(172), expected(172);
      for (int64_t n = 0; n < 5; n++) {
        kernels.dequantize_row(w.matrix, n, 2.f, out.data());
        for (int64_t c = 0; c < 172; c++) expected[c] = 2.f * w.weight(n, c);
        check_equal(std::string(kernels.name) + " dequantize " + w.name, out.data(), expected.data(), 172);
      }
    }
  }
  for (const Format format : {Format::f32, Format::f16, Format::bf16}) {
    const FloatWeights w = float_weights(format, 3, 37);
    Buffer<float> out(37);
    kernels.dequantize_row(w.matrix, 2, 0.5f, out.data());
    for (int64_t c = 0; c < 37; c++)
      check_near(std::string(kernels.name) + " widen", out[c], 0.5f * w.value(2, c), 0, c);
  }
}

void test_halves() {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const f16 h{static_cast<uint16_t>(bits)};
    const float value = to_float(h);
    if (value == value) check_near("f16 round trip", to_f16(value).bits, bits, 0, bits);
  }
  for (const Kernels* kernels :
       all_kernels()) {  // conversions of every instruction set against the plain ones
    Buffer<f16> all(65536);
    for (int i = 0; i < 65536; i++) all[i] = {static_cast<uint16_t>(i)};
    Matrix w;
    w.format = Format::f16;
    w.n = 1;
    w.k = 65536;
    w.data = all.data();
    Buffer<float> out(65536), expected(65536);
    kernels->dequantize_row(w, 0, 1.f, out.data());
    for (int i = 0; i < 65536; i++) expected[i] = to_float(all[i]);
    check_equal(std::string(kernels->name) + " f16", out.data(), expected.data(), 65536);
  }
}

void test_fp8_codes() {
  for (const Kernels* kernels : all_kernels()) {
    Buffer<uint8_t> all(256);
    for (int i = 0; i < 256; i++) all[i] = static_cast<uint8_t>(i);
    const float one = 1;
    Matrix w;
    w.format = Format::fp8;
    w.n = 1;
    w.k = 256;
    w.data = all.data();
    w.scale = &one;
    w.scale_is_f32 = true;
    Buffer<float> out(256), expected(256);
    kernels->dequantize_row(w, 0, 1.f, out.data());
    for (int i = 0; i < 256; i++) expected[i] = e4m3(static_cast<uint8_t>(i));
    check_equal(std::string(kernels->name) + " fp8", out.data(), expected.data(), 256);
  }
}

}  // namespace

int main() {
  test_halves();
  test_fp8_codes();
  for (const Kernels* kernels : all_kernels()) test_dequantize(*kernels);
  test_float_products();
  test_widened_products();
  return report();
}
