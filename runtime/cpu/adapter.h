// Low-rank adapters beside a program: scale * B (A x) on top of segments of its linears, for the rows that have one.
#pragma once
#include <cstdint>
#include <vector>

#include "../../kernels/cpu/kernels.h"
#include "program.h"
#include "region.h"

namespace gristmill {

constexpr int64_t kRunRows = 32;  // rows of one adapter that are multiplied together

// What a segment of a linear gains. a: [r, k], b: [n, r], formats without scales; r 0: nothing.
struct LowRank {
  Matrix a, b;
  float scale = 0;
  int64_t at = 0;  // of its r columns among those of the linear's segments
  int64_t rank() const { return a.n; }
};

// The same as others give it, a and b row by row.
struct GivenLowRank {
  int64_t instruction = 0, segment = 0;
  Format format = Format::f32;
  int64_t rank = 0;
  float scale = 0;
  const void *a = nullptr, *b = nullptr;
  size_t a_bytes = 0, b_bytes = 0;
};

// One adapter, its matrices in memory of its own.
class Adapter {
 public:
  // Throws Error for what does not fit the program.
  Adapter(const Program& program, const std::vector<GivenLowRank>& given);

  // Of an instruction's segments; empty: it is left alone.
  const std::vector<LowRank>& of(size_t instruction) const { return linears_[instruction]; }
  int64_t width() const { return width_; }  // ranks of a linear's segments together, at most
  uint64_t bytes() const { return memory_.bytes(); }

 private:
  void check(const Program& program, const GivenLowRank& given) const;

  std::vector<std::vector<LowRank>> linears_;
  int64_t width_ = 0;
  Region memory_;
};

}  // namespace gristmill
