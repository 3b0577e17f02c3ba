// Kernels in plain C++, for any machine. The other instruction sets compile the same .inc files over wider
// vectors.
#include <algorithm>
#include <cmath>

#include "fp8.h"
#include "half.h"
#include "kernels.h"

namespace gristmill {
namespace {

#include "vec_portable.h"
#include "vec_math.inc"
#include "rows.inc"
#include "cache.inc"
#include "product_float.inc"
#include "attention.inc"

// ---- integer product ----

// One weight row as integers minus nothing: nibbles stay 0..15, int8 stays -128..127.
void unpack_row(const Matrix& w, int64_t n, int16_t* out) {
  const int64_t kp = padded_columns(w.k);
  if (w.format == Format::int8) {
    const int8_t* from = static_cast<const int8_t*>(w.data) + n * kp;
    for (int64_t c = 0; c < kp; c++) out[c] = from[c];
    return;
  }
  const uint8_t* from = static_cast<const uint8_t*>(w.data) + n * (kp / 2);
  for (int64_t block = 0; block < kp / 64; block++) {
    for (int64_t i = 0; i < 32; i++) {
      out[block * 64 + i] = from[block * 32 + i] & 15;
      out[block * 64 + 32 + i] = from[block * 32 + i] >> 4;
    }
  }
}

int32_t dot(const int16_t* w, const int8_t* q, int64_t count) {
  int32_t sum = 0;
  for (int64_t c = 0; c < count; c++) sum += w[c] * q[c];
  return sum;
}

float dot_row(const Matrix& w, const QuantizedRows& x, int64_t n, int64_t t, const int16_t* weights) {
  const int64_t groups = x.groups();
  const int8_t* q = x.q + t * x.kp();
  float acc = 0;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t begin = g * x.group, count = std::min(x.group, x.kp() - begin), at = t * groups + g;
    const int64_t weight_group = w.group ? begin / w.group : 0;
    const int32_t d = dot(weights + begin, q + begin, count) - weight_zero(w, n, weight_group) * x.sum[at];
    acc = __builtin_fmaf(static_cast<float>(d), weight_scale(w, n, weight_group) * x.scale[at], acc);
  }
  return acc;
}

void product_int(const Matrix& w, const QuantizedRows& x, int64_t rows, int64_t n0, int64_t n1, float* y,
                 int64_t ldy, void* scratch) {
  int16_t* weights = static_cast<int16_t*>(scratch);
  for (int64_t n = n0; n < n1; n++) {
    unpack_row(w, n, weights);
    for (int64_t t = 0; t < rows; t++) y[t * ldy + n - n0] = dot_row(w, x, n, t, weights);
  }
}

size_t product_scratch_bytes(int64_t k) { return float_scratch_bytes(k); }

#include "table.inc"

}  // namespace

extern const Kernels portable_kernels = make_table(8);

}  // namespace gristmill
