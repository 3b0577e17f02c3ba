// Steps that treat each row alone: rope tables, embedding, norms, gather.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine.h"

namespace gristmill {
namespace {

class RopeTables final : public RowStep {
 public:
  explicit RopeTables(const Machine& machine) : RowStep(machine, 16 * total_dims(*machine.program)) {}

 protected:
  int64_t rows() const override { return m.program->ropes.empty() ? 0 : m.batch.rows; }
  void each(int64_t begin, int64_t end, int) override {
    for (size_t i = 0; i < m.ropes.size(); i++)
      for (int64_t t = begin; t < end; t++) fill(m.program->ropes[i], m.ropes[i], t);
  }

 private:
  static int64_t total_dims(const Program& program) {
    int64_t total = 1;
    for (const RopeSpec& rope : program.ropes) total += rope.dims;
    return total;
  }
  void fill(const RopeSpec& spec, const Rope& rope, int64_t t) const {
    const auto position = static_cast<float>(m.batch.positions[t]);
    const int64_t half = spec.dims / 2;
    float* cosines = const_cast<float*>(rope.cos) + t * half;
    float* sines = const_cast<float*>(rope.sin) + t * half;
    for (int64_t i = 0; i < half; i++) {
      const float angle = position * spec.inv_freq[i];
      cosines[i] = std::cos(angle) * spec.scale;
      sines[i] = std::sin(angle) * spec.scale;
    }
  }
};

class Embedding final : public RowStep {
 public:
  Embedding(const Machine& machine, const Instruction& in) : RowStep(machine, in.out.width), in_(in) {}

 protected:
  int64_t rows() const override { return m.batch.rows; }
  void each(int64_t begin, int64_t end, int thread) override {
    const int32_t* ids = in_.positions ? m.batch.positions : m.batch.tokens;
    const Rows out = m.rows(in_.out);
    for (int64_t t = begin; t < end; t++) {
      if (!in_.residual.present()) {
        look_up(ids[t] + in_.offset, out.row(t));
        continue;
      }
      auto* looked_up = reinterpret_cast<float*>(scratch(thread));
      const float* residual = m.rows(in_.residual).row(t);
      look_up(ids[t] + in_.offset, looked_up);
      for (int64_t i = 0; i < in_.out.width; i++) out.row(t)[i] = looked_up[i] + residual[i];
    }
  }
  size_t scratch_bytes() const override { return static_cast<size_t>(in_.out.width) * sizeof(float); }

 private:
  void look_up(int64_t id, float* out) const {
    const Matrix* segment = in_.weight->segments.data();
    for (; id >= segment->n; segment++) id -= segment->n;
    m.kernels->dequantize_row(*segment, id, in_.scale, out);
  }
  const Instruction& in_;
};

class Norm final : public RowStep {
 public:
  Norm(const Machine& machine, const Instruction& in) : RowStep(machine, in.out.width), in_(in) {}

 protected:
  int64_t rows() const override { return m.rows(in_.in).count; }
  void each(int64_t begin, int64_t end, int) override {
    const Rows in = m.rows(in_.in), out = m.rows(in_.out);
    for (int64_t t = begin; t < end; t++) {
      const float* residual = in_.residual.present() ? m.rows(in_.residual).row(t) : nullptr;
      if (in_.op == Op::rms_norm) {
        m.kernels->rms_norm(in.row(t), in_.gain, residual, in_.in.width, in_.eps, out.row(t));
      } else {
        m.kernels->layer_norm(in.row(t), in_.gain, in_.bias, residual, in_.in.width, in_.eps, out.row(t));
      }
    }
  }

 private:
  const Instruction& in_;
};

class Gather final : public RowStep {
 public:
  Gather(const Machine& machine, const Instruction& in) : RowStep(machine, in.out.width), in_(in) {}

 protected:
  int64_t rows() const override { return m.batch.wanted_rows; }
  void each(int64_t begin, int64_t end, int) override {
    const Rows in = m.rows(in_.in), out = m.rows(in_.out);
    for (int64_t r = begin; r < end; r++)
      std::memcpy(out.row(r), in.row(m.batch.wanted[r]), static_cast<size_t>(in_.in.width) * sizeof(float));
  }

 private:
  const Instruction& in_;
};

}  // namespace

std::unique_ptr<Step> make_ropes(const Machine& machine) { return std::make_unique<RopeTables>(machine); }
std::unique_ptr<Step> make_embedding(const Machine& machine, const Instruction& in) {
  return std::make_unique<Embedding>(machine, in);
}
std::unique_ptr<Step> make_norm(const Machine& machine, const Instruction& in) {
  return std::make_unique<Norm>(machine, in);
}
std::unique_ptr<Step> make_gather(const Machine& machine, const Instruction& in) {
  return std::make_unique<Gather>(machine, in);
}

}  // namespace gristmill
