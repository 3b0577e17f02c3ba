#include "roof.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <iterator>

#include "error.h"
#include "kernels.h"
#include "region.h"
#include "pool.h"

namespace gristmill {
namespace {

constexpr int64_t kPiece = 256 << 10;  // bytes per unit
constexpr int64_t kPrefetch = 1024;    // bytes ahead

// Sums 64-byte lines of `streams` equal parts of a piece side by side, in independent registers. Which number
// reads fastest depends on the machine's prefetchers.
template <int streams>
uint64_t read_piece(const char* data) {
  using Line = uint64_t __attribute__((vector_size(32)));
  constexpr int64_t part = kPiece / streams;
  Line sums[4] = {};
  for (int64_t at = 0; at < part; at += 128) {
    for (int stream = 0; stream < streams; stream++) {
      const char* from = data + stream * part + at;
      __builtin_prefetch(from + kPrefetch);
      __builtin_prefetch(from + kPrefetch + 64);
      Line lines[4];
      std::memcpy(lines, from, sizeof lines);
      for (int i = 0; i < 4; i++) sums[i] ^= lines[i];
    }
  }
  const Line all = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  return all[0] ^ all[1] ^ all[2] ^ all[3];
}

constexpr uint64_t (*kReaders[])(const char*) = {read_piece<1>, read_piece<4>, read_piece<8>};

class ReadJob final : public Job {
 public:
  ReadJob(char* data, int64_t units) : data_(data), units_(units) {}
  void choose(size_t reader) { read_ = kReaders[reader]; }
  int64_t open(int64_t) noexcept override { return units_; }
  void work(int64_t, int64_t begin, int64_t end, int) noexcept override {
    uint64_t sum = 0;
    for (int64_t unit = begin; unit < end; unit++) sum ^= read_(data_ + unit * kPiece);
    sink_.fetch_xor(sum, std::memory_order_relaxed);
  }

 private:
  char* data_;
  int64_t units_;
  uint64_t (*read_)(const char*) = kReaders[0];
  std::atomic<uint64_t> sink_{0};
};

class PeakJob final : public Job {
 public:
  PeakJob(const Kernels& kernels, bool integer, int64_t units)
      : run_(integer ? kernels.peak_int : kernels.peak_float), units_(units) {}
  int64_t open(int64_t) noexcept override { return units_; }
  void work(int64_t, int64_t begin, int64_t end, int) noexcept override {
    int64_t done = 0;
    for (int64_t unit = begin; unit < end; unit++) done += run_(kRounds);
    operations_.fetch_add(done, std::memory_order_relaxed);
  }
  int64_t take_operations() { return operations_.exchange(0); }

 private:
  static constexpr int64_t kRounds = 2000;
  int64_t (*run_)(int64_t);
  int64_t units_;
  std::atomic<int64_t> operations_{0};
};

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

double read_bandwidth(int64_t bytes, int threads, double seconds) {
  if (bytes < kPiece || threads < 1 || threads > 256 || !(seconds >= 0 && seconds <= 3600))
    fail("read_bandwidth: got ", bytes, " bytes, ", threads, " threads, ", seconds, " s; expected at least ",
         kPiece, " bytes, 1 to 256 threads, 0 to 3600 s");
  const int64_t units = bytes / kPiece;
  const Region region(static_cast<size_t>(units * kPiece + kPrefetch + 64), "the bandwidth probe");
  std::memset(region.data(), 1, region.bytes());
  Pool pool(threads);
  ReadJob job(region.data(), units);
  const auto pass = [&] {
    const auto start = std::chrono::steady_clock::now();
    pool.run(job, 1, false);
    return seconds_since(start);
  };
  double least = 1e30;
  size_t best = 0;
  for (size_t trial = 0; trial < 2 * std::size(kReaders); trial++) {
    job.choose(trial % std::size(kReaders));
    const double taken = pass();
    if (taken < least) least = taken, best = trial % std::size(kReaders);
  }
  job.choose(best);
  double taken = pass();
  int64_t passes = 1;
  for (; taken < seconds; passes++) taken += pass();
  return static_cast<double>(passes * units * kPiece) / taken / 1e9;
}

double arithmetic_peak(const std::string& isa, bool integer, int threads, double seconds) {
  const Kernels* kernels = find_kernels(isa.c_str());
  if (!kernels || threads < 1 || threads > 256 || !(seconds >= 0 && seconds <= 3600))
    fail("arithmetic_peak: got isa ", quote(isa), ", ", threads, " threads, ", seconds,
         " s; expected an instruction set of this CPU, 1 to 256 threads, 0 to 3600 s");
  Pool pool(threads);
  PeakJob job(*kernels, integer, 64 * int64_t{threads});
  double best = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (int pass = 0; pass < 2 || seconds_since(begin) < seconds; pass++) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(job, 1, false);
    const double taken = seconds_since(start);
    best = std::max(best, static_cast<double>(job.take_operations()) / taken);
  }
  return best / 1e9;
}

}  // namespace gristmill
