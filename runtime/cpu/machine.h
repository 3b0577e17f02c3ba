// The memory that a program runs in, and the steps that its instructions become.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "../../kernels/cpu/kernels.h"
#include "adapter.h"
#include "region.h"
#include "program.h"

namespace gristmill {

// Query rows that attention takes together: consecutive rows of one slot with positions ascending by one.
struct Block {
  int64_t row = 0, rows = 0, slot = 0, position = 0;
};

// Neighbouring rows of a value that have the same adapter, at most kRunRows, none of the next multiple of that.
struct Run {
  int64_t row = 0, rows = 0;
  const Adapter* adapter = nullptr;
};

// The rows of one forward, all checked.
struct Batch {
  const int32_t* tokens = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* slots = nullptr;
  const int32_t* wanted = nullptr;  // rows whose logits are asked for
  int64_t rows = 0, wanted_rows = 0;
  float* logits = nullptr;
  int64_t band_first = 0, band_rows = 0;  // the rows at work of each value T; band_rows 0: all
  std::vector<Run> runs, wanted_runs;  // of the rows, of the wanted ones: those with an adapter; reserved alike
  bool one_row_per_slot = false;  // then a row's append and attention need no barrier between them
  std::vector<Block> blocks;      // capacity reserved for max_tokens
};

// A view of this batch: row t begins at data + t * stride.
struct Rows {
  float* data = nullptr;
  int64_t stride = 0, count = 0;
  float* row(int64_t t) const { return data + t * stride; }
};

struct Machine {
  const Program* program = nullptr;
  const Kernels* kernels = nullptr;
  int threads = 1;
  int64_t max_len = 0, max_slots = 0;

  char* arena = nullptr;
  std::vector<Cache> caches;
  std::vector<Rope> ropes;      // tables of this batch, [max_tokens, dims / 2]
  int8_t* quantized = nullptr;  // activations of the linear at work: [max_tokens, kp]
  float* scales = nullptr;      // [max_tokens, groups]
  int32_t* sums = nullptr;
  float* low = nullptr;  // scale * A x of the linear at work: [max_tokens, low_width]
  int64_t low_width = 0;
  float* ordered = nullptr;   // the input of the linear at work with its columns reordered: [max_tokens, k]
  float* queries = nullptr;   // normed and rotated queries of the attention at work
  float* partials = nullptr;  // of a context shared by several threads
  int64_t partial_floats = 0;
  std::atomic<int32_t>* arrivals = nullptr;  // splits done, per block and kv head
  std::vector<char*> scratch;                // per thread, 64-byte aligned
  int64_t block_rows = 1;                    // most rows of a block in this batch
  Batch batch;

  Rows rows(const View& view) const {
    if (view.value == View::kLogits)
      return {batch.logits + view.column, program->vocabulary, batch.wanted_rows};
    const Value& value = program->values[static_cast<size_t>(view.value)];
    float* data = reinterpret_cast<float*>(arena + value.offset) + view.column;
    if (value.requested) return {data, value.width, batch.wanted_rows};
    if (batch.band_rows) return {data + batch.band_first * value.width, value.width, batch.band_rows};
    return {data, value.width, batch.rows};
  }

  // The rows of a value that have an adapter.
  const std::vector<Run>& runs(const View& view) const {
    const bool requested =
        view.value == View::kLogits || program->values[static_cast<size_t>(view.value)].requested;
    return requested ? batch.wanted_runs : batch.runs;
  }

  // What a linear multiplies: its input, or the copy in the weight's column order that make_reorder made.
  Rows input(const Instruction& in) const {
    const Rows plain = rows(in.in);
    return in.order ? Rows{ordered, in.in.width, plain.count} : plain;
  }
};

// One phase of a forward. Units are worked on in any order by any thread; the result does not depend on it.
class Step {
 public:
  explicit Step(const Machine& machine) : m(machine) {}
  virtual ~Step() = default;
  virtual int64_t open() = 0;  // number of units for the batch; 0: nothing to do
  virtual void work(int64_t begin, int64_t end, int thread) = 0;
  virtual size_t scratch_bytes() const { return 0; }  // per thread

 protected:
  char* scratch(int thread) const { return m.scratch[static_cast<size_t>(thread)]; }
  const Machine& m;
};

// A step that treats rows one by one: cheap batches are one unit, others a unit per row.
class RowStep : public Step {
 public:
  RowStep(const Machine& machine, int64_t cost) : Step(machine), cost_(cost) {}
  int64_t open() final {
    const int64_t count = rows();
    return count * cost_ <= kCheap ? count > 0 : count;
  }
  void work(int64_t begin, int64_t end, int thread) final {
    const int64_t count = rows();
    const bool whole = count * cost_ <= kCheap;
    each(whole ? 0 : begin, whole ? count : end, thread);
  }

 protected:
  virtual int64_t rows() const = 0;
  virtual void each(int64_t begin, int64_t end, int thread) = 0;

 private:
  static constexpr int64_t kCheap = 16384;  // elements that one thread does in about a microsecond
  int64_t cost_;                            // elements per row
};

using Steps = std::vector<std::unique_ptr<Step>>;
std::unique_ptr<Step> make_ropes(const Machine& machine);
std::unique_ptr<Step> make_embedding(const Machine& machine, const Instruction& instruction);
std::unique_ptr<Step> make_norm(const Machine& machine, const Instruction& instruction);
std::unique_ptr<Step> make_gather(const Machine& machine, const Instruction& instruction);
std::unique_ptr<Step> make_pointwise(const Machine& machine, const Instruction& instruction);
std::unique_ptr<Step> make_reorder(const Machine& machine, const Instruction& instruction);
std::unique_ptr<Step> make_quantize(const Machine& machine, const Instruction& instruction);
std::unique_ptr<Step> make_low_rank(const Machine& machine, const Instruction& instruction, size_t index);
std::unique_ptr<Step> make_product(const Machine& machine, const Instruction& instruction, size_t index);
std::unique_ptr<Step> make_append(const Machine& machine, const Instruction& instruction);
std::unique_ptr<Step> make_attend(const Machine& machine, const Instruction& instruction);

// Sizes of the attention's shared buffers, for the Machine's builder.
int64_t partial_chunk(const CacheSpec& cache, int64_t heads,
                      int64_t rows);  // floats of one (block, kv head, split)
int64_t attention_block_rows(const Machine& machine, int64_t splits);

}  // namespace gristmill
