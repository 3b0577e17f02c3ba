// Threads that run the phases of one job together.
//
// A phase is a number of units; a thread claims a run of units, works, and counts them as done. The thread
// that finishes the last unit of a phase opens the next one. So nobody waits for a thread that holds no work:
// a thread that another process has pushed off its core delays the others only if it was pushed off in the
// middle of a claim. Claims shrink as a phase drains (a share of what is left), which unit goes to which
// thread never shows in the results. Phases with a single unit run on the thread that opened them, without
// telling anyone. Who finds nothing to claim spins for some 50 us, then sleeps on a futex.
#pragma once
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace gristmill {

class Job {
 public:
  virtual ~Job() = default;
  // Called once per phase, by one thread, when all earlier phases are done: the number of units (0: nothing
  // to do).
  virtual int64_t open(int64_t phase) noexcept = 0;
  virtual void work(int64_t phase, int64_t begin, int64_t end, int thread) noexcept = 0;
};

class Pool {
 public:
  // The caller of run() is thread 0. pinned: each other thread stays on a processor of its own, on physical
  // cores first; one is left for the caller. Throws Error when the threads or processors cannot be had.
  explicit Pool(int threads, bool pinned = false);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Runs phases [0, phases) to the end. `alone`: on this thread only. One run at a time.
  void run(Job& job, int64_t phases, bool alone);
  int threads() const { return threads_; }
  int64_t shared_phases() const { return shared_; }  // of the last run
  // In the child of a fork: the threads are gone, forget them and start new ones at the next run.
  void forget_threads() noexcept;

 private:
  struct Start {
    Pool* pool;
    int thread;
  };
  static void* main(void* start);
  void start_threads();
  void stop_threads();
  void run_alone(Job& job, int64_t phases);
  void help(int thread, bool caller);
  void claim(uint64_t word, int thread);
  void open_next(int thread);
  void publish(int64_t units);
  void wake_all();
  void wait_beyond(uint64_t word);

  // turn (32 bits) | next unit (16) | units (16). A new turn per published phase; no units: no run in flight.
  alignas(64) std::atomic<uint64_t> word_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> wake_{0};  // the futex
  std::atomic<int32_t> sleepers_{0};
  std::atomic<bool> stop_{false};
  // Written by the opener of a phase, read by holders of its units.
  Job* job_ = nullptr;
  int64_t phase_ = 0, phases_ = 0, units_ = 0, grain_ = 1, shared_ = 0;

  int threads_;
  std::vector<int> processors_;  // of the threads, when pinned
  std::vector<Start> starts_;
  std::vector<pthread_t> handles_;  // empty until started, and in the child of a fork
};

// Physical cores that this process may run on.
int default_threads();

}  // namespace gristmill
