// One forward: check the rows, cut them into blocks, run the steps.
#include <algorithm>
#include <cstring>

#include "error.h"
#include "executor.h"

namespace gristmill {
void Executor::forward(const int32_t* tokens, const int32_t* positions, const int32_t* slots, int64_t rows,
                       const int32_t* wanted, int64_t wanted_rows, float* logits, float* hidden,
                       const int32_t* adapters, const Cuts* cuts) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Batch& batch = machine_.batch;
  batch.tokens = tokens;
  batch.positions = positions;
  batch.slots = slots;
  batch.rows = rows;
  batch.wanted = wanted;
  batch.wanted_rows = wanted_rows;
  batch.logits = logits;
  const int64_t most = program_.max_tokens;
  if (rows < 1 || rows > most) fail("got ", rows, " tokens, expected 1 to ", most, " in one forward");
  if (wanted_rows < 0 || wanted_rows > most)
    fail("got ", wanted_rows, " rows, expected 0 to ", most, " in one forward");
  check_rows(tokens, rows, program_.vocabulary, "tokens");
  check_rows(positions, rows, max_len(), "positions");
  check_rows(slots, rows, max_slots(), "slots");
  check_rows(wanted, wanted_rows, rows, "rows");
  check_slots();
  cut_runs(adapters);
  if (hidden && !head_input())
    fail("this program has no hidden states to give: its last instruction is not the head, a linear that "
         "writes the logits");
  if (cuts) check_cuts(*cuts);
  if (cuts && !cuts->after.empty() && adapters) fail("rows of a rank's program cannot have adapters");
  cut_blocks();
  run_steps(cuts);
  if (hidden) copy_hidden(hidden);
}

void Executor::run_steps(const Cuts* cuts) {
  int64_t first = 0;
  machine_.batch.band_rows = 0;
  for (size_t i = 0; cuts && i < cuts->after.size(); i++) {
    const int64_t last = step_after(cuts->after[i]);
    if (cuts->band[i] > 0 && cuts->band[i] < machine_.batch.rows) {
      const int64_t banded = step_after(cuts->after[i] - 1);
      run_steps(first, banded);
      run_bands(*cuts, i, banded, last);
    } else {
      run_steps(first, last);
      cuts->between(i, 0, machine_.batch.rows);
    }
    first = last;
  }
  run_steps(first, static_cast<int64_t>(steps_.size()));
}

void Executor::run_bands(const Cuts& cuts, size_t cut, int64_t first, int64_t last) {
  Batch& batch = machine_.batch;
  for (int64_t row = 0; row < batch.rows; row += cuts.band[cut]) {
    batch.band_first = row;
    batch.band_rows = std::min(cuts.band[cut], batch.rows - row);
    run_steps(first, last);
    cuts.between(cut, batch.band_first, batch.band_rows);
  }
  batch.band_rows = 0;
}

void Executor::check_cuts(const Cuts& cuts) const {
  const auto count = static_cast<int64_t>(program_.instructions.size());
  if (cuts.band.size() != cuts.after.size())
    fail("got ", cuts.after.size(), " cuts and ", cuts.band.size(), " bands, expected as many of each");
  for (size_t i = 0; i < cuts.after.size(); i++) {
    const int64_t at = cuts.after[i];
    if (at < (i ? cuts.after[i - 1] + 1 : 0) || at >= count)
      fail("cut ", i, " is after instruction ", at, ", expected ascending ones below ", count);
    const auto& in = program_.instructions[static_cast<size_t>(at)];
    const auto whole = [&](const View& view) {
      return view.value != View::kLogits && !program_.values[static_cast<size_t>(view.value)].requested;
    };
    if (cuts.band[i] && (in.op != Op::linear || in.order || !whole(in.out)))
      fail("cut ", i, " has bands, and instruction ", at, " is no linear over rows T in plain order");
    const auto* before = at ? &program_.instructions[static_cast<size_t>(at) - 1] : nullptr;
    if (cuts.band[i] && before && before->op == Op::linear && before->in == in.in)
      fail("cut ", i, " has bands, and instruction ", at, " reads what the one before it has quantized");
  }
}

// The first step behind an instruction's.
int64_t Executor::step_after(int64_t instruction) const {
  const auto end = std::upper_bound(step_instruction_.begin(), step_instruction_.end(), instruction);
  return end - step_instruction_.begin();
}

void Executor::run_steps(int64_t first, int64_t last) {
  if (first == last) return;
  first_step_ = first;
  pool_.run(*this, last - first, tiny());
  if (profiling_) note_time(-1);
}

// What the head multiplies, where the head comes last: nothing has overwritten its input then.
const View* Executor::head_input() const {
  const Instruction& last = program_.instructions.back();
  return last.op == Op::linear && last.out.value == View::kLogits ? &last.in : nullptr;
}

int64_t Executor::hidden_width() const { return head_input() ? head_input()->width : 0; }

void Executor::copy_hidden(float* out) const {
  const Rows rows = machine_.rows(*head_input());
  const int64_t width = hidden_width();
  for (int64_t r = 0; r < rows.count; r++)
    std::memcpy(out + r * width, rows.row(r), static_cast<size_t>(width) * sizeof(float));
}

void Executor::check_rows(const int32_t* values, int64_t count, int64_t limit, const char* what) const {
  for (int64_t i = 0; i < count; i++)
    if (values[i] < 0 || values[i] >= limit)
      fail(what, "[", i, "] is ", values[i], ", expected 0 to ", limit - 1);
}

// No position of a slot twice, and none so far apart that one would overwrite the other in a window's ring.
void Executor::check_slots() {
  Batch& batch = machine_.batch;
  order_.clear();
  for (int32_t t = 0; t < batch.rows; t++)
    order_.emplace_back(int64_t{batch.slots[t]} << 32 | batch.positions[t], t);
  std::sort(order_.begin(), order_.end());
  batch.one_row_per_slot = true;
  size_t first = 0;  // of the slot
  for (size_t i = 1; i < order_.size(); i++) {
    const int64_t slot = order_[i].first >> 32;
    if (slot != order_[first].first >> 32) {
      first = i;
      continue;
    }
    batch.one_row_per_slot = false;
    const int64_t span = order_[i].first - order_[first].first;
    if (order_[i].first == order_[i - 1].first)
      fail("slot ", slot, " has position ", batch.positions[order_[i].second], " twice in one forward");
    if (span >= shortest_ring_)
      fail("slot ", slot, " has positions ", span, " apart in one forward, at most ", shortest_ring_ - 1,
           " are possible");
  }
}

void Executor::cut_blocks() {
  Batch& batch = machine_.batch;
  const int32_t last = *std::max_element(batch.positions, batch.positions + batch.rows);
  const int64_t most = attention_block_rows(machine_, last / kSplit + 1);
  batch.blocks.clear();
  machine_.block_rows = 1;
  for (int64_t t = 0; t < batch.rows; t++) {
    Block* block = batch.blocks.empty() ? nullptr : &batch.blocks.back();
    if (block && block->rows < most && block->slot == batch.slots[t] &&
        block->position + block->rows == batch.positions[t]) {
      block->rows++;
      machine_.block_rows = std::max(machine_.block_rows, block->rows);
    } else {
      batch.blocks.push_back({t, 1, batch.slots[t], batch.positions[t]});
    }
  }
}

// The adapter of a row; null: none.
const Adapter* Executor::adapter(const int32_t* adapters, int64_t row) const {
  const int32_t number = adapters[row];
  if (number == -1) return nullptr;
  const auto count = static_cast<int32_t>(adapters_.size());
  if (number < 0 || number >= count || !adapters_[static_cast<size_t>(number)])
    fail("adapters[", row, "] is ", number, ", expected -1 (none) or the number of an adapter there is");
  return adapters_[static_cast<size_t>(number)].get();
}

void Executor::cut_runs(const int32_t* adapters) {
  Batch& batch = machine_.batch;
  batch.runs.clear();
  batch.wanted_runs.clear();
  if (!adapters) return;
  const auto add = [](std::vector<Run>& runs, int64_t row, const Adapter* adapter) {
    Run* last = runs.empty() ? nullptr : &runs.back();
    if (last && last->adapter == adapter && last->row + last->rows == row && row % kRunRows != 0) {
      last->rows++;
    } else if (adapter) {
      runs.push_back({row, 1, adapter});
    }
  };
  for (int64_t t = 0; t < batch.rows; t++) add(batch.runs, t, adapter(adapters, t));
  for (int64_t r = 0; r < batch.wanted_rows; r++)
    add(batch.wanted_runs, r, adapter(adapters, batch.wanted[r]));
}

bool Executor::tiny() const {
  return static_cast<double>(machine_.batch.rows) * static_cast<double>(weight_elements_) <
         static_cast<double>(alone_below_);
}

int64_t Executor::open(int64_t phase) noexcept {
  phase += first_step_;
  if (profiling_) note_time(phase);
  if (stall_.count()) wait_busily(phase);
  return steps_[static_cast<size_t>(phase)]->open();
}

void Executor::work(int64_t phase, int64_t begin, int64_t end, int thread) noexcept {
  steps_[static_cast<size_t>(first_step_ + phase)]->work(begin, end, thread);
}

// At the first step of each instruction.
void Executor::wait_busily(int64_t step) const {
  const auto at = static_cast<size_t>(step);
  if (step_instruction_[at] < 0 || (at && step_instruction_[at - 1] == step_instruction_[at])) return;
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - begin < stall_) {
  }
}

// The time since the last call belongs to the step that was opened then.
void Executor::note_time(int64_t next_step) {
  const auto now = std::chrono::steady_clock::now();
  if (timed_step_ >= 0)
    times_[static_cast<size_t>(timed_step_)] += std::chrono::nanoseconds(now - since_).count();
  timed_step_ = next_step;
  since_ = now;
}

namespace {
void copy_rows(const CacheRows& side, int64_t from, int64_t to, int64_t rows) {
  std::memcpy(side.tile(to), side.tile(from), static_cast<size_t>(rows * side.row_bytes()));
}
}  // namespace

// In whole tiles, since int8 rows are interleaved in theirs. What shares a tile with the range is the same row
// on both sides where it still counts: before `start` by the caller's word, and in a wrapped ring an older
// position that either also precedes `start` or belongs to the range itself.
void Executor::copy_slot(int64_t from, int64_t to, int64_t length, int64_t start) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto check = [](int64_t value, int64_t limit, const char* what) {
    if (value < 0 || value > limit) fail("copy_slot: ", what, " is ", value, ", expected 0 to ", limit);
  };
  check(from, max_slots() - 1, "the source");
  check(to, max_slots() - 1, "the destination");
  check(length, max_len(), "the length");
  check(start, length, "the start");
  if (from == to || start == length) return;
  for (const Cache& cache : machine_.caches) {
    const int64_t first = start / CacheRows::kTile * CacheRows::kTile;
    const int64_t rows = std::min(whole_tiles(length) - first, cache.ring);
    const int64_t before_wrap = std::min(rows, cache.ring - first % cache.ring);
    for (const CacheRows& side : {cache.k, cache.v})
      for (int64_t head = 0; head < cache.kv_heads; head++) {
        copy_rows(side, cache.row(from, head, first), cache.row(to, head, first), before_wrap);
        copy_rows(side, cache.row(from, head, 0), cache.row(to, head, 0), rows - before_wrap);
      }
  }
}

}  // namespace gristmill
