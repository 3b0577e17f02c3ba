// The checks that need the whole instruction list: shapes, row kinds, and what the arena holds at each point.
#include <algorithm>

#include "error.h"
#include "program.h"

namespace gristmill {

std::string instruction_label(const Program& program, size_t index) {
  return "instructions[" + std::to_string(index) + "] " + op_name(program.instructions[index].op);
}

namespace {

class Checker {
 public:
  Checker(const Program& program, bool partial)
      : program_(program), partial_(partial), written_(program.values.size()), attended_(program.caches.size()) {}

  void check() {
    for (index_ = 0; index_ < program_.instructions.size(); index_++)
      check_instruction(program_.instructions[index_]);
    if (!logits_written_) fail("program.json: no instruction writes the logits");
    for (size_t i = 0; i < attended_.size(); i++)
      if (!attended_[i]) fail("caches[", i, "]: no attention uses it");
  }

 private:
  using Columns = std::vector<std::pair<int64_t, int64_t>>;  // sorted, disjoint [begin, end)

  template <typename... Parts>
  void need(bool holds, const Parts&... parts) const {
    if (!holds) fail(instruction_label(program_, index_), ": ", parts...);
  }
  const Value& value(const View& view) const { return program_.values[static_cast<size_t>(view.value)]; }
  bool requested(const View& view) const { return view.value == View::kLogits || value(view).requested; }
  int64_t stride(const View& view) const {
    return view.value == View::kLogits ? program_.vocabulary : value(view).width;
  }

  void check_instruction(const Instruction& in) {
    switch (in.op) {
      case Op::embedding: check_embedding(in); break;
      case Op::rms_norm:
      case Op::layer_norm: check_norm(in); break;
      case Op::linear: check_linear(in); break;
      case Op::attention: check_attention(in); break;
      case Op::gather_rows: check_gather(in); break;
      case Op::pointwise: check_pointwise(in); break;
    }
    write(in.out);
  }

  void check_embedding(const Instruction& in) {
    const int64_t ids = in.positions ? program_.max_position : program_.vocabulary;
    need(in.out.width == in.weight->k, "out has width ", in.out.width, ", its weight has k ", in.weight->k);
    need(ids + in.offset <= in.weight->n, "ids reach ", ids + in.offset - 1, ", its weight has ",
         in.weight->n, " rows");
    need(!requested(in.out), "out has rows R, expected T");
    read_residual(in);
  }

  void check_norm(const Instruction& in) {
    need(in.in.width == in.out.width, "in has width ", in.in.width, ", out ", in.out.width);
    need(in.eps >= 0, "eps is negative");
    same_rows(in.in, in.out);
    read(in.in, in.out, "in");
    read_residual(in);
  }

  void check_linear(const Instruction& in) {
    const int64_t n = in.weight->n;
    need(in.in.width == in.weight->k, "in has width ", in.in.width, ", its weight has k ", in.weight->k);
    need(!in.glu || n % 2 == 0, "glu over ", n, " outputs, expected an even number");
    need(in.out.width == (in.glu ? n / 2 : n), "out has width ", in.out.width, ", expected ",
         in.glu ? n / 2 : n);
    need(in.softcap >= 0, "softcap is negative");
    check_act_group(in);
    same_rows(in.in, in.out);
    read(in.in, in.out, "in");
    read_residual(in);
  }

  void check_act_group(const Instruction& in) const {
    const int64_t group = in.act_group;
    need(group == 0 || group == 32 || group == 64 || group == 128, "act_group is ", group,
         ", expected 0, 32, 64 or 128");
    need(group == 0 || in.weight->integer, "act_group is ", group, ", but the weight is float");
    for (const Matrix& segment : in.weight->segments)
      need(group == 0 || segment.group % group == 0, "act_group ", group,
           " does not divide the weight's group ", segment.group);
  }

  void check_attention(const Instruction& in) {
    const CacheSpec& cache = program_.caches[static_cast<size_t>(in.cache)];
    need(in.heads % cache.kv_heads == 0, in.heads, " heads over ", cache.kv_heads, " kv heads");
    need(in.q.width == in.heads * cache.k_dim, "q has width ", in.q.width, ", expected ",
         in.heads * cache.k_dim);
    need(in.k.width == cache.kv_heads * cache.k_dim, "k has width ", in.k.width, ", expected ",
         cache.kv_heads * cache.k_dim);
    need(in.v.width == cache.kv_heads * cache.v_dim, "v has width ", in.v.width, ", expected ",
         cache.kv_heads * cache.v_dim);
    need(in.out.width == in.heads * cache.v_dim, "out has width ", in.out.width, ", expected ",
         in.heads * cache.v_dim);
    need(in.softcap >= 0 && in.eps >= 0, "softcap or norm_eps is negative");
    if (in.rope >= 0) {
      const int64_t dims = program_.ropes[static_cast<size_t>(in.rope)].dims;
      need(dims <= cache.k_dim, "rope rotates ", dims, " columns of heads with ", cache.k_dim);
    }
    if (const int64_t block = in.hadamard)
      need((block & (block - 1)) == 0 && cache.k_dim % block == 0, "hadamard is ", block,
           ", expected a power of two that divides k_dim ", cache.k_dim);
    need(!requested(in.q) && !requested(in.k) && !requested(in.v) && !requested(in.out),
         "q, k, v and out must have rows T");
    check_sharing(in);
    read(in.q, in.out, "q");
    read(in.k, in.out, "k");
    read(in.v, in.out, "v");
  }

  // Two instructions may append to one cache only what is the same.
  void check_sharing(const Instruction& in) {
    const Instruction*& first = attended_[static_cast<size_t>(in.cache)];
    if (!first) first = &in;
    need(first->k == in.k && first->v == in.v && first->rope == in.rope && first->k_norm == in.k_norm &&
             first->eps == in.eps && first->hadamard == in.hadamard,
         "cache ", in.cache, " is shared with an instruction that appends something else");
  }

  void check_gather(const Instruction& in) {
    need(in.in.width == in.out.width, "in has width ", in.in.width, ", out ", in.out.width);
    need(!requested(in.in) && requested(in.out), "expected in with rows T and out with rows R");
    read(in.in, in.out, "in");
  }

  void check_pointwise(const Instruction& in) {
    for (const View& input : in.inputs) {
      need(input.width == in.out.width || input.width == 1, "an input has width ", input.width, ", out ",
           in.out.width);
      same_rows(input, in.out);
      if (input == in.out) {
        read_written(input, "in");
      } else {
        read(input, in.out, "in");
      }
    }
  }

  void same_rows(const View& a, const View& b) const {
    need(requested(a) == requested(b), "mixes rows T and rows R");
  }

  void read_residual(const Instruction& in) {
    if (!in.residual.present()) return;
    need(in.residual.width == in.out.width, "residual has width ", in.residual.width, ", out ", in.out.width);
    same_rows(in.residual, in.out);
    if (in.residual == in.out) {
      read_written(in.residual, "residual");
    } else {
      read(in.residual, in.out, "residual");
    }
  }

  void read(const View& view, const View& out, const char* name) {
    read_written(view, name);
    need(!overlap(view, out), name, " overlaps out in the arena");
  }

  void read_written(const View& view, const char* name) const {
    need(view.value != View::kLogits, name, " reads the logits");
    int64_t at = view.column;
    for (const auto& [begin, end] : written_[static_cast<size_t>(view.value)])
      if (begin <= at && at < end) at = end;
    need(at >= view.column + view.width, name, " reads value ", view.value,
         " before it is written (or after it is overwritten)");
  }

  bool overlap(const View& a, const View& b) const {
    if (a.value == View::kLogits || b.value == View::kLogits) return a.value == b.value;
    if (a.value == b.value) return a.column < b.column + b.width && b.column < a.column + a.width;
    return share_bytes(value(a), value(b));
  }
  bool share_bytes(const Value& a, const Value& b) const {
    const int64_t a_end = a.offset + program_.max_tokens * a.width * 4,
                  b_end = b.offset + program_.max_tokens * b.width * 4;
    return a.offset < b_end && b.offset < a_end;
  }

  // Marks the columns as holding data, and whatever shares bytes with this value as lost.
  void write(const View& out) {
    if (out.value == View::kLogits) {
      need(partial_ || out.width == program_.vocabulary, "writes ", out.width, " of ", program_.vocabulary, " logits");
      need(!logits_written_, "writes the logits a second time");
      logits_written_ = true;
      return;
    }
    for (size_t i = 0; i < written_.size(); i++)
      if (static_cast<int32_t>(i) != out.value && !written_[i].empty() &&
          share_bytes(program_.values[i], value(out)))
        written_[i].clear();
    Columns& columns = written_[static_cast<size_t>(out.value)];
    if (partial_) return add(columns, 0, value(out).width);
    add(columns, out.column, out.column + out.width);
  }

  static void add(Columns& columns, int64_t begin, int64_t end) {
    Columns merged;
    for (const auto& [b, e] : columns) {
      if (e < begin || b > end) {
        merged.emplace_back(b, e);
      } else {
        begin = std::min(begin, b), end = std::max(end, e);
      }
    }
    merged.emplace_back(begin, end);
    std::sort(merged.begin(), merged.end());
    columns = std::move(merged);
  }

  const Program& program_;
  const bool partial_;
  size_t index_ = 0;
  std::vector<Columns> written_;
  std::vector<const Instruction*> attended_;
  bool logits_written_ = false;
};

}  // namespace

void check_program(const Program& program, bool partial) { Checker(program, partial).check(); }

}  // namespace gristmill
