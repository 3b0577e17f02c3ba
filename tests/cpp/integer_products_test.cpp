// Products of integer weights and quantized rows, and the quantizing of rows, against the contract: the same bits
// from every instruction set, for every range of outputs and number of rows.
#include "weights.h"

using namespace gristmill;

namespace {

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

// The contract, word for word.
Buffer<float> reference_product(const StoredMatrix& w, const QuantizedRows& x, int64_t rows) {
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

void run_product(const Kernels& kernels, const StoredMatrix& w, const Rows& x, int64_t first, int64_t rows,
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

void test_product(const StoredMatrix& w, int64_t act_group) {
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

constexpr Format kFormats[] = {Format::int8, Format::int4, Format::int3, Format::int2};

void test_products() {
  int turn = 0;
  for (int64_t k : {1, 31, 64, 130, 172, 200, 1216, 2048}) {
    for (int64_t group : {32, 64, 128, 0}) {
      for (const Format format : kFormats) {
        for (int64_t act_group : {32, 64, 128}) {
          if (group && group % act_group) continue;
          for (const bool symmetric : {true, false}) {
            const int64_t n = k > 1000 ? uniform(17, 70) : 1 + 2 * (turn++ % 35);
            test_product(scaled_weights(format, n, k, group, symmetric, uniform(0, 3) == 0), act_group);
          }
        }
      }
    }
  }
  test_product(scaled_weights(Format::int4, 70, 5632, 128, true, false), 128);
  test_product(scaled_weights(Format::int4, 33, 5632, 32, false, false), 32);
  // rows that end inside a step of the decode kernels: half a group, one group, after several sets of scales
  test_product(scaled_weights(Format::int4, 27, 4928, 128, false, false), 128);
  test_product(scaled_weights(Format::int4, 29, 2688, 128, true, false), 128);
  test_product(scaled_weights(Format::int3, 27, 4928, 128, false, false), 128);
  test_product(scaled_weights(Format::int2, 29, 2688, 128, true, false), 128);
  test_product(scaled_weights(Format::int8, 28, 4928, 64, false, false), 64);
  test_product(scaled_weights(Format::int3, 70, 5632, 128, false, false), 128);
  test_product(scaled_weights(Format::int3, 33, 5632, 32, true, false), 32);
  test_product(scaled_weights(Format::int2, 41, 5632, 0, true, true), 64);
  test_product(scaled_weights(Format::int2, 33, 5632, 64, false, false), 32);
  test_product(scaled_weights(Format::int8, 41, 5632, 0, false, true), 128);
  test_product(scaled_weights(Format::int8, 33, 2048, 256, true, false), 64);
}

}  // namespace

int main() {
  for (const Kernels* kernels : all_kernels()) test_quantize(*kernels);
  test_products();
  return report();
}
