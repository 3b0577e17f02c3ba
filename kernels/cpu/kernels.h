// The CPU kernels: pure functions over raw pointers and ranges. No threads, no allocation, no state; the
// executor owns all of that.
//
// One table of functions per instruction set, chosen once at run time. Every table computes the same bits for
// integer products: a group's dot product is an exact int32, and only then enters `acc = fma(float(dot), s_w
// * s_a, acc)` in group order.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gristmill {

enum class Format : uint8_t { f32, f16, bf16, fp8, int8, int4, int3, int2 };
enum class Activation : uint8_t { none, silu, gelu, gelu_tanh, relu };
enum class CacheType : uint8_t { f32, f16, int8, fp8, int4 };

// Columns are padded to a multiple of 64 wherever integers are stored.
constexpr int64_t padded_columns(int64_t k) { return (k + 63) / 64 * 64; }

// What the formats are; those of one kind differ in these numbers alone. fp8 is e4m3fn.
constexpr bool is_integer(Format f) { return f >= Format::int8; }
constexpr bool has_scales(Format f) { return f >= Format::fp8; }
// Outside of the function: there compilers fill it on each call, with instructions that kernels wait for.
constexpr int kBitsOfWeight[] = {32, 16, 16, 8, 8, 4, 3, 2};
constexpr int bits_of_weight(Format f) { return kBitsOfWeight[static_cast<int>(f)]; }
// int8 is stored as it is; below, q is unsigned and symmetric weights have their zero in the middle.
constexpr bool is_unsigned(Format f) { return f >= Format::int4; }
constexpr int32_t middle(Format f) { return is_unsigned(f) ? 1 << (bits_of_weight(f) - 1) : 0; }
constexpr int64_t block_bytes(Format f) { return 8 * bits_of_weight(f); }  // of 64 columns, with scales
// Zero points of a row of G groups: int8, else packed nibbles.
constexpr int64_t zero_bytes(Format f, int64_t groups) { return is_unsigned(f) ? (groups + 1) / 2 : groups; }

// One weight matrix [n, k] in its stored layout (see the artifact format).
struct Matrix {
  Format format = Format::f32;
  bool symmetric = true;
  bool scale_is_f32 = false;
  int64_t n = 0, k = 0;
  int64_t group = 0;  // columns per scale; 0 = whole row
  // [n, k] floats, or rows of kp / 64 blocks: 64 bytes of fp8 or int8; 32 of int4 (byte i: column i low, i +
  // 32 high); 16 of int2 (byte i: columns i, i + 16, i + 32, i + 48 from the lowest bits up); int3: the low
  // two bits as int2, then 8 bytes of third bits (bit c % 8 of byte c / 8)
  const void* data = nullptr;
  const void* scale = nullptr;  // [n, G] f16 or f32
  const void* zero = nullptr;   // asymmetric: int8 [n, G] or packed nibbles [n, ceil(G / 2)]
  int64_t groups() const { return group ? (k + group - 1) / group : 1; }
  int64_t row_bytes() const {
    return has_scales(format) ? padded_columns(k) / 64 * block_bytes(format) : k * bits_of_weight(format) / 8;
  }
};

// Rows of activations quantized to int8, symmetric, per group of columns.
struct QuantizedRows {
  int8_t* q = nullptr;       // [rows, kp], 64-byte aligned, zeros beyond k
  float* scale = nullptr;    // [rows, groups]
  int32_t* sum = nullptr;    // [rows, groups] sum of q in the group (the zero point is folded in with it)
  int64_t k = 0, group = 0;  // group: 32, 64 or 128
  int64_t kp() const { return padded_columns(k); }
  int64_t groups() const { return (k + group - 1) / group; }
};

struct Rope {
  const float* cos = nullptr;  // [rows, dims / 2] of this batch
  const float* sin = nullptr;
  int64_t dims = 0;  // leading columns of a head that rotate; 0 = none
  bool interleaved = false;
};

// The keys or the values of a cache. Rows of row_bytes() each: what a row is scaled by, then its columns. Rows of
// int8 lie in tiles of kTile, as they are multiplied: the rows' scales, their offsets, then bytes in quads.
struct CacheRows {
  static constexpr int64_t kGroup = 32;  // columns of int4 that share a scale and an offset
  static constexpr int64_t kTile = 16;   // a ring holds whole tiles
  static constexpr int64_t kTileHeader = 2 * kTile * 4;
  CacheType type = CacheType::f16;
  int64_t dim = 0;
  char* data = nullptr;

  int64_t header_bytes() const {
    switch (type) {
      case CacheType::f32:
      case CacheType::f16: return 0;
      case CacheType::int8: return 8;                                  // x = scale * byte + offset, both f32
      case CacheType::fp8: return 4;                                   // x = scale * e4m3, f32
      case CacheType::int4: return (dim + kGroup - 1) / kGroup * 4;  // scale and offset, both f16, per group
    }
    return 0;
  }
  int64_t tile_width() const { return (dim + 15) / 16 * 16; }  // columns of int8, with those that fill it up
  int64_t row_bytes() const {
    switch (type) {
      case CacheType::f32: return 4 * dim;
      case CacheType::f16: return 2 * dim;
      case CacheType::int8: return header_bytes() + tile_width();
      case CacheType::fp8: return header_bytes() + dim;
      case CacheType::int4: return header_bytes() + (dim + 1) / 2;  // byte i: column 2i low, 2i + 1 high
    }
    return 0;
  }
  char* row(int64_t index) const { return data + index * row_bytes(); }  // not of int8
  char* tile(int64_t index) const { return data + index / kTile * kTile * row_bytes(); }

  // Where a tile has column c of row r % kTile. Keys are multiplied along the columns: four columns of a row
  // are a quad, the quads of sixteen rows follow each other. Values are multiplied along the rows.
  static int64_t key_byte(int64_t r, int64_t c) {
    return kTileHeader + c / 4 * 4 * kTile + r % kTile * 4 + c % 4;
  }
  int64_t value_byte(int64_t r, int64_t c) const {
    return kTileHeader + r % kTile / 4 * 4 * tile_width() + c * 4 + r % 4;
  }
};

// One layer's cache.
struct Cache {
  CacheRows k, v;
  int64_t kv_heads = 0;
  int64_t ring = 0;    // rows per (slot, head), whole tiles: max_len, or a smaller window + max_tokens
  int64_t window = 0;  // 0 = whole context
  int64_t row(int64_t slot, int64_t head, int64_t position) const {
    return (slot * kv_heads + head) * ring + position % ring;
  }
};
constexpr int64_t whole_tiles(int64_t rows) {
  return (rows + CacheRows::kTile - 1) / CacheRows::kTile * CacheRows::kTile;
}

struct AttentionShape {
  int64_t heads = 0;
  float scale = 1, softcap = 0;
  const float* sinks = nullptr;  // [heads] or null
};

// Splits of the context: fixed by absolute position, so that a row's bits do not depend on who shares the
// work.
constexpr int64_t kSplit = 512;

struct Kernels {
  const char* name;

  // x [rows, k] with leading dimension ldx -> out.
  void (*quantize_rows)(const float* x, int64_t ldx, int64_t rows, QuantizedRows out);

  // y[t * ldy + (n - n0)] = sum_k W[n, k] x[t, k] for n in [n0, n1), t in [0, rows). `scratch`:
  // product_scratch_bytes(), 64-byte aligned.
  void (*product_int)(const Matrix& w, const QuantizedRows& x, int64_t rows, int64_t n0, int64_t n1, float* y,
                      int64_t ldy, void* scratch);
  void (*product_float)(const Matrix& w, const float* x, int64_t ldx, int64_t rows, int64_t n0, int64_t n1,
                        float* y, int64_t ldy, void* scratch);
  size_t (*product_scratch_bytes)(int64_t k);  // per thread, for the widest k of the program
  int64_t tile;      // n ranges of many rows should start at multiples of this
  int64_t few_rows;  // up to here product_int reads the weights of a range as streams, see x86_decode.inc

  // out[0..k) = scale * W[row, :]
  void (*dequantize_row)(const Matrix& w, int64_t row, float scale, float* out);

  // out = x / sqrt(mean(x^2) + eps) * weight (+ residual); weight and residual may be null; out may be
  // residual.
  void (*rms_norm)(const float* x, const float* weight, const float* residual, int64_t width, float eps,
                   float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, const float* residual,
                     int64_t width, float eps, float* out);

  // out[i] = finish(act(y[i] + bias[i]) [* (up[i] + up_bias[i])]) with finish(z) = softcap(scale * z) +
  // residual[i]; null = absent.
  void (*epilogue)(const float* y, const float* bias, const float* up, const float* up_bias,
                   Activation activation, float scale, float softcap, const float* residual, int64_t count,
                   float* out);

  // Rotates one head in place: x [dims_of_head], cos/sin of its row.
  void (*rotate)(float* x, const Rope& rope, int64_t row);

  // Multiplies each `block` columns of a head by the orthonormal Walsh-Hadamard matrix, in place; block: a
  // power of two that divides dim.
  void (*hadamard)(float* x, int64_t dim, int64_t block);

  // Writes one head's k [k_dim] and v [v_dim] (already normed and rotated) at (slot, head, position),
  // quantizing as the cache asks.
  void (*append)(const Cache& cache, int64_t slot, int64_t head, int64_t position, const float* k,
                 const float* v);

  // Puts the queries of `rows` consecutive rows and of all query heads of a kv head into `scratch` of
  // attention_scratch_bytes(), for any splits that follow. q: row t, query head h (of heads / kv_heads) at
  // q + t * ldq + h * k_dim.
  void (*attention_prepare)(const Cache& cache, const AttentionShape& shape, const float* q, int64_t ldq,
                            int64_t rows, void* scratch);

  // One split of attention for the prepared rows (positions first_position ... ascending by one, same slot) and
  // kv head `head`, over positions [512 * split, 512 * split + 512) cut to what each row may see. Partials:
  // m, l [rows, group], acc [rows, group, v_dim]; a row that sees nothing of the split gets m = -inf, l = 0,
  // acc = 0.
  void (*attention_split)(const Cache& cache, const AttentionShape& shape, int64_t rows, int64_t slot,
                          int64_t head, int64_t first_position, int64_t split, float* m, float* l, float* acc,
                          void* scratch);
  size_t (*attention_scratch_bytes)(int64_t group, int64_t k_dim,
                                    int64_t v_dim);  // for up to attention_rows rows
  int64_t attention_rows;                            // most query rows of one call

  // Combines `splits` partials (m, l: [splits] with stride ld_ml; acc: stride ld_acc) in order into out
  // [v_dim]; sink: null or one logit.
  void (*attention_combine)(const float* m, const float* l, int64_t ld_ml, const float* acc, int64_t ld_acc,
                            int64_t splits, const float* sink, int64_t v_dim, float* out);

  // `rounds` of independent multiply-adds in registers, as in the float and the integer products; returns the
  // number of operations, two for each.
  int64_t (*peak_float)(int64_t rounds);
  int64_t (*peak_int)(int64_t rounds);
};

// Best first; only those this CPU can execute.
const Kernels* const* available_kernels(int* count);
const Kernels* find_kernels(const char* name);  // "auto" = best; null when unknown or not executable here

// Whether weights that are read as streams had better wait in the second cache, whose queue of lines to come is
// the longer one, and be asked for early: Zen 4 reads 3 to 10 % more so, Cascade Lake a tenth less. Set before
// any kernels are found.
extern bool reads_far_ahead;

extern const Kernels portable_kernels;
// Of a build that has them, see target.h:
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;  // AVX-512 F/BW/DQ/VL without VNNI
extern const Kernels avx512vnni_kernels;

}  // namespace gristmill
