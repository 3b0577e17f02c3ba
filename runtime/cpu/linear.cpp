// Linear: reorder and quantize the input's rows once, then products over tiles of the output, each with what
// adapters add to it and its epilogue.
#include <algorithm>
#include <limits>

#include "machine.h"

namespace gristmill {
namespace {

QuantizedRows quantized_rows(const Machine& m, const Instruction& in, int64_t first) {
  QuantizedRows rows;
  rows.k = in.in.width;
  rows.group = in.act_group;
  rows.q = m.quantized + first * rows.kp();
  rows.scale = m.scales + first * rows.groups();
  rows.sum = m.sums + first * rows.groups();
  return rows;
}

class Reorder final : public RowStep {
 public:
  Reorder(const Machine& machine, const Instruction& in) : RowStep(machine, in.in.width), in_(in) {}

 protected:
  int64_t rows() const override { return m.rows(in_.in).count; }
  void each(int64_t begin, int64_t end, int) override {
    const Rows from = m.rows(in_.in), to = m.input(in_);
    for (int64_t t = begin; t < end; t++) {
      const float* x = from.row(t);
      float* y = to.row(t);
      for (int64_t j = 0; j < in_.in.width; j++) y[j] = x[in_.order[j]];
    }
  }

 private:
  const Instruction& in_;
};

class Quantize final : public RowStep {
 public:
  Quantize(const Machine& machine, const Instruction& in) : RowStep(machine, in.in.width), in_(in) {}

 protected:
  int64_t rows() const override { return m.rows(in_.in).count; }
  void each(int64_t begin, int64_t end, int) override {
    const Rows in = m.input(in_);
    m.kernels->quantize_rows(in.row(begin), in.stride, end - begin, quantized_rows(m, in_, begin));
  }

 private:
  const Instruction& in_;
};

// Output columns [begin, end), never across a segment.
struct Strip {
  int64_t begin = 0, end = 0;
};

class Product final : public Step {
 public:
  Product(const Machine& machine, const Instruction& in, size_t index)
      : Step(machine), in_(in), index_(index), few_(strips(true)), many_(strips(false)) {}

  int64_t open() override {
    rows_ = m.rows(in_.in).count;
    units_ = rows_ <= (in_.act_group ? m.kernels->few_rows : kFewRows) ? &few_ : &many_;
    // rows are taken in several turns between which the weights should stay in a cache, or in one
    const bool one_turn = rows_ <= kFewRows || (in_.act_group && units_ == &many_ && rows_ <= kLongStripRows);
    longest_ = one_turn ? kBand * kMostStrip / std::max<int64_t>(rows_, 1) : 0;
    return (rows_ + kBand - 1) / kBand * static_cast<int64_t>(units_->size());
  }

  // Strips of one band follow each other: its activations, the larger part, stay in the cache. Those that were
  // claimed together are read as one, as far as there is room: streams begin slowly.
  void work(int64_t begin, int64_t end, int thread) override {
    const auto strips = static_cast<int64_t>(units_->size());
    for (int64_t unit = begin; unit < end;) {
      const int64_t first = unit / strips * kBand;
      Strip all = (*units_)[static_cast<size_t>(unit++ % strips)];
      for (; unit < end && unit % strips; unit++) {
        const Strip& next = (*units_)[static_cast<size_t>(unit % strips)];
        if (next.end - all.begin > longest_) break;
        all.end = next.end;
      }
      tile(all, first, std::min(rows_, first + kBand), thread);
    }
  }

  size_t scratch_bytes() const override {
    return m.kernels->product_scratch_bytes(in_.in.width) + 64 +
           static_cast<size_t>(3 * kBand * kMostStrip) * sizeof(float);
  }

 private:
  static constexpr int64_t kFewRows = 4;      // up to here the weights' stream is all there is to it
  static constexpr int64_t kLongStripRows = 16;  // up to here memory still counts
  static constexpr int64_t kBand = 128;       // rows of one tile
  static_assert(kBand % kRunRows == 0, "a run lies in one band");
  static constexpr int64_t kMostStrip = 128;  // columns of one tile
  static constexpr int64_t kTiledBytes = 128 << 10;  // of a strip's weights
  // A strip of streams: most of its bytes, and how many could be read while its streams begin.
  static constexpr int64_t kStreamBytes = 144 << 10, kBeginBytes = 16 << 10;

  std::vector<Strip> strips(bool few) const {
    std::vector<Strip> all;
    int64_t first = 0, most = in_.out.width;
    for (const Matrix& segment : in_.weight->segments) {
      const int64_t row_bytes = segment.row_bytes();
      const int64_t end = std::min(first + segment.n, most);
      const int64_t step = few ? streamed(end - first, row_bytes) : tiled(row_bytes * (in_.glu ? 2 : 1));
      for (int64_t at = first; at < end; at += step) all.push_back({at, std::min(at + step, end)});
      first = end;
    }
    return all;
  }

  // Whole tiles of about kTiledBytes.
  int64_t tiled(int64_t row_bytes) const {
    const int64_t tile = m.kernels->tile;
    return std::clamp(kTiledBytes / row_bytes / tile * tile, tile, std::max(tile, kMostStrip / tile * tile));
  }

  // Streams of an odd number of rows each: as many as have the threads done first, the largest of equals.
  int64_t streamed(int64_t columns, int64_t row_bytes) const {
    int64_t best = 8, least = std::numeric_limits<int64_t>::max();
    for (int64_t step = 8; step <= kMostStrip; step += 16) {
      if (step > 8 && step * row_bytes > kStreamBytes) break;
      const int64_t strips = (columns + step - 1) / step, turns = (strips + m.threads - 1) / m.threads;
      const int64_t cost = turns * (step * row_bytes + kBeginBytes);
      if (cost <= least) best = step, least = cost;
    }
    return best;
  }

  // y[t, n - begin] for columns [begin, end) of all segments as one, with what adapters add; low: memory for
  // that.
  void product(int64_t begin, int64_t end, int64_t first, int64_t rows, float* y, int64_t stride,
               char* memory, float* low) const {
    base_product(begin, end, first, rows, y, stride, memory);
    for (const Run& run : m.runs(in_.in))
      if (run.row >= first && run.row < first + rows && !run.adapter->of(index_).empty())
        add_low_rank(run, begin, end, y + (run.row - first) * stride, stride, memory, low);
  }

  // y += B (scale A x) of one run, for columns [begin, end) of all segments as one.
  void add_low_rank(const Run& run, int64_t begin, int64_t end, float* y, int64_t stride, char* memory,
                    float* low) const {
    for (const LowRank& pair : run.adapter->of(index_)) {
      const int64_t n0 = std::max<int64_t>(begin, 0), n1 = std::min(end, pair.b.n), width = n1 - n0;
      const Matrix& segment = in_.weight->segments[static_cast<size_t>(&pair - run.adapter->of(index_).data())];
      if (pair.rank() && width > 0) {
        const float* x = m.low + run.row * m.low_width + pair.at;
        m.kernels->product_float(pair.b, x, m.low_width, run.rows, n0, n1, low, width, memory);
        for (int64_t t = 0; t < run.rows; t++)
          for (int64_t n = 0; n < width; n++) y[t * stride + n0 - begin + n] += low[t * width + n];
      }
      begin -= segment.n;
      end -= segment.n;
    }
  }

  void base_product(int64_t begin, int64_t end, int64_t first, int64_t rows, float* y, int64_t stride,
                    char* memory) const {
    for (const Matrix& segment : in_.weight->segments) {
      const int64_t n0 = std::max<int64_t>(begin, 0), n1 = std::min(end, segment.n);
      if (n0 < n1) segment_product(segment, n0, n1, first, rows, y + (n0 - begin), stride, memory);
      begin -= segment.n;
      end -= segment.n;
    }
  }
  void segment_product(const Matrix& segment, int64_t n0, int64_t n1, int64_t first, int64_t rows, float* y,
                       int64_t stride, char* memory) const {
    if (in_.act_group) {
      m.kernels->product_int(segment, quantized_rows(m, in_, first), rows, n0, n1, y, stride, memory);
    } else {
      const Rows in = m.input(in_);
      m.kernels->product_float(segment, in.row(first), in.stride, rows, n0, n1, y, stride, memory);
    }
  }

  bool plain() const {
    return !in_.bias && !in_.glu && in_.activation == Activation::none && in_.scale == 1 &&
           in_.softcap == 0 && !in_.residual.present();
  }

  void tile(const Strip& strip, int64_t first, int64_t last, int thread) const {
    const Rows out = m.rows(in_.out);
    const int64_t width = strip.end - strip.begin, rows = last - first, half = in_.out.width;
    char* memory = scratch(thread);
    Carver carver(memory);
    carver.take<char>(static_cast<int64_t>(m.kernels->product_scratch_bytes(in_.in.width)));
    auto* low = carver.take<float>(kBand * kMostStrip);
    if (plain())
      return product(strip.begin, strip.end, first, rows, out.row(first) + strip.begin, out.stride, memory, low);
    auto* y = carver.take<float>(kBand * kMostStrip);
    auto* up = in_.glu ? carver.take<float>(kBand * kMostStrip) : nullptr;
    product(strip.begin, strip.end, first, rows, y, width, memory, low);
    if (up) product(half + strip.begin, half + strip.end, first, rows, up, width, memory, low);
    for (int64_t t = 0; t < rows; t++)
      finish(strip, first + t, y + t * width, up ? up + t * width : nullptr, out);
  }

  void finish(const Strip& strip, int64_t t, const float* y, const float* up, const Rows& out) const {
    const float* residual = in_.residual.present() ? m.rows(in_.residual).row(t) + strip.begin : nullptr;
    const float* bias = in_.bias ? in_.bias + strip.begin : nullptr;
    const float* up_bias = in_.bias && up ? bias + in_.out.width : nullptr;
    m.kernels->epilogue(y, bias, up, up_bias, in_.activation, in_.scale, in_.softcap, residual,
                        strip.end - strip.begin, out.row(t) + strip.begin);
  }

  const Instruction& in_;
  const size_t index_;
  const std::vector<Strip> few_, many_;
  const std::vector<Strip>* units_ = nullptr;
  int64_t rows_ = 0, longest_ = 0;  // columns of strips that are read as one
};

}  // namespace

std::unique_ptr<Step> make_reorder(const Machine& machine, const Instruction& in) {
  return std::make_unique<Reorder>(machine, in);
}
std::unique_ptr<Step> make_quantize(const Machine& machine, const Instruction& in) {
  return std::make_unique<Quantize>(machine, in);
}
std::unique_ptr<Step> make_product(const Machine& machine, const Instruction& in, size_t index) {
  return std::make_unique<Product>(machine, in, index);
}

}  // namespace gristmill
