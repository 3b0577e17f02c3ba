// Attention: norm and rotate heads, append to the cache, attend in splits of the context, combine the splits
// in order.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace gristmill {
namespace {

constexpr int64_t kPartialBudget = int64_t{4} << 20;  // bytes of one thread's partials that blocks are cut to

// What both steps of an attention share.
class AttentionStep : public Step {
 public:
  AttentionStep(const Machine& machine, const Instruction& in)
      : Step(machine),
        in_(in),
        spec_(machine.program->caches[static_cast<size_t>(in.cache)]),
        group_(in.heads / spec_.kv_heads) {}

 protected:
  const Cache& cache() const { return m.caches[static_cast<size_t>(in_.cache)]; }
  bool bare_queries() const { return !in_.q_norm && in_.rope < 0 && !in_.hadamard; }

  void norm_and_rotate(const float* in, const float* norm, int64_t t, float* out) const {
    if (norm) {
      m.kernels->rms_norm(in, norm, nullptr, spec_.k_dim, in_.eps, out);
    } else {
      std::memcpy(out, in, static_cast<size_t>(spec_.k_dim) * sizeof(float));
    }
    if (in_.rope >= 0) m.kernels->rotate(out, m.ropes[static_cast<size_t>(in_.rope)], t);
    if (in_.hadamard) m.kernels->hadamard(out, spec_.k_dim, in_.hadamard);
  }

  void append(int64_t t, int64_t head, float* memory) const {
    norm_and_rotate(m.rows(in_.k).row(t) + head * spec_.k_dim, in_.k_norm, t, memory);
    const float* v = m.rows(in_.v).row(t) + head * spec_.v_dim;
    m.kernels->append(cache(), m.batch.slots[t], head, m.batch.positions[t], memory, v);
  }

  const Instruction& in_;
  const CacheSpec& spec_;
  const int64_t group_;  // query heads per kv head
};

// All appends of a batch, and its queries made ready; skipped where Attend does both itself.
class Append final : public AttentionStep {
 public:
  using AttentionStep::AttentionStep;

  int64_t open() override { return m.batch.one_row_per_slot ? 0 : m.batch.rows; }

  void work(int64_t begin, int64_t end, int thread) override {
    auto* memory = reinterpret_cast<float*>(scratch(thread));
    const Rows q = m.rows(in_.q);
    for (int64_t t = begin; t < end; t++) {
      for (int64_t head = 0; head < spec_.kv_heads; head++) append(t, head, memory);
      if (bare_queries()) continue;
      float* out = m.queries + t * in_.q.width;
      for (int64_t at = 0; at < in_.q.width; at += spec_.k_dim)
        norm_and_rotate(q.row(t) + at, in_.q_norm, t, out + at);
    }
  }

  size_t scratch_bytes() const override { return static_cast<size_t>(spec_.k_dim) * sizeof(float); }
};

// Partial results of one block and kv head over one split.
struct Partial {
  float *m, *l, *acc;
};

class Attend final : public AttentionStep {
 public:
  using AttentionStep::AttentionStep;

  // A unit is a block and a kv head; where these are too few for the threads, also a split of the context.
  int64_t open() override {
    const auto blocks = static_cast<int64_t>(m.batch.blocks.size());
    chunk_ = partial_chunk(spec_, in_.heads, m.block_rows);
    first_unit_.clear();
    int64_t units = 0;
    for (const Block& block : m.batch.blocks) {
      first_unit_.push_back(units);
      units += spec_.kv_heads * splits(block);
      if (first_unit_.size() >= first_unit_.capacity()) break;
    }
    const int64_t whole = blocks * spec_.kv_heads;
    spread_ = m.threads > 1 && whole < 4 * m.threads && units > whole && units * chunk_ <= m.partial_floats;
    if (!spread_) return whole;
    for (int64_t i = 0; i < whole; i++) m.arrivals[i].store(0, std::memory_order_relaxed);
    return units;
  }

  void work(int64_t begin, int64_t end, int thread) override {
    Memory memory;
    layout(Carver(scratch(thread)), &memory);
    for (int64_t unit = begin; unit < end; unit++) {
      if (spread_) {
        work_split(unit, memory);
      } else {
        work_whole(unit, memory);
      }
    }
  }

  size_t scratch_bytes() const override {
    Memory unused;
    return layout(Carver(), &unused);
  }

  void reserve() { first_unit_.reserve(static_cast<size_t>(4 * m.threads)); }

 private:
  // A thread's, and whose queries are prepared in it.
  struct Memory {
    char* attention = nullptr;
    float *head = nullptr, *partials = nullptr;
    const Block* prepared = nullptr;
    int64_t prepared_head = -1;
  };

  // First and one-past-last split that any row of the block, or one row, sees.
  int64_t first_split(int64_t position) const {
    return spec_.window ? std::max<int64_t>(0, position - spec_.window + 1) / kSplit : 0;
  }
  int64_t end_split(int64_t position) const { return position / kSplit + 1; }
  int64_t splits(const Block& block) const {
    return end_split(block.position + block.rows - 1) - first_split(block.position);
  }

  size_t layout(Carver carver, Memory* memory) const {
    const auto bytes =
        static_cast<int64_t>(m.kernels->attention_scratch_bytes(group_, spec_.k_dim, spec_.v_dim));
    const int64_t most_splits = (m.max_len + kSplit - 1) / kSplit;
    memory->attention = carver.take<char>(bytes);
    memory->head = carver.take<float>(group_ * spec_.k_dim);
    memory->partials = carver.take<float>(
        most_splits * partial_chunk(spec_, in_.heads, attention_block_rows(m, most_splits)));
    return carver.used() + kPartialBudget;
  }

  Partial partial(float* base, const Block& block) const {
    return {base, base + block.rows * group_, base + 2 * block.rows * group_};
  }

  // Splits of a block go last row first, since later rows see more.
  void work_whole(int64_t unit, Memory& memory) const {
    const auto blocks = static_cast<int64_t>(m.batch.blocks.size());
    const Block& block = m.batch.blocks[static_cast<size_t>(blocks - 1 - unit / spec_.kv_heads)];
    const int64_t head = unit % spec_.kv_heads, first = first_split(block.position);
    for (int64_t i = 0; i < splits(block); i++)
      attend(block, head, first + i, memory.partials + i * chunk_, memory);
    combine(block, head, memory.partials);
  }

  // Who finishes the last split of a block and kv head combines them all.
  void work_split(int64_t unit, Memory& memory) const {
    const auto after = std::upper_bound(first_unit_.begin(), first_unit_.end(), unit);
    const auto index = after - first_unit_.begin() - 1;
    const Block& block = m.batch.blocks[static_cast<size_t>(index)];
    const int64_t count = splits(block), local = unit - first_unit_[static_cast<size_t>(index)];
    const int64_t head = local / count, split = local % count;
    float* partials = m.partials + (unit - split) * chunk_;
    attend(block, head, first_split(block.position) + split, partials + split * chunk_, memory);
    const int32_t arrived =
        m.arrivals[index * spec_.kv_heads + head].fetch_add(1, std::memory_order_acq_rel) + 1;
    if (arrived == count) combine(block, head, partials);
  }

  // With one row per slot, the row is appended by its last split.
  void attend(const Block& block, int64_t head, int64_t split, float* chunk, Memory& memory) const {
    if (m.batch.one_row_per_slot && split == end_split(block.position) - 1)
      append(block.row, head, memory.head);
    prepare(block, head, memory);
    const Partial out = partial(chunk, block);
    m.kernels->attention_split(cache(), shape(), block.rows, block.slot, head, block.position, split, out.m,
                               out.l, out.acc, memory.attention);
  }

  AttentionShape shape() const { return {in_.heads, in_.scale, in_.softcap, in_.sinks}; }

  void prepare(const Block& block, int64_t head, Memory& memory) const {
    if (memory.prepared == &block && memory.prepared_head == head) return;
    memory.prepared = &block;
    memory.prepared_head = head;
    int64_t stride = 0;
    const float* q = queries(block, head, memory.head, &stride);
    m.kernels->attention_prepare(cache(), shape(), q, stride, block.rows, memory.attention);
  }

  // The block's queries of one kv head; with one row per slot they are normed and rotated here.
  const float* queries(const Block& block, int64_t head, float* own, int64_t* stride) const {
    const int64_t column = head * group_ * spec_.k_dim;
    const Rows q = m.rows(in_.q);
    *stride = bare_queries() ? q.stride : in_.q.width;
    if (bare_queries()) return q.row(block.row) + column;
    if (!m.batch.one_row_per_slot) return m.queries + block.row * in_.q.width + column;
    for (int64_t at = 0; at < group_ * spec_.k_dim; at += spec_.k_dim)
      norm_and_rotate(q.row(block.row) + column + at, in_.q_norm, block.row, own + at);
    return own;
  }

  void combine(const Block& block, int64_t head, float* partials) const {
    const Rows out = m.rows(in_.out);
    for (int64_t t = 0; t < block.rows; t++) {
      const int64_t position = block.position + t;
      const int64_t skip = first_split(position) - first_split(block.position);
      const Partial first = partial(partials + skip * chunk_, block);
      for (int64_t h = 0; h < group_; h++) {
        const int64_t at = t * group_ + h, query_head = head * group_ + h;
        const float* sink = in_.sinks ? in_.sinks + query_head : nullptr;
        m.kernels->attention_combine(first.m + at, first.l + at, chunk_, first.acc + at * spec_.v_dim, chunk_,
                                     end_split(position) - first_split(position), sink, spec_.v_dim,
                                     out.row(block.row + t) + query_head * spec_.v_dim);
      }
    }
  }

  int64_t chunk_ = 0;
  bool spread_ = false;
  std::vector<int64_t> first_unit_;  // of each block, when spread
};

}  // namespace

int64_t partial_chunk(const CacheSpec& cache, int64_t heads, int64_t rows) {
  return (rows * heads / cache.kv_heads * (cache.v_dim + 2) + 15) / 16 * 16;
}

// So many rows that the partials of all splits keep to their budget; at least one.
int64_t attention_block_rows(const Machine& machine, int64_t splits) {
  int64_t rows = machine.kernels->attention_rows;
  for (const Instruction& in : machine.program->instructions) {
    if (in.op != Op::attention) continue;
    const CacheSpec& cache = machine.program->caches[static_cast<size_t>(in.cache)];
    const int64_t row_bytes = splits * 4 * (in.heads / cache.kv_heads) * (cache.v_dim + 2);
    rows = std::min(rows, std::max<int64_t>(1, kPartialBudget / row_bytes));
  }
  return rows;
}

std::unique_ptr<Step> make_append(const Machine& machine, const Instruction& in) {
  return std::make_unique<Append>(machine, in);
}
std::unique_ptr<Step> make_attend(const Machine& machine, const Instruction& in) {
  auto step = std::make_unique<Attend>(machine, in);
  step->reserve();
  return step;
}

}  // namespace gristmill
