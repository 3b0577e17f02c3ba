// Leftover elementwise work: a small expression over registers, in pieces of a row that stay in the first
// cache.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine.h"

namespace gristmill {
namespace {

constexpr int64_t kPiece = 256;  // columns at a time

class Pointwise final : public RowStep {
 public:
  Pointwise(const Machine& machine, const Instruction& in)
      : RowStep(machine, in.out.width * static_cast<int64_t>(in.steps.size())), in_(in) {}

 protected:
  int64_t rows() const override { return m.rows(in_.out).count; }
  void each(int64_t begin, int64_t end, int thread) override {
    for (int64_t t = begin; t < end; t++)
      for (int64_t at = 0; at < in_.out.width; at += kPiece)
        piece(t, at, std::min(kPiece, in_.out.width - at), thread);
  }
  size_t scratch_bytes() const override {
    return (in_.inputs.size() + in_.steps.size() + 2) * kPiece * sizeof(float);
  }

 private:
  // Registers are rows of kPiece floats; the last two hold constants.
  void piece(int64_t t, int64_t at, int64_t count, int thread) const {
    auto* registers = reinterpret_cast<float*>(scratch(thread));
    float* next = registers;
    for (const View& input : in_.inputs) {
      load(input, t, at, count, next);
      next += kPiece;
    }
    float* constants = next + in_.steps.size() * kPiece;
    for (const PointwiseStep& step : in_.steps) {
      const float* a = operand(step.a, registers, constants, count);
      const float* b = operand(step.b, registers, constants + kPiece, count);
      apply(step.function, a, b, count, next);
      next += kPiece;
    }
    std::memcpy(m.rows(in_.out).row(t) + at, next - kPiece, static_cast<size_t>(count) * sizeof(float));
  }

  void load(const View& input, int64_t t, int64_t at, int64_t count, float* out) const {
    const float* row = m.rows(input).row(t);
    if (input.width == 1 && in_.out.width != 1) {
      std::fill(out, out + count, row[0]);
    } else {
      std::memcpy(out, row + at, static_cast<size_t>(count) * sizeof(float));
    }
  }

  static const float* operand(const Operand& operand, const float* registers, float* constants,
                              int64_t count) {
    if (operand.reg >= 0) return registers + operand.reg * kPiece;
    std::fill(constants, constants + count, operand.constant);
    return constants;
  }

  void apply(Function function, const float* a, const float* b, int64_t n, float* out) const {
    const auto map = [&](auto formula) {
      for (int64_t i = 0; i < n; i++) out[i] = formula(a[i], b[i]);
    };
    const auto activate = [&](Activation activation) {
      m.kernels->epilogue(a, nullptr, nullptr, nullptr, activation, 1, 0, nullptr, n, out);
    };
    switch (function) {
      case Function::add: return map([](float x, float y) { return x + y; });
      case Function::sub: return map([](float x, float y) { return x - y; });
      case Function::mul: return map([](float x, float y) { return x * y; });
      case Function::div: return map([](float x, float y) { return x / y; });
      case Function::maximum: return map([](float x, float y) { return x > y ? x : y; });
      case Function::minimum: return map([](float x, float y) { return x < y ? x : y; });
      case Function::neg: return map([](float x, float) { return -x; });
      case Function::abs: return map([](float x, float) { return std::fabs(x); });
      case Function::square: return map([](float x, float) { return x * x; });
      case Function::sqrt: return map([](float x, float) { return std::sqrt(x); });
      case Function::rsqrt: return map([](float x, float) { return 1 / std::sqrt(x); });
      case Function::reciprocal: return map([](float x, float) { return 1 / x; });
      case Function::exp: return map([](float x, float) { return std::exp(x); });
      case Function::tanh: return map([](float x, float) { return std::tanh(x); });
      case Function::sigmoid: return map([](float x, float) { return 1 / (1 + std::exp(-x)); });
      case Function::silu: return activate(Activation::silu);
      case Function::gelu: return activate(Activation::gelu);
      case Function::gelu_tanh: return activate(Activation::gelu_tanh);
      case Function::relu: return activate(Activation::relu);
    }
  }

  const Instruction& in_;
};

}  // namespace

std::unique_ptr<Step> make_pointwise(const Machine& machine, const Instruction& in) {
  return std::make_unique<Pointwise>(machine, in);
}

}  // namespace gristmill
