// Adapters: their matrices copied to where kernels may read them, and the step that multiplies by A.
#include "adapter.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "machine.h"

namespace gristmill {
namespace {

constexpr int64_t kPad = 64;  // bytes behind a matrix that a kernel may read

void* copy_of(Carver& carver, const void* from, size_t bytes) {
  char* to = carver.take<char>(static_cast<int64_t>(bytes) + kPad);
  if (to) std::memcpy(to, from, bytes);
  return to;
}

Matrix matrix(Format format, int64_t n, int64_t k, const void* data) {
  Matrix made;
  made.format = format;
  made.n = n;
  made.k = k;
  made.data = data;
  return made;
}

// low = scale * A x of the rows that have an adapter, for every segment that it adds to.
class MultiplyA final : public Step {
 public:
  MultiplyA(const Machine& machine, const Instruction& in, size_t index)
      : Step(machine), in_(in), index_(index), segments_(static_cast<int64_t>(in.weight->segments.size())) {}

  int64_t open() override {
    runs_ = &m.runs(in_.in);
    int64_t cost = 0;
    for (const Run& run : *runs_)
      for (const LowRank& pair : run.adapter->of(index_)) cost += run.rows * pair.rank() * in_.in.width;
    count_ = static_cast<int64_t>(runs_->size()) * segments_;
    whole_ = cost <= kCheap;
    return cost == 0 ? 0 : whole_ ? 1 : count_;
  }

  void work(int64_t begin, int64_t end, int thread) override {
    for (int64_t unit = whole_ ? 0 : begin; unit < (whole_ ? count_ : end); unit++) {
      const Run& run = (*runs_)[static_cast<size_t>(unit / segments_)];
      const std::vector<LowRank>& pairs = run.adapter->of(index_);
      if (!pairs.empty()) multiply(run, pairs[static_cast<size_t>(unit % segments_)], scratch(thread));
    }
  }

  size_t scratch_bytes() const override { return m.kernels->product_scratch_bytes(in_.in.width); }

 private:
  static constexpr int64_t kCheap = 16384;  // multiplications that one thread does in a few microseconds

  void multiply(const Run& run, const LowRank& pair, char* memory) const {
    if (!pair.rank()) return;
    const Rows x = m.rows(in_.in);
    float* low = m.low + run.row * m.low_width + pair.at;
    m.kernels->product_float(pair.a, x.row(run.row), x.stride, run.rows, 0, pair.rank(), low, m.low_width,
                             memory);
    for (int64_t t = 0; t < run.rows; t++)
      for (int64_t i = 0; i < pair.rank(); i++) low[t * m.low_width + i] *= pair.scale;
  }

  const Instruction& in_;
  const size_t index_;
  const int64_t segments_;
  const std::vector<Run>* runs_ = nullptr;
  int64_t count_ = 0;
  bool whole_ = false;
};

}  // namespace

Adapter::Adapter(const Program& program, const std::vector<GivenLowRank>& given)
    : linears_(program.instructions.size()) {
  for (const GivenLowRank& one : given) check(program, one);
  const auto lay_out = [&](Carver carver) {
    for (const GivenLowRank& one : given) {
      const auto at = static_cast<size_t>(one.instruction);
      const Weight& weight = *program.instructions[at].weight;
      linears_[at].resize(weight.segments.size());
      LowRank& pair = linears_[at][static_cast<size_t>(one.segment)];
      const int64_t n = weight.segments[static_cast<size_t>(one.segment)].n;
      pair.a = matrix(one.format, one.rank, weight.k, copy_of(carver, one.a, one.a_bytes));
      pair.b = matrix(one.format, n, one.rank, copy_of(carver, one.b, one.b_bytes));
      pair.scale = one.scale;
    }
    return carver.used();
  };
  memory_ = Region(lay_out(Carver()), "an adapter");
  lay_out(Carver(memory_.data()));
  for (std::vector<LowRank>& pairs : linears_) {
    int64_t at = 0;
    for (LowRank& pair : pairs) {
      pair.at = at;
      at += pair.rank();
    }
    width_ = std::max(width_, at);
  }
}

void Adapter::check(const Program& program, const GivenLowRank& given) const {
  const auto count = static_cast<int64_t>(program.instructions.size());
  if (given.instruction < 0 || given.instruction >= count)
    fail("adapter: instruction ", given.instruction, ", expected 0 to ", count - 1);
  const auto index = static_cast<size_t>(given.instruction);
  const Instruction& in = program.instructions[index];
  if (in.op != Op::linear) fail("adapter: ", instruction_label(program, index), " is no linear");
  const auto segments = static_cast<int64_t>(in.weight->segments.size());
  if (given.segment < 0 || given.segment >= segments)
    fail("adapter: ", instruction_label(program, index), " has ", segments, " segments, got ", given.segment);
  if (has_scales(given.format)) fail("adapter: a matrix has a format with scales, expected f32, f16 or bf16");
  if (given.rank < 1 || given.rank > in.weight->k)
    fail("adapter: ", instruction_label(program, index), ": rank ", given.rank, ", expected 1 to ",
         in.weight->k, ", its inputs");
  const int64_t bytes = bits_of_weight(given.format) / 8;
  const int64_t n = in.weight->segments[static_cast<size_t>(given.segment)].n;
  if (given.a_bytes != static_cast<size_t>(given.rank * in.weight->k * bytes) ||
      given.b_bytes != static_cast<size_t>(n * given.rank * bytes))
    fail("adapter: ", instruction_label(program, index), ": A and B have ", given.a_bytes, " and ",
         given.b_bytes, " bytes, expected [", given.rank, ", ", in.weight->k, "] and [", n, ", ", given.rank,
         "]");
}

std::unique_ptr<Step> make_low_rank(const Machine& machine, const Instruction& in, size_t index) {
  return std::make_unique<MultiplyA>(machine, in, index);
}

}  // namespace gristmill
