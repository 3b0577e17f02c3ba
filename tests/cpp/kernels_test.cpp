// Holds every instruction set of kernels/cpu to naive references: bitwise where the contract says bitwise,
// else within a tolerance written beside the check. Buffers have exactly the sizes an artifact gives them, so
// that an address sanitizer sees every read outside. Build: g++ -std=c++17 -O2 -I kernels/cpu
// tests/cpp/kernels_test.cpp kernels/cpu/*.cpp
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fp8.h"
#include "half.h"
#include "kernels.h"

using namespace gristmill;

namespace {

int failures = 0;
long checks = 0;
std::mt19937 random_bits(7);

int uniform(int low, int high) {
  return low + static_cast<int>(random_bits() % static_cast<unsigned>(high - low + 1));
}
float normal() { return std::normal_distribution<float>()(random_bits); }

// Exactly `count` elements, 64-byte aligned as in the artifact and the arena; freed with the vector.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : count_(count), data_(allocate(count), std::free) {
    if (count) std::memset(static_cast<void*>(data_.get()), 0, static_cast<size_t>(count) * sizeof(T));
  }
  T* data() const { return data_.get(); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static T* allocate(int64_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, std::max<size_t>(static_cast<size_t>(count) * sizeof(T), 1))) std::abort();
    return static_cast<T*>(p);
  }
  int64_t count_;
  std::shared_ptr<T> data_;
};

Buffer<float> random_floats(int64_t count) {
  Buffer<float> out(count);
  for (int64_t i = 0; i < count; i++) out[i] = normal();
  return out;
}

void fail(const std::string& what, int64_t index, double got, double expected) {
  if (failures++ < 40)
    std::printf("FAIL %s [%ld]: got %.9g expected %.9g\n", what.c_str(), static_cast<long>(index), got,
                expected);
}

void check_equal(const std::string& what, const float* got, const float* expected, int64_t count) {
  checks++;
  for (int64_t i = 0; i < count; i++) {
    if (bits_of(got[i]) != bits_of(expected[i])) return fail(what + " bits", i, got[i], expected[i]);
  }
}

void check_near(const std::string& what, double got, double expected, double tolerance, int64_t index = 0) {
  checks++;
  if (!(std::fabs(got - expected) <= tolerance)) fail(what, index, got, expected);
}

std::vector<const Kernels*> all_kernels() {
  int count = 0;
  const Kernels* const* list = available_kernels(&count);
  return {list, list + count};
}

// ---- weights ----

struct Weights {
  Matrix matrix;
  Buffer<uint8_t> data, zero;
  Buffer<f16> half_scale;
  Buffer<float> float_scale;
  std::string name;
  int value(int64_t n, int64_t c) const {
    if (matrix.format == Format::int8) return static_cast<int8_t>(data[n * matrix.row_bytes() + c]);
    const int byte = data[n * matrix.row_bytes() + c / 64 * 32 + c % 32];
    return c % 64 < 32 ? byte & 15 : byte >> 4;
  }
  int zero_of(int64_t n, int64_t g) const {
    if (matrix.symmetric) return matrix.format == Format::int4 ? 8 : 0;
    if (matrix.format == Format::int8) return static_cast<int8_t>(zero[n * matrix.groups() + g]);
    const int byte = zero[n * ((matrix.groups() + 1) / 2) + g / 2];
    return g % 2 ? byte >> 4 : byte & 15;
  }
  float scale_of(int64_t n, int64_t g) const {
    const int64_t at = n * matrix.groups() + g;
    return matrix.scale_is_f32 ? float_scale[at] : to_float(half_scale[at]);
  }
};

Weights integer_weights(Format format, int64_t n, int64_t k, int64_t group, bool symmetric,
                        bool scale_is_f32) {
  Weights w;
  w.matrix.format = format;
  w.matrix.n = n;
  w.matrix.k = k;
  w.matrix.group = group >= k ? 0 : group;
  w.matrix.symmetric = symmetric;
  w.matrix.scale_is_f32 = scale_is_f32;
  const int64_t groups = w.matrix.groups();
  w.data = Buffer<uint8_t>(n * w.matrix.row_bytes());
  for (int64_t i = 0; i < w.data.size(); i++) w.data[i] = static_cast<uint8_t>(random_bits());
  if (format == Format::int8) {
    for (int64_t i = 0; i < n; i++) {
      uint8_t* row = w.data.data() + i * w.matrix.row_bytes();
      if (i % 3 == 0) std::fill(row, row + k, uint8_t{0x80});  // -128 everywhere: the largest sums
      std::fill(row + k, row + w.matrix.row_bytes(), uint8_t{0});
    }
  } else if (n > 1) {
    std::fill(w.data.data(), w.data.data() + w.matrix.row_bytes(), uint8_t{0xff});
  }
  w.half_scale = Buffer<f16>(scale_is_f32 ? 0 : n * groups);
  w.float_scale = Buffer<float>(scale_is_f32 ? n * groups : 0);
  for (int64_t i = 0; i < n * groups; i++) {
    const float scale = std::fabs(normal()) * 0.02f;
    if (scale_is_f32) w.float_scale[i] = scale;
    else w.half_scale[i] = to_f16(scale);
  }
  w.zero = Buffer<uint8_t>(symmetric ? 0 : format == Format::int8 ? n * groups : n * ((groups + 1) / 2));
  for (int64_t i = 0; i < w.zero.size(); i++) w.zero[i] = static_cast<uint8_t>(random_bits());
  w.matrix.data = w.data.data();
  w.matrix.zero = symmetric ? nullptr : w.zero.data();
  w.matrix.scale = scale_is_f32 ? static_cast<const void*>(w.float_scale.data()) : w.half_scale.data();
  w.name = std::string(format == Format::int8 ? "int8" : "int4") + " n" + std::to_string(n) + " k" +
           std::to_string(k) + " g" + std::to_string(group) + (symmetric ? " sym" : " asym") +
           (scale_is_f32 ? " f32" : " f16");
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

void reference_quantize(const float* x, int64_t ldx, int64_t rows, QuantizedRows& out) {
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
Buffer<float> activations(int64_t rows, int64_t k, int64_t ldx) {
  Buffer<float> x(rows * ldx);
  for (int64_t t = 0; t < rows; t++) {
    for (int64_t c = 0; c < k; c++) {
      const bool extreme = t % 4 == 1, empty = t % 3 == 2 && c < 128;
      x[t * ldx + c] = empty ? 0.f : extreme ? (random_bits() % 8 ? 3.f : -3.f) : normal();
    }
  }
  return x;
}

void test_quantize(const Kernels& kernels) {
  for (int64_t k : {1, 31, 64, 172, 200, 2048}) {
    for (int64_t group : {32, 64, 128}) {
      const int64_t rows = 7, ldx = k + 3;
      const Buffer<float> x = activations(rows, k, ldx);
      Rows got(rows, k, group), expected(rows, k, group);
      std::memset(got.q.data(), 55, static_cast<size_t>(got.q.size()));
      kernels.quantize_rows(x.data(), ldx, rows, got.view);
      reference_quantize(x.data(), ldx, rows, expected.view);
      const std::string what =
          std::string(kernels.name) + " quantize k" + std::to_string(k) + " g" + std::to_string(group);
      check_equal(what, got.scale.data(), expected.scale.data(), got.scale.size());
      for (int64_t i = 0; i < got.q.size(); i++) check_near(what, got.q[i], expected.q[i], 0, i);
      for (int64_t i = 0; i < got.sum.size(); i++)
        check_near(what + " sum", got.sum[i], expected.sum[i], 0, i);
    }
  }
}

// ---- integer product ----

// The contract, word for word.
Buffer<float> reference_product(const Weights& w, const QuantizedRows& x, int64_t rows) {
  Buffer<float> y(rows * w.matrix.n);
  for (int64_t t = 0; t < rows; t++) {
    for (int64_t n = 0; n < w.matrix.n; n++) {
      float acc = 0;
      for (int64_t g = 0; g < x.groups(); g++) {
        const int64_t begin = g * x.group, end = std::min(begin + x.group, x.k);
        const int64_t weight_group = w.matrix.group ? begin / w.matrix.group : 0;
        int32_t d = 0;
        for (int64_t c = begin; c < end; c++)
          d += (w.value(n, c) - w.zero_of(n, weight_group)) * x.q[t * x.kp() + c];
        acc = std::fma(static_cast<float>(d), w.scale_of(n, weight_group) * x.scale[t * x.groups() + g], acc);
      }
      y[t * w.matrix.n + n] = acc;
    }
  }
  return y;
}

void run_product(const Kernels& kernels, const Weights& w, const Rows& x, int64_t first, int64_t rows,
                 int64_t n0, int64_t n1, const Buffer<float>& expected) {
  const int64_t count = n1 - n0, ldy = count + 2;
  Buffer<float> y(rows * ldy - 2);
  Buffer<uint8_t> scratch(static_cast<int64_t>(kernels.product_scratch_bytes(w.matrix.k)));
  QuantizedRows part = x.view;
  part.q += first * part.kp();
  part.scale += first * part.groups();
  part.sum += first * part.groups();
  kernels.product_int(w.matrix, part, rows, n0, n1, y.data(), ldy, scratch.data());
  const std::string what = std::string(kernels.name) + " " + w.name + " act" + std::to_string(x.view.group) +
                           " rows" + std::to_string(rows) + " n" + std::to_string(n0) + ".." +
                           std::to_string(n1);
  for (int64_t t = 0; t < rows; t++) {
    check_equal(what + " row" + std::to_string(t), y.data() + t * ldy,
                expected.data() + (first + t) * w.matrix.n + n0, count);
  }
}

void test_product(const Weights& w, int64_t act_group) {
  const int64_t rows = 19, n = w.matrix.n, k = w.matrix.k;
  const Buffer<float> x = activations(rows, k, k);
  Rows quantized(rows, k, act_group);
  reference_quantize(x.data(), k, rows, quantized.view);
  const Buffer<float> expected = reference_product(w, quantized.view, rows);
  for (const Kernels* kernels : all_kernels()) {
    for (int64_t count : {1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 19}) {
      run_product(*kernels, w, quantized, uniform(0, static_cast<int>(rows - count)), count, 0, n, expected);
    }
    for (int64_t count : {1, 3, 7, 19}) {  // any range of outputs gives the same bits
      const int64_t n0 = uniform(0, static_cast<int>(n - 1)),
                    n1 = uniform(static_cast<int>(n0 + 1), static_cast<int>(n));
      run_product(*kernels, w, quantized, 0, count, n0, n1, expected);
    }
  }
}

void test_integer_products() {
  int turn = 0;
  for (int64_t k : {1, 31, 64, 130, 172, 200, 1216, 2048}) {
    for (int64_t group : {32, 64, 128, 0}) {
      for (const Format format : {Format::int4, Format::int8}) {
        for (int64_t act_group : {32, 64, 128}) {
          if (group && group % act_group) continue;
          for (const bool symmetric : {true, false}) {
            const int64_t n = k > 1000 ? uniform(17, 70) : 1 + 2 * (turn++ % 35);
            test_product(integer_weights(format, n, k, group, symmetric, uniform(0, 3) == 0), act_group);
          }
        }
      }
    }
  }
  test_product(integer_weights(Format::int4, 70, 5632, 128, true, false), 128);
  test_product(integer_weights(Format::int4, 33, 5632, 32, false, false), 32);
  test_product(integer_weights(Format::int8, 41, 5632, 0, false, true), 128);
  test_product(integer_weights(Format::int8, 33, 2048, 256, true, false), 64);
}

// ---- float product ----

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

void test_float_product(Format format, int64_t n, int64_t k) {
  const int64_t rows = 19, ldx = k + 1;
  const FloatWeights w = float_weights(format, n, k);
  const Buffer<float> x = activations(rows, k, ldx);
  Buffer<float> expected(rows * n);
  for (int64_t t = 0; t < rows; t++) {
    for (int64_t i = 0; i < n; i++) {
      expected[t * n + i] = reference_dot(w, i, x.data() + t * ldx);
      double exact = 0, size = 0;
      for (int64_t c = 0; c < k; c++) {
        exact += static_cast<double>(w.value(i, c)) * x[t * ldx + c];
        size += std::fabs(static_cast<double>(w.value(i, c)) * x[t * ldx + c]);
      }
      check_near("reference of a float product", expected[t * n + i], exact, 1e-6 * size);
    }
  }
  for (const Kernels* kernels : all_kernels()) {
    Buffer<uint8_t> scratch(static_cast<int64_t>(kernels->product_scratch_bytes(k)));
    for (int64_t count : {1, 2, 3, 4, 5, 8, 19}) {
      const int64_t n0 = count % 2 ? 0 : n / 3, ldy = n - n0;
      Buffer<float> y(count * ldy);
      kernels->product_float(w.matrix, x.data(), ldx, count, n0, n, y.data(), ldy, scratch.data());
      for (int64_t t = 0; t < count; t++) {
        check_equal(std::string(kernels->name) + " float product k" + std::to_string(k) + " rows" +
                        std::to_string(count),
                    y.data() + t * ldy, expected.data() + t * n + n0, ldy);
      }
    }
  }
}

// Integer weights times floats are the floats that dequantize_row gives, times floats.
void test_widened_product(Format format, int64_t n, int64_t k, int64_t group) {
  const Weights w = integer_weights(format, n, k, group, group == 32, false);
  const int64_t rows = 7;
  const Buffer<float> x = activations(rows, k, k);
  FloatWeights wide = float_weights(Format::f32, n, k);
  for (int64_t i = 0; i < n; i++)
    portable_kernels.dequantize_row(w.matrix, i, 1.f, reinterpret_cast<float*>(wide.data.data()) + i * k);
  for (const Kernels* kernels : all_kernels()) {
    Buffer<uint8_t> scratch(static_cast<int64_t>(kernels->product_scratch_bytes(k)));
    for (int64_t count : {1, 2, 7}) {
      Buffer<float> y(count * n), expected(n);
      kernels->product_float(w.matrix, x.data(), k, count, 0, n, y.data(), n, scratch.data());
      for (int64_t t = 0; t < count; t++) {
        for (int64_t i = 0; i < n; i++) expected[i] = reference_dot(wide, i, x.data() + t * k);
        check_equal(std::string(kernels->name) + " widened product " + w.name, y.data() + t * n, expected.data(), n);
      }
    }
  }
}

// ---- dequantize ----

void test_dequantize(const Kernels& kernels) {
  for (const Format format : {Format::int4, Format::int8}) {
    for (int64_t group : {32, 128, 0}) {
      const Weights w = integer_weights(format, 5, 172, group, group == 32, false);
      Buffer<float> out(172);
      for (int64_t n = 0; n < 5; n++) {
        kernels.dequantize_row(w.matrix, n, 2.f, out.data());
        for (int64_t c = 0; c < 172; c++) {
          const int64_t g = w.matrix.group ? c / w.matrix.group : 0;
          const float expected =
              2.f * (w.scale_of(n, g) * static_cast<float>(w.value(n, c) - w.zero_of(n, g)));
          check_equal(std::string(kernels.name) + " dequantize " + w.name, &out[c], &expected, 1);
        }
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

// ---- norms, epilogue, rope ----

void test_norms(const Kernels& kernels) {
  for (int64_t width : {1, 15, 16, 64, 100, 2048}) {
    const Buffer<float> x = random_floats(width), weight = random_floats(width), bias = random_floats(width),
                        residual = random_floats(width);
    Buffer<float> out(width), same(width);
    double mean = 0, square = 0, variance = 0;
    for (int64_t i = 0; i < width; i++) mean += x[i] / static_cast<double>(width);
    for (int64_t i = 0; i < width; i++)
      square += static_cast<double>(x[i]) * x[i] / static_cast<double>(width);
    for (int64_t i = 0; i < width; i++)
      variance += (x[i] - mean) * (x[i] - mean) / static_cast<double>(width);
    for (int options = 0; options < 8; options++) {
      const float *w = options & 1 ? weight.data() : nullptr, *b = options & 2 ? bias.data() : nullptr,
                  *r = options & 4 ? residual.data() : nullptr;
      const std::string what =
          std::string(kernels.name) + " norm " + std::to_string(width) + "/" + std::to_string(options);
      kernels.layer_norm(x.data(), w, b, r, width, 1e-5f, out.data());
      for (int64_t i = 0; i < width; i++) {
        const double z =
            (x[i] - mean) / std::sqrt(variance + 1e-5) * (w ? w[i] : 1) + (b ? b[i] : 0) + (r ? r[i] : 0);
        check_near(what, out[i], z, 1e-5, i);
      }
      portable_kernels.layer_norm(x.data(), w, b, r, width, 1e-5f, same.data());
      check_equal(what + " layer", out.data(), same.data(), width);
      if (b) continue;
      kernels.rms_norm(x.data(), w, r, width, 1e-5f, out.data());
      for (int64_t i = 0; i < width; i++) {
        check_near(what, out[i], x[i] / std::sqrt(square + 1e-5) * (w ? w[i] : 1) + (r ? r[i] : 0), 1e-5, i);
      }
      portable_kernels.rms_norm(x.data(), w, r, width, 1e-5f, same.data());
      check_equal(what + " rms", out.data(), same.data(), width);
    }
  }
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::gelu: return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::relu: return std::max(x, 0.);
  }
  return 0;
}

void test_epilogue(const Kernels& kernels) {
  const int64_t count = 4001;
  Buffer<float> y(count), out(count), same(count);
  for (int64_t i = 0; i < count; i++) y[i] = static_cast<float>(i - 2000) * (i % 7 ? 0.004f : 0.06f);
  const Buffer<float> up = random_floats(count), bias = random_floats(count), up_bias = random_floats(count),
                      residual = random_floats(count);
  for (const Activation activation :
       {Activation::none, Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu}) {
    for (int options = 0; options < 16; options++) {
      const float *b = options & 1 ? bias.data() : nullptr, *u = options & 2 ? up.data() : nullptr,
                  *ub = options & 2 && b ? up_bias.data() : nullptr,
                  *r = options & 4 ? residual.data() : nullptr;
      const float cap = options & 8 ? 5.f : 0.f;
      const std::string what = std::string(kernels.name) + " epilogue " +
                               std::to_string(static_cast<int>(activation)) + "/" + std::to_string(options);
      kernels.epilogue(y.data(), b, u, ub, activation, 0.7f, cap, r, count, out.data());
      portable_kernels.epilogue(y.data(), b, u, ub, activation, 0.7f, cap, r, count, same.data());
      check_equal(what, out.data(), same.data(), count);
      for (int64_t i = 0; i < count; i++) {
        double z = activated(activation, static_cast<double>(b ? y[i] + b[i] : y[i])) *
                   (u ? u[i] + (ub ? ub[i] : 0) : 1);
        z *= 0.7f;
        if (cap > 0) z = cap * std::tanh(z / cap);
        check_near(what, out[i], z + (r ? r[i] : 0), 1e-6 + 6e-7 * (std::fabs(z) + 1), i);
      }
    }
  }
}

void test_rotate(const Kernels& kernels) {
  for (int64_t half : {3, 8, 20, 32, 64}) {
    for (const bool interleaved : {false, true}) {
      const int64_t width = 2 * half + 5;
      Buffer<float> angle(3 * half), cos(3 * half), sin(3 * half);
      for (int64_t i = 0; i < 3 * half; i++) {
        angle[i] = normal();
        cos[i] = std::cos(angle[i]);
        sin[i] = std::sin(angle[i]);
      }
      const Buffer<float> x = random_floats(width);
      Buffer<float> out(width);
      std::copy(x.data(), x.data() + width, out.data());
      kernels.rotate(out.data(), {cos.data(), sin.data(), 2 * half, interleaved}, 2);
      for (int64_t i = 0; i < half; i++) {
        const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : half + i;
        const double c = cos[2 * half + i], s = sin[2 * half + i];
        check_near(std::string(kernels.name) + " rotate", out[a], x[a] * c - x[b] * s, 1e-6, i);
        check_near(std::string(kernels.name) + " rotate", out[b], x[b] * c + x[a] * s, 1e-6, i);
      }
      for (int64_t i = 2 * half; i < width; i++) check_near("rotate passes", out[i], x[i], 0, i);
    }
  }
}

// ---- attention ----

struct Context {
  Cache cache;
  AttentionShape shape;
  int64_t slots, length;
  Buffer<uint8_t> k, v;
  Buffer<float> sinks, q;
  double key(int64_t slot, int64_t head, int64_t position, int64_t d) const {
    return stored(cache.k, cache.row(slot, head, position), d);
  }
  double value(int64_t slot, int64_t head, int64_t position, int64_t d) const {
    return stored(cache.v, cache.row(slot, head, position), d);
  }

  // Column d of a row, read as kernels.h describes rows.
  static double stored(const CacheRows& rows, int64_t index, int64_t d) {
    const char* row = rows.row(index);
    const auto real = [&](int64_t at) { return static_cast<double>(read<float>(row + at)); };
    const auto half = [&](int64_t at) { return static_cast<double>(to_float(read<f16>(row + at))); };
    switch (rows.type) {
      case CacheType::f32: return real(4 * d);
      case CacheType::f16: return half(2 * d);
      case CacheType::int8: return real(0) * static_cast<int8_t>(row[8 + d]) + real(4);
      case CacheType::fp8: return real(0) * static_cast<double>(to_float(read<fp8>(row + 4 + d)));
      case CacheType::int4: break;
    }
    const int64_t header = (rows.dim + 31) / 32 * 4;
    const int q = static_cast<uint8_t>(row[header + d / 2]) >> (d % 2 ? 4 : 0) & 15;
    return half(d / 32 * 4) * q + half(d / 32 * 4 + 2);
  }

 private:
  template <typename T>
  static T read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
};

const CacheType kCacheTypes[] = {CacheType::f32, CacheType::f16, CacheType::int8, CacheType::fp8,
                                 CacheType::int4};

Context context(CacheType k_type, CacheType v_type, int64_t heads, int64_t kv_heads, int64_t k_dim,
                int64_t v_dim, int64_t window, float softcap, int64_t length) {
  Context c;
  c.slots = 2;
  c.length = length;
  c.cache.k = {k_type, k_dim};
  c.cache.v = {v_type, v_dim};
  c.cache.kv_heads = kv_heads;
  c.cache.window = window;
  c.cache.ring = window ? std::min(length, window + 40) : length;
  const int64_t rows = c.slots * kv_heads * c.cache.ring;
  c.k = Buffer<uint8_t>(rows * c.cache.k.row_bytes());
  c.v = Buffer<uint8_t>(rows * c.cache.v.row_bytes());
  std::memset(c.k.data(), 0xff, static_cast<size_t>(c.k.size()));  // what was never appended is not a number
  std::memset(c.v.data(), 0xff, static_cast<size_t>(c.v.size()));
  c.cache.k.data = reinterpret_cast<char*>(c.k.data());
  c.cache.v.data = reinterpret_cast<char*>(c.v.data());
  c.sinks = random_floats(heads);
  c.shape.heads = heads;
  c.shape.scale = 1.f / std::sqrt(static_cast<float>(k_dim));
  c.shape.softcap = softcap;
  c.shape.sinks = softcap > 0 ? c.sinks.data() : nullptr;
  c.q = random_floats(length * heads * k_dim);
  for (int64_t i = 0; i < c.q.size(); i++) c.q[i] *= 2;
  return c;
}

void append_all(const Kernels& kernels, const Context& c, int64_t slot, int64_t length) {
  for (int64_t position = 0; position < length; position++) {
    for (int64_t head = 0; head < c.cache.kv_heads; head++) {
      const Buffer<float> k = random_floats(c.cache.k.dim), v = random_floats(c.cache.v.dim);
      kernels.append(c.cache, slot, head, position, k.data(), v.data());
    }
  }
}

// `rows` query rows from `first` on, all heads, through splits and their combination: [rows, heads, v_dim].
Buffer<float> attend(const Kernels& kernels, const Context& c, int64_t slot, int64_t first, int64_t rows) {
  const int64_t group = c.shape.heads / c.cache.kv_heads, splits = (first + rows - 1) / kSplit + 1,
                v_dim = c.cache.v.dim;
  const int64_t queries = rows * group;
  Buffer<float> out(rows * c.shape.heads * v_dim), m(splits * queries), l(splits * queries),
      acc(splits * queries * v_dim);
  Buffer<uint8_t> scratch(static_cast<int64_t>(kernels.attention_scratch_bytes(group, c.cache.k.dim, v_dim)));
  const int64_t ldq = c.shape.heads * c.cache.k.dim;
  for (int64_t head = 0; head < c.cache.kv_heads; head++) {
    for (int64_t split = 0; split < splits; split++) {
      kernels.attention_split(c.cache, c.shape, c.q.data() + first * ldq + head * group * c.cache.k.dim, ldq,
                              rows, slot, head, first, split, m.data() + split * queries,
                              l.data() + split * queries, acc.data() + split * queries * v_dim,
                              scratch.data());
    }
    for (int64_t i = 0; i < queries; i++) {
      const int64_t h = head * group + i % group;
      kernels.attention_combine(m.data() + i, l.data() + i, queries, acc.data() + i * v_dim, queries * v_dim,
                                splits, c.shape.sinks ? c.shape.sinks + h : nullptr, v_dim,
                                out.data() + (i / group * c.shape.heads + h) * v_dim);
    }
  }
  return out;
}

std::vector<double> reference_attention(const Context& c, int64_t slot, int64_t position, int64_t h) {
  const int64_t head = h / (c.shape.heads / c.cache.kv_heads);
  const int64_t oldest = c.cache.window ? std::max<int64_t>(0, position - c.cache.window + 1) : 0;
  std::vector<double> score, out(static_cast<size_t>(c.cache.v.dim));
  double largest = c.shape.sinks ? c.shape.sinks[h] : -1e300;
  for (int64_t j = oldest; j <= position; j++) {
    double s = 0;
    for (int64_t d = 0; d < c.cache.k.dim; d++)
      s += c.q[(position * c.shape.heads + h) * c.cache.k.dim + d] * c.key(slot, head, j, d);
    s *= c.shape.scale;
    if (c.shape.softcap > 0) s = c.shape.softcap * std::tanh(s / c.shape.softcap);
    score.push_back(s);
    largest = std::max(largest, s);
  }
  double total = c.shape.sinks ? std::exp(c.shape.sinks[h] - largest) : 0;
  for (double& s : score) total += s = std::exp(s - largest);
  for (int64_t j = oldest; j <= position; j++) {
    for (int64_t d = 0; d < c.cache.v.dim; d++) {
      out[static_cast<size_t>(d)] +=
          score[static_cast<size_t>(j - oldest)] / total * c.value(slot, head, j, d);
    }
  }
  return out;
}

void test_attention(const Context& c, const std::string& name) {
  const int64_t slot = 1, width = c.shape.heads * c.cache.v.dim;
  // a window's ring keeps window + 40 rows: only late rows can be asked, up to 16 at once
  for (const int64_t length : {c.length, c.length - 37}) {
    append_all(portable_kernels, c, slot, length);
    const int64_t rows = std::min<int64_t>(16, length), first = length - rows;
    const Buffer<float> expected = attend(portable_kernels, c, slot, first, rows);
    for (int64_t t = 0; t < rows; t += 5) {
      for (int64_t h = 0; h < c.shape.heads; h++) {
        const std::vector<double> exact = reference_attention(c, slot, first + t, h);
        for (int64_t d = 0; d < c.cache.v.dim; d++) {
          check_near(name, expected[t * width + h * c.cache.v.dim + d], exact[static_cast<size_t>(d)], 1e-5,
                     d);
        }
      }
    }
    for (const Kernels* kernels : all_kernels()) {
      const std::string what = std::string(kernels->name) + " " + name;
      for (const int64_t count : {int64_t{1}, int64_t{3}, rows}) {
        for (int64_t t = 0; t + count <= rows; t += count) {
          const Buffer<float> got = attend(*kernels, c, slot, first + t, count);
          check_equal(what + " rows" + std::to_string(count), got.data(), expected.data() + t * width,
                      count * width);
        }
      }
    }
  }
}

// What one instruction set appends, every other appends too.
void test_append(const Kernels& kernels) {
  for (const CacheType type : kCacheTypes) {
    for (int64_t width : {5, 16, 40, 64}) {
      const Context a = context(type, type, 2, 2, width, width + 3, 0, 0, 9),
                    b = context(type, type, 2, 2, width, width + 3, 0, 0, 9);
      const auto before = random_bits;
      append_all(kernels, a, 1, 9);
      random_bits = before;
      append_all(portable_kernels, b, 1, 9);
      const std::string what = std::string(kernels.name) + " append";
      for (int64_t i = 0; i < a.k.size(); i++) check_near(what + " k", a.k[i], b.k[i], 0, i);
      for (int64_t i = 0; i < a.v.size(); i++) check_near(what + " v", a.v[i], b.v[i], 0, i);
    }
  }
}

// How far a value may be from what is stored for it, where the range of its group is `range`.
double rounding_bound(CacheType type, double value, double range) {
  switch (type) {
    case CacheType::f32: return 0;
    case CacheType::f16: return std::fabs(value) / 2048;
    case CacheType::int8: return range / 255 * 0.76;  // half of one and a half steps
    case CacheType::fp8: return std::max(std::fabs(value) / 16, range / 448 / 1024) * 1.0001;
    case CacheType::int4: return range * 0.135 + std::fabs(value) / 2048;  // three quarters of the range
  }
  return 0;
}

// Stored rows come back, constant parts, outliers, constant and zero rows included.
void test_rounding(const Kernels& kernels) {
  for (const CacheType type : kCacheTypes) {
    for (int64_t width : {1, 8, 31, 64, 80, 96}) {
      for (int kind = 0; kind < 4; kind++) {
        const Context c = context(type, type, 1, 1, width, width, 0, 0, 1);
        Buffer<float> x = random_floats(width);
        for (int64_t i = 0; i < width; i++) x[i] = kind == 0 ? 0.f : kind == 1 ? 7.25f : x[i];
        if (kind == 3) x[width / 2] *= 30;
        kernels.append(c.cache, 0, 0, 0, x.data(), x.data());
        for (int64_t d = 0; d < width; d++) {
          const int64_t size = type == CacheType::int4 ? 32 : width, begin = d / size * size;
          const float *first = x.data() + begin, *last = x.data() + std::min(width, begin + size);
          const auto [least, most] = std::minmax_element(first, last);
          const double largest = std::max(std::fabs(*least), std::fabs(*most));
          const double range = type == CacheType::fp8 ? largest : *most - *least;
          const double beyond = std::fabs(c.key(0, 0, 0, d) - x[d]) - rounding_bound(type, x[d], range);
          check_near(std::string(kernels.name) + " rounding", std::max(0., beyond), 0, 1e-5, d);
          check_near("values round as keys", c.value(0, 0, 0, d), c.key(0, 0, 0, d), 0, d);
        }
      }
    }
  }
}

// A number that is none makes its row none, and no other.
void test_poison(const Kernels& kernels) {
  for (const CacheType type : kCacheTypes) {
    for (const float bad : {NAN, INFINITY}) {
      const Context c = context(type, type, 1, 1, 40, 40, 0, 0, 2);
      Buffer<float> x = random_floats(40);
      kernels.append(c.cache, 0, 0, 0, x.data(), x.data());
      x[3] = bad;
      kernels.append(c.cache, 0, 0, 1, x.data(), x.data());
      check_near("poison", std::isfinite(c.key(0, 0, 1, 3)), 0, 0, 3);
      const Buffer<float> clean = attend(kernels, c, 0, 0, 1), both = attend(kernels, c, 0, 0, 2);
      check_equal(std::string(kernels.name) + " poison is not seen before", both.data(), clean.data(), 40);
      check_near("poison is seen", std::isfinite(both[40 + 3]), 0, 0, 3);
    }
  }
}

void test_hadamard(const Kernels& kernels) {
  const std::pair<int64_t, int64_t> shapes[] = {{8, 8}, {64, 32}, {80, 16}, {96, 32}, {128, 128}, {5, 1}};
  for (const auto& [dim, block] : shapes) {
    const Buffer<float> x = random_floats(dim);
    Buffer<float> got(dim);
    std::copy(x.data(), x.data() + dim, got.data());
    kernels.hadamard(got.data(), dim, block);
    for (int64_t i = 0; i < dim; i++) {
      double sum = 0;
      for (int64_t j = 0; j < block; j++) {
        const double sign = __builtin_parityll(static_cast<uint64_t>(i % block & j)) ? -1 : 1;
        sum += sign * x[i / block * block + j];
      }
      const double exact = sum / std::sqrt(static_cast<double>(block));
      check_near(std::string(kernels.name) + " hadamard", got[i], exact, 1e-5, i);
    }
  }
}

void test_attentions() {
  for (const CacheType k : kCacheTypes) {
    for (const CacheType v : kCacheTypes) {
      test_attention(context(k, v, 6, 2, 40, 24, 0, 5.f, 130), "attention odd, softcap, sinks");
      test_attention(context(k, v, 4, 2, 8, 16, 70, 0, 200), "attention narrow, window");
      if (k != v) continue;
      test_attention(context(k, v, 4, 4, 64, 64, 0, 0, 150), "attention mha");
      test_attention(context(k, v, 8, 1, 64, 64, 0, 0, 600), "attention mqa");
      test_attention(context(k, v, 4, 2, 80, 96, 70, 0, 560), "attention window");
      test_attention(context(k, v, 3, 1, 192, 128, 0, 0, 90), "attention wide");
      test_attention(context(k, v, 2, 1, 5, 33, 0, 0, 70), "attention odd");
    }
  }
}

// e4m3 against its definition, for every code and for what lies between two of them.
void test_fp8() {
  const auto exact = [](uint32_t code) {
    const int exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
    return exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  };
  for (uint32_t code = 0; code < 0x7f; code++) {
    check_near("fp8 value", to_float(fp8{static_cast<uint8_t>(code)}), exact(code), 0, code);
    check_near("fp8 negative", to_float(fp8{static_cast<uint8_t>(code | 0x80)}), -exact(code), 0, code);
    check_near("fp8 round trip", to_fp8(static_cast<float>(exact(code))).bits, code, 0, code);
    if (code == 0x7e) continue;
    const double middle = (exact(code) + exact(code + 1)) / 2, step = exact(code + 1) - exact(code);
    check_near("fp8 tie", to_fp8(static_cast<float>(middle)).bits, code + code % 2, 0, code);
    check_near("fp8 below", to_fp8(static_cast<float>(middle - step / 64)).bits, code, 0, code);
    check_near("fp8 above", to_fp8(static_cast<float>(-middle - step / 64)).bits, (code + 1) | 0x80, 0, code);
  }
  check_near("fp8 saturates", to_fp8(1e9f).bits, 0x7e, 0, 0);
  check_near("fp8 keeps what is not a number", std::isnan(to_float(to_fp8(NAN))), 1, 0, 0);
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

}  // namespace

int main() {
  test_halves();
  test_fp8();
  for (const Kernels* kernels : all_kernels()) {
    test_quantize(*kernels);
    test_dequantize(*kernels);
    test_norms(*kernels);
    test_epilogue(*kernels);
    test_rotate(*kernels);
    test_append(*kernels);
    test_rounding(*kernels);
    test_poison(*kernels);
    test_hadamard(*kernels);
  }
  test_attentions();
  for (const Format format : {Format::f32, Format::f16, Format::bf16}) {
    for (int64_t k : {1, 15, 31, 64, 172, 2048}) test_float_product(format, uniform(1, 23), k);
  }
  for (const Format format : {Format::int8, Format::int4}) {
    for (int64_t group : {32, 64, 0}) {
      for (int64_t k : {1, 31, 64, 172}) test_widened_product(format, uniform(1, 23), k, group);
    }
  }
  test_integer_products();
  for (const Kernels* kernels : all_kernels()) std::printf("%s ", kernels->name);
  std::printf("\n%ld checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}
