#include "executor.h"

#include <algorithm>

#include "error.h"

namespace gristmill {
namespace {

constexpr int kMostThreads = 256;
constexpr int64_t kMostSlots = 65536;
constexpr size_t kMostCacheBytes = size_t{1} << 50;  // far beyond any machine, far below overflow

int choose_threads(int asked) {
  if (asked < 0 || asked > kMostThreads)
    fail("threads is ", asked, ", expected 1 to ", kMostThreads, ", or 0 for all cores");
  return asked ? asked : default_threads();
}

const Kernels* choose_kernels(const std::string& isa) {
  if (const Kernels* kernels = find_kernels(isa.c_str())) return kernels;
  int count = 0;
  const Kernels* const* known = available_kernels(&count);
  std::string names = "auto";
  for (int i = 0; i < count; i++) names += std::string(", ") + known[i]->name;
  fail("isa is ", quote(isa), ", this CPU can run: ", names);
}

}  // namespace

Executor::Executor(std::string_view program_json, const std::string& weights_path, const Options& options)
    : weights_(Weights::open(weights_path, options.huge_pages)),
      base_weights_(options.base_weights.empty() ? nullptr : Weights::open(options.base_weights)),
      program_(parse_program(program_json, *weights_, {base_weights_.get(), options.partial})),
      pool_(choose_threads(options.threads), options.pinned) {
  alone_below_ = options.alone_below;
  machine_.program = &program_;
  machine_.kernels = choose_kernels(options.isa);
  machine_.threads = pool_.threads();
  machine_.max_len = options.max_len == Options::kCompiled ? program_.max_len : options.max_len;
  machine_.max_slots = options.max_slots == Options::kCompiled ? program_.max_slots : options.max_slots;
  check_limits();
  build_steps();
  lay_out_memory(options.huge_pages);
  order_.reserve(static_cast<size_t>(program_.max_tokens));
  machine_.batch.blocks.reserve(static_cast<size_t>(program_.max_tokens));
}

void Executor::check_limits() const {
  if (max_len() < 1 || max_len() > program_.max_position)
    fail("max_len is ", max_len(), ", expected 1 to ", program_.max_position,
         " (the most this model was compiled for)");
  if (max_slots() < 1 || max_slots() > kMostSlots)
    fail("max_slots is ", max_slots(), ", expected 1 to ", kMostSlots);
}

void Executor::build_steps() {
  add_step(-1, make_ropes(machine_));
  for (size_t i = 0; i < program_.instructions.size(); i++) {
    const Instruction& in = program_.instructions[i];
    const auto index = static_cast<int64_t>(i);
    switch (in.op) {
      case Op::embedding: add_step(index, make_embedding(machine_, in)); break;
      case Op::rms_norm:
      case Op::layer_norm: add_step(index, make_norm(machine_, in)); break;
      case Op::linear: add_linear(i); break;
      case Op::attention:
        add_step(index, make_append(machine_, in));
        add_step(index, make_attend(machine_, in));
        break;
      case Op::gather_rows: add_step(index, make_gather(machine_, in)); break;
      case Op::pointwise: add_step(index, make_pointwise(machine_, in)); break;
    }
  }
  times_.assign(steps_.size(), 0);
}

void Executor::add_step(int64_t instruction, std::unique_ptr<Step> step) {
  steps_.push_back(std::move(step));
  step_instruction_.push_back(instruction);
}

// Linears in a row that read the same input in the same column order reorder and quantize it once.
void Executor::add_linear(size_t index) {
  const Instruction& in = program_.instructions[index];
  const Instruction* before = index ? &program_.instructions[index - 1] : nullptr;
  const bool reordered =
      before && before->op == Op::linear && before->in == in.in && before->order == in.order;
  const bool at_hand = reordered && before->act_group == in.act_group;
  const auto number = static_cast<int64_t>(index);
  if (in.order && !reordered) add_step(number, make_reorder(machine_, in));
  if (in.act_group && !at_hand) add_step(number, make_quantize(machine_, in));
  add_step(number, make_product(machine_, in));
  weight_elements_ += in.weight->n * in.weight->k;
}

void Executor::lay_out_memory(bool huge_pages) {
  const size_t kv = lay_out_caches(Carver(nullptr, true)), scratch = lay_out_scratch(Carver(nullptr, true));
  const auto arena = static_cast<size_t>(program_.arena_bytes);
  const size_t total = arena + kv + scratch;
  if (total > physical_memory())
    fail("needs ", total >> 20, " MiB (", kv >> 20, " of them caches for max_len ", max_len(),
         " and max_slots ", max_slots(), "), this machine has ", physical_memory() >> 20,
         " MiB: ask for a smaller max_len or max_slots");
  arena_ = Region(arena, "the arena", huge_pages);
  kv_ = Region(kv, "the KV cache", huge_pages);
  scratch_ = Region(scratch, "scratch memory", huge_pages);
  machine_.arena = arena_.data();
  lay_out_caches(Carver(kv_.data(), true));
  lay_out_scratch(Carver(scratch_.data(), true));
}

size_t Executor::lay_out_caches(Carver carver) {
  machine_.caches.clear();
  shortest_ring_ = max_len();
  for (const CacheSpec& spec : program_.caches) {
    Cache cache;
    cache.k = {spec.k_type, spec.k_dim};
    cache.v = {spec.v_type, spec.v_dim};
    cache.kv_heads = spec.kv_heads;
    cache.window = spec.window;
    const int64_t needed = spec.window ? std::min(max_len(), spec.window + program_.max_tokens) : max_len();
    cache.ring = whole_tiles(needed);
    const int64_t rows = max_slots() * spec.kv_heads * cache.ring;  // < 2^52
    const int64_t row_bytes = cache.k.row_bytes() + cache.v.row_bytes();
    if (static_cast<size_t>(rows) > kMostCacheBytes / static_cast<size_t>(row_bytes) ||
        carver.used() > kMostCacheBytes)
      fail("the caches for max_len ", max_len(), " and max_slots ", max_slots(),
           " are larger than any machine's memory");
    for (CacheRows* side : {&cache.k, &cache.v}) side->data = carver.take<char>(rows * side->row_bytes());
    shortest_ring_ = std::min(shortest_ring_, needed);
    machine_.caches.push_back(cache);
  }
  return carver.used();
}

size_t Executor::lay_out_scratch(Carver carver) {
  machine_.ropes.clear();
  for (const RopeSpec& spec : program_.ropes) {
    Rope rope;
    rope.dims = spec.dims;
    rope.interleaved = spec.interleaved;
    rope.cos = carver.take<float>(program_.max_tokens * spec.dims / 2);
    rope.sin = carver.take<float>(program_.max_tokens * spec.dims / 2);
    machine_.ropes.push_back(rope);
  }
  lay_out_quantized(carver);
  lay_out_attention(carver);
  size_t bytes = 0;
  for (const auto& step : steps_) bytes = std::max(bytes, step->scratch_bytes());
  machine_.scratch.assign(static_cast<size_t>(threads()), nullptr);
  for (char*& scratch : machine_.scratch) {
    carver.begin_page();
    scratch = carver.take<char>(static_cast<int64_t>(bytes));
  }
  return carver.used();
}

void Executor::lay_out_quantized(Carver& carver) {
  int64_t columns = 0, groups = 0, reordered = 0;
  for (const Instruction& in : program_.instructions) {
    if (in.op == Op::linear && in.order) reordered = std::max(reordered, in.in.width);
    if (in.op != Op::linear || !in.act_group) continue;
    columns = std::max(columns, padded_columns(in.in.width));
    groups = std::max(groups, (in.in.width + in.act_group - 1) / in.act_group);
  }
  machine_.quantized = carver.take<int8_t>(program_.max_tokens * columns);
  machine_.scales = carver.take<float>(program_.max_tokens * groups);
  machine_.sums = carver.take<int32_t>(program_.max_tokens * groups);
  machine_.ordered = carver.take<float>(program_.max_tokens * reordered);
}

void Executor::lay_out_attention(Carver& carver) {
  constexpr int64_t kPartialFloats = int64_t{4} << 20;
  int64_t width = 0, kv_heads = 0;
  for (const Instruction& in : program_.instructions) {
    if (in.op != Op::attention) continue;
    width = std::max(width, in.q.width);
    kv_heads = std::max(kv_heads, program_.caches[static_cast<size_t>(in.cache)].kv_heads);
  }
  machine_.queries = carver.take<float>(program_.max_tokens * width);
  machine_.partial_floats = width ? kPartialFloats : 0;
  machine_.partials = carver.take<float>(machine_.partial_floats);
  machine_.arrivals = carver.take<std::atomic<int32_t>>(4 * threads());
}

int64_t Executor::weight_bytes_per_token() const {
  int64_t bytes = 0;
  for (const Instruction& in : program_.instructions) {
    if (in.op == Op::linear) bytes += in.weight->bytes;
    if (in.op == Op::embedding) bytes += in.weight->bytes / in.weight->n;
  }
  return bytes;
}

void Executor::after_fork(void* executor) noexcept {
  auto* self = static_cast<Executor*>(executor);
  new (&self->mutex_) std::mutex;  // whoever held it stayed in the parent
  self->pool_.forget_threads();
}

void Executor::profile(bool enable) {
  const std::lock_guard<std::mutex> lock(mutex_);
  profiling_ = enable;
  timed_step_ = -1;
  std::fill(times_.begin(), times_.end(), 0);
}

void Executor::stall(int64_t nanoseconds) {
  constexpr int64_t kMost = 1'000'000'000;
  if (nanoseconds < 0 || nanoseconds > kMost) fail("stall: got ", nanoseconds, " ns, expected 0 to ", kMost);
  const std::lock_guard<std::mutex> lock(mutex_);
  stall_ = std::chrono::nanoseconds(nanoseconds);
}

std::vector<InstructionTime> Executor::profile_results() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<InstructionTime> results;
  for (size_t i = 0; i < program_.instructions.size(); i++) {
    const Instruction& in = program_.instructions[i];
    results.push_back({instruction_label(program_, i), 0, in.op == Op::linear ? in.weight->bytes : 0});
  }
  for (size_t i = 0; i < times_.size(); i++)
    if (step_instruction_[i] >= 0)
      results[static_cast<size_t>(step_instruction_[i])].nanoseconds += times_[i];
  return results;
}

}  // namespace gristmill
