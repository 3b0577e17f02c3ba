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
#include "peak.inc"

// ---- integer product ----

// q of column c in a block of 64.
int32_t block_value(Format format, const uint8_t* block, int64_t c) {
  if (format == Format::int8) return static_cast<int8_t>(block[c]);
  if (format == Format::int4) return block[c % 32] >> c / 32 * 4 & 15;
  const int32_t low = block[c % 16] >> c / 16 * 2 & 3;
  return format == Format::int2 ? low : low | (block[16 + c / 8] >> c % 8 & 1) << 2;
}

// One weight row as integers minus nothing: int8 stays -128..127, the others 0..15, 0..7 and 0..3.
template <Format format>
void unpack_row(const Matrix& w, int64_t n, int16_t* out) {
  const uint8_t* block = static_cast<const uint8_t*>(w.data) + n * w.row_bytes();
  for (int64_t c = 0; c < padded_columns(w.k); c += 64, block += block_bytes(format)) {
    for (int64_t i = 0; i < 64; i++) out[c + i] = static_cast<int16_t>(block_value(format, block, i));
  }
}

void unpack_row(const Matrix& w, int64_t n, int16_t* out) {
  switch (w.format) {
    case Format::int4: return unpack_row<Format::int4>(w, n, out);
    case Format::int3: return unpack_row<Format::int3>(w, n, out);
    case Format::int2: return unpack_row<Format::int2>(w, n, out);
    default: return unpack_row<Format::int8>(w, n, out);
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
    acc = __builtin_fmaf(static_cast<float>(d), first(weight_scale(w, n, weight_group)) * x.scale[at], acc);
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

int64_t peak_int(int64_t rounds) {
  constexpr int64_t kCount = 256;
  int16_t weights[kCount];
  int8_t q[kCount];
  for (int64_t i = 0; i < kCount; i++) weights[i] = 1, q[i] = 1;
  int64_t sum = 0;
  for (int64_t i = 0; i < rounds; i++) {
    weights[i % kCount] = static_cast<int16_t>(sum & 1);
    sum += dot(weights, q, kCount);
  }
  volatile int64_t sink = sum;
  (void)sink;
  return rounds * kCount * 2;
}

size_t product_scratch_bytes(int64_t k) {
  return std::max(sizeof(FloatScratch), static_cast<size_t>(padded_columns(k)) * sizeof(int16_t));
}

#include "table.inc"

}  // namespace

extern const Kernels portable_kernels = make_table(8, 4);

}  // namespace gristmill
