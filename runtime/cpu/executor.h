// Runs a Program on the CPU: all memory is laid out at construction, a forward allocates nothing.
#pragma once
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fork.h"
#include "machine.h"
#include "region.h"
#include "pool.h"
#include "program.h"
#include "safetensors.h"

namespace gristmill {

struct Options {
  int threads = 0;  // 0: physical cores of this process
  static constexpr int64_t kCompiled = -1;  // as many as the program was compiled for
  int64_t max_len = 0, max_slots = 0;
  std::string isa = "auto";
  // Weights, caches and arena in huge pages: fewer misses of the address translation, paid for by a copy.
  bool huge_pages = false;
  // A rank's program: the weights that its own file lacks, and columns that other ranks write; see Split.
  std::string base_weights;
  bool partial = false;
  bool pinned = false;  // threads stay on processors of their own, see Pool
  // A forward of fewer multiplications stays on the calling thread: waking others costs more than it brings.
  int64_t alone_below = int64_t{1} << 20;
};

// Where a forward stops, in ascending order: `between(i, first, rows)` is called, on the caller's thread and
// with nothing else at work, when instruction after[i] is done, for all rows (0, T). With band[i] > 0 that
// instruction, a linear over rows T that quantizes its input itself, does so many rows at a time, and the call
// comes after each band. What it throws ends the forward.
struct Cuts {
  std::vector<int64_t> after, band;
  std::function<void(size_t, int64_t, int64_t)> between;
};

// What an instruction took, summed over forwards.
struct InstructionTime {
  std::string label;
  int64_t nanoseconds = 0, bytes = 0;  // bytes: of weights read once
};

class Executor final : private Job {
 public:
  Executor(std::string_view program_json, const std::string& weights_path, const Options& options);
  ~Executor() override = default;

  // One step for `rows` rows: logits[r] is of row wanted[r], and so is hidden[r] [hidden_width()], what the
  // head multiplies, where it is not null. Every argument is checked; calls from several threads take turns.
  void forward(const int32_t* tokens, const int32_t* positions, const int32_t* slots, int64_t rows,
               const int32_t* wanted, int64_t wanted_rows, float* logits, float* hidden = nullptr,
               const Cuts* cuts = nullptr);
  // Slot `to` gets positions `start` to `length` of slot `from`; those before, both hold alike. Of a window's
  // ring, neither slot may have gone on so far past `length` that rows within the window are overwritten.
  void copy_slot(int64_t from, int64_t to, int64_t length, int64_t start = 0);

  void profile(bool enable);
  std::vector<InstructionTime> profile_results();
  // For tests of what judges speed: every instruction begins with a busy wait of so many nanoseconds; 0: none.
  void stall(int64_t nanoseconds);

  // Phases of the last forward that its threads shared: so often they waited for each other.
  int64_t shared_phases() const { return pool_.shared_phases(); }

  const Program& program() const { return program_; }
  char* arena() const { return machine_.arena; }
  const char* isa() const { return machine_.kernels->name; }
  int threads() const { return pool_.threads(); }
  int64_t max_len() const { return machine_.max_len; }
  int64_t max_slots() const { return machine_.max_slots; }
  // The fewest rows that a cache keeps of a slot; max_len() where every cache keeps all.
  int64_t shortest_ring() const { return shortest_ring_; }
  int64_t hidden_width() const;  // 0: the program has no hidden states to give
  uint64_t kv_bytes() const { return kv_.bytes(); }
  uint64_t weight_bytes() const { return weights_->bytes(); }
  int64_t weight_bytes_per_token() const;

 private:
  int64_t open(int64_t phase) noexcept override;
  void work(int64_t phase, int64_t begin, int64_t end, int thread) noexcept override;
  static void after_fork(void* executor) noexcept;

  void check_limits() const;
  void build_steps();
  void add_step(int64_t instruction, std::unique_ptr<Step> step);
  void add_linear(size_t index);
  void lay_out_memory(bool huge_pages);
  size_t lay_out_caches(Carver carver);
  size_t lay_out_scratch(Carver carver);
  void lay_out_quantized(Carver& carver);
  void lay_out_attention(Carver& carver);
  void run_steps(const Cuts* cuts);
  void run_steps(int64_t first, int64_t last);
  void run_bands(const Cuts& cuts, size_t cut, int64_t first, int64_t last);
  void check_cuts(const Cuts& cuts) const;
  int64_t step_after(int64_t instruction) const;
  void check_rows(const int32_t* rows, int64_t count, int64_t limit, const char* what) const;
  void check_slots();
  void cut_blocks();
  const View* head_input() const;
  void copy_hidden(float* out) const;
  bool tiny() const;
  void note_time(int64_t next_step);
  void wait_busily(int64_t step) const;

  std::shared_ptr<const Weights> weights_, base_weights_;  // the second is null but for a rank's program
  Program program_;
  Region arena_, kv_, scratch_;
  Machine machine_;
  Steps steps_;
  std::vector<int64_t> step_instruction_;  // of each step; -1: none
  std::vector<std::pair<int64_t, int32_t>>
      order_;  // (slot, position) and row, sorted; reserved for max_tokens
  int64_t first_step_ = 0;  // of the piece at work
  int64_t shortest_ring_ = 0;
  int64_t alone_below_ = 0;
  int64_t weight_elements_ = 0;  // multiplied for each row
  Pool pool_;
  std::mutex mutex_;

  bool profiling_ = false;
  std::vector<int64_t> times_;  // per step
  int64_t timed_step_ = -1;
  std::chrono::steady_clock::time_point since_;
  std::chrono::nanoseconds stall_{0};

  ForkListener fork_listener_{this, after_fork};
};

}  // namespace gristmill
