// program.json as structs whose every pointer, range and shape has been checked against the weights: what
// loads, runs.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "../../kernels/cpu/kernels.h"
#include "safetensors.h"

namespace gristmill {

enum class Op : uint8_t { embedding, rms_norm, layer_norm, linear, attention, gather_rows, pointwise };
const char* op_name(Op op);

// Columns [column, column + width) of a value.
struct View {
  static constexpr int32_t kAbsent = -2, kLogits = -1;
  int32_t value = kAbsent;
  int64_t column = 0, width = 0;
  bool present() const { return value != kAbsent; }
  bool operator==(const View& other) const {
    return value == other.value && column == other.column && width == other.width;
  }
};

// A matrix of f32 in the arena, one row per token ("T") or per requested row ("R").
struct Value {
  bool requested = false;
  int64_t width = 0;
  int64_t offset = 0;
};

struct CacheSpec {
  int64_t kv_heads = 0, k_dim = 0, v_dim = 0, window = 0;
  CacheType k_type = CacheType::f16, v_type = CacheType::f16;
};

struct RopeSpec {
  const float* inv_freq = nullptr;  // [dims / 2]
  int64_t dims = 0;
  bool interleaved = false;
  float scale = 1;
};

// Segments [n_i, k] stacked along n.
struct Weight {
  std::vector<Matrix> segments;
  int64_t n = 0, k = 0, bytes = 0;
  bool integer = false;  // all segments are; else float formats, scaled or not
};

enum class Function : uint8_t {
  add,
  sub,
  mul,
  div,
  neg,
  exp,
  tanh,
  sigmoid,
  silu,
  gelu,
  gelu_tanh,
  relu,
  sqrt,
  rsqrt,
  square,
  maximum,
  minimum,
  abs,
  reciprocal
};

struct Operand {
  int32_t reg = -1;  // -1: the constant
  float constant = 0;
};

struct PointwiseStep {
  Function function = Function::add;
  Operand a, b;
};

// One flat record; fields that an op does not have keep their defaults.
struct Instruction {
  Op op = Op::embedding;
  View in, out, residual;
  const Weight* weight = nullptr;  // embedding, linear
  const float* gain = nullptr;     // norms [width]
  const float* bias = nullptr;     // layer_norm [width], linear [N]
  const int32_t* order = nullptr;  // linear [K]: column j of the weight multiplies in[order[j]]; a permutation
  float eps = 0;
  bool positions = false;  // embedding: ids are the positions
  int64_t offset = 0;      // embedding: added to the ids
  float scale = 1, softcap = 0;
  Activation activation = Activation::none;
  bool glu = false;
  int64_t act_group = 0;
  View q, k, v;
  int64_t cache = 0, rope = -1, heads = 0;
  int64_t hadamard = 0;  // attention: columns that q and k are rotated by; 0 = none
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  const float* sinks = nullptr;
  std::vector<View> inputs;  // pointwise
  std::vector<PointwiseStep> steps;
};

struct Program {
  std::string name;
  int64_t vocabulary = 0, max_tokens = 0, max_slots = 0, max_len = 0, max_position = 0, arena_bytes = 0;
  std::vector<Value> values;
  std::vector<CacheSpec> caches;
  std::vector<RopeSpec> ropes;
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<Instruction> instructions;
};

// Where a rank's program differs from a whole one: what its own weights lack is in `base`, and columns that it
// does not write come from other ranks, so that a value counts as written once some of it is.
struct Split {
  const Weights* base = nullptr;
  bool partial = false;
};

// Parses and checks; throws Error naming the instruction and op. The Program points into `weights`.
Program parse_program(std::string_view json, const Weights& weights, const Split& split = {});

// What does not depend on the file's syntax: widths, row kinds, written before read, overlaps in the arena.
// Called by parse_program.
void check_program(const Program& program, bool partial = false);
std::string instruction_label(const Program& program, size_t index);

}  // namespace gristmill
