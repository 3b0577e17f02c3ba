// The thread pool: every unit exactly once, phases in order, many short runs, sleeping in between, after a
// fork. Build: g++ -std=c++17 -O2 -g -fsanitize=thread -pthread -I runtime/cpu tests/cpp/pool_test.cpp
// runtime/cpu/pool.cpp (also with -fsanitize=address,undefined). Usage: pool_test [runs]
#include "pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

using namespace gristmill;

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  failures++;
}

// Phase p has sizes[p] units; unit u of phase p adds up all units of the phase before, without any atomics: a
// race or a phase begun too early shows as a wrong sum (and to the thread sanitizer).
class Chain final : public Job {
 public:
  explicit Chain(std::vector<int64_t> sizes) : sizes_(std::move(sizes)) {
    for (const int64_t size : sizes_) values_.emplace_back(static_cast<size_t>(size), -1);
  }
  int64_t open(int64_t phase) noexcept override {
    opened_++;
    return sizes_[static_cast<size_t>(phase)];
  }
  void work(int64_t phase, int64_t begin, int64_t end, int thread) noexcept override {
    const auto p = static_cast<size_t>(phase);
    int64_t before = 1;
    for (size_t q = p; q-- > 0 && before == 1;)
      for (const int64_t value : values_[q])
        before = value + 1;  // the last unit of the last phase that had any
    for (int64_t u = begin; u < end; u++) {
      if (values_[p][static_cast<size_t>(u)] != -1 || thread < 0) twice_ = true;
      values_[p][static_cast<size_t>(u)] = before;
    }
  }
  bool right() const {
    int64_t expected = 1;
    for (const auto& phase : values_) {
      for (const int64_t value : phase)
        if (value != expected) return false;
      if (!phase.empty()) expected++;
    }
    return !twice_ && opened_ == static_cast<int64_t>(sizes_.size());
  }

 private:
  std::vector<int64_t> sizes_;
  std::vector<std::vector<int64_t>> values_;
  int64_t opened_ = 0;
  std::atomic<bool> twice_{false};
};

bool run_chain(Pool& pool, bool alone, std::vector<int64_t> sizes) {
  const auto phases = static_cast<int64_t>(sizes.size());
  Chain chain(std::move(sizes));
  pool.run(chain, phases, alone);
  return chain.right();
}

std::vector<int64_t> random_sizes(unsigned& seed) {
  std::vector<int64_t> sizes(1 + rand_r(&seed) % 30);
  for (int64_t& size : sizes) {
    const int kind = rand_r(&seed) % 4;
    size = kind == 0 ? 1 : kind == 1 ? rand_r(&seed) % 3 : rand_r(&seed) % 200;
  }
  return sizes;
}

void test_runs(int threads, int runs, bool pinned) {
  Pool pool(threads, pinned);
  unsigned seed = 7;
  for (int i = 0; i < runs; i++) {
    check(run_chain(pool, i % 5 == 4, random_sizes(seed)), "a run with random phases");
    if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // long enough to fall asleep
  }
  check(run_chain(pool, false, {200000, 1, 70000}), "more units than a word counts");
  check(run_chain(pool, false, {}), "no phases");
  check(run_chain(pool, false, {0, 0}), "only empty phases");
}

[[maybe_unused]] void test_fork() {
  Pool pool(3);
  unsigned seed = 3;
  check(run_chain(pool, false, random_sizes(seed)), "before a fork");
  const pid_t child = fork();
  if (child == 0) {
    pool.forget_threads();
    bool right = true;
    for (int i = 0; i < 20; i++) right = right && run_chain(pool, false, random_sizes(seed));
    _exit(right ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "in the child of a fork");
  check(run_chain(pool, false, random_sizes(seed)), "in the parent after a fork");
}

}  // namespace

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 300;
  for (const int threads : {1, 2, 3, 8}) test_runs(threads, runs, false);
  test_runs(std::min(default_threads(), 4), runs, true);
#if !defined(__SANITIZE_THREAD__)  // which does not support new threads after a fork of many
  test_fork();
#endif
  check(default_threads() >= 1, "default_threads");
  std::printf(failures ? "%d checks failed\n" : "pool: all right\n", failures);
  return failures != 0;
}
