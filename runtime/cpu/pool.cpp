#include "pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <fstream>
#include <set>
#include <string>

#include "../../kernels/cpu/target.h"
#include "error.h"

namespace gristmill {
namespace {

constexpr std::chrono::microseconds kSpin{50};
constexpr int64_t kMostUnits = 0xffff;

uint32_t turn_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
int64_t next_of(uint64_t word) { return static_cast<int64_t>(word >> 16 & kMostUnits); }
int64_t units_of(uint64_t word) { return static_cast<int64_t>(word & kMostUnits); }

void pause() {
#if defined(GRISTMILL_X86)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation | FUTEX_PRIVATE_FLAG, value,
                 nullptr, nullptr, 0);
}

// Those that this process may run on, one of each physical core before the others.
struct Processors {
  std::vector<int> order;
  int cores = 0;
};

Processors usable_processors() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return {{0}, 1};
  Processors found;
  std::vector<int> second;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::string siblings = "cpu" + std::to_string(cpu);
    std::ifstream file("/sys/devices/system/cpu/" + siblings + "/topology/thread_siblings_list");
    std::getline(file, siblings);
    (cores.insert(siblings).second ? found.order : second).push_back(cpu);
  }
  found.cores = static_cast<int>(cores.size());
  found.order.insert(found.order.end(), second.begin(), second.end());
  return found;
}

int pin(pthread_t thread, int processor) {
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(processor, &only);
  return pthread_setaffinity_np(thread, sizeof only, &only);
}

}  // namespace

Pool::Pool(int threads, bool pinned) : threads_(threads) {
  if (pinned) processors_ = usable_processors().order;
  if (pinned && static_cast<int>(processors_.size()) < threads)
    fail("threads is ", threads, ", expected at most ", processors_.size(),
         ", the processors of this process: pinned threads do not share one");
  for (int i = 1; i < threads; i++) starts_.push_back({this, i});
  handles_.reserve(starts_.size());
  start_threads();
}

Pool::~Pool() { stop_threads(); }

void Pool::start_threads() {
  stop_ = false;
  sigset_t all, before;  // signals are the host program's business: none is delivered to these threads
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int status = 0;
  for (size_t i = 0; i < starts_.size() && status == 0; i++) {
    pthread_t handle;
    status = pthread_create(&handle, nullptr, main, &starts_[i]);
    if (status != 0) break;
    handles_.push_back(handle);
    if (!processors_.empty()) status = pin(handle, processors_[i + 1]);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (status == 0) return;
  stop_threads();
  fail("thread ", handles_.size() + 1, " of ", threads_, " cannot be started: ", std::strerror(status),
       "; ask for fewer threads");
}

void Pool::stop_threads() {
  stop_ = true;
  wake_all();
  for (const pthread_t handle : handles_) pthread_join(handle, nullptr);
  handles_.clear();
}

void Pool::forget_threads() noexcept {
  handles_.clear();
  sleepers_ = 0;
  word_ = 0;
}

void* Pool::main(void* start) {
  const Start& mine = *static_cast<Start*>(start);
  mine.pool->help(mine.thread, false);
  return nullptr;
}

void Pool::run(Job& job, int64_t phases, bool alone) {
  if (alone || threads_ == 1) return run_alone(job, phases);
  if (handles_.empty()) start_threads();
  job_ = &job;
  phases_ = phases;
  phase_ = -1;
  shared_ = 0;
  open_next(0);
  help(0, true);
}

void Pool::run_alone(Job& job, int64_t phases) {
  shared_ = 0;
  for (int64_t phase = 0; phase < phases; phase++) {
    const int64_t units = job.open(phase);
    if (units > 0) job.work(phase, 0, units, 0);
  }
}

// Until the run (caller) or the pool (worker) ends: claim, work, wait.
void Pool::help(int thread, bool caller) {
  while (true) {
    const uint64_t word = word_.load(std::memory_order_acquire);
    if (caller ? units_of(word) == 0 : stop_.load(std::memory_order_relaxed)) return;
    if (next_of(word) >= units_of(word)) {
      wait_beyond(word);
    } else {
      claim(word, thread);
    }
  }
}

// Tries to take the next units of the phase that `word` belongs to; holding any keeps that phase open.
void Pool::claim(uint64_t word, int thread) {
  const int64_t left = units_of(word) - next_of(word);
  const int64_t take = std::max<int64_t>(1, left / (2 * threads_));
  if (!word_.compare_exchange_strong(word, word + (static_cast<uint64_t>(take) << 16),
                                     std::memory_order_acq_rel))
    return;
  const int64_t begin = next_of(word) * grain_;
  const int64_t end = std::min(units_, (next_of(word) + take) * grain_);
  job_->work(phase_, begin, end, thread);
  if (done_.fetch_add(take, std::memory_order_acq_rel) + take == units_of(word)) open_next(thread);
}

// By the thread that finished a phase: does what one thread can do, up to the next phase worth sharing.
void Pool::open_next(int thread) {
  while (++phase_ < phases_) {
    units_ = job_->open(phase_);
    if (units_ == 1) job_->work(phase_, 0, 1, thread);
    if (units_ <= 1) continue;
    grain_ = (units_ + kMostUnits - 1) / kMostUnits;
    shared_++;
    done_.store(0, std::memory_order_relaxed);
    return publish((units_ + grain_ - 1) / grain_);
  }
  publish(0);
}

void Pool::publish(int64_t units) {
  const uint64_t turn = uint64_t{turn_of(word_.load(std::memory_order_relaxed))} + 1;
  word_.store(turn << 32 | static_cast<uint64_t>(units), std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_all();
}

void Pool::wake_all() {
  wake_.fetch_add(1, std::memory_order_seq_cst);
  futex(wake_, FUTEX_WAKE, INT_MAX);
}

// Until the turn of `word` is over: spins, then sleeps.
void Pool::wait_beyond(uint64_t word) {
  const auto begin = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 16; i++) {
      if (turn_of(word_.load(std::memory_order_relaxed)) != turn_of(word)) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() - begin < kSpin);
  const uint32_t seen = wake_.load(std::memory_order_seq_cst);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  const bool same = turn_of(word_.load(std::memory_order_seq_cst)) == turn_of(word);
  if (same && !stop_.load(std::memory_order_seq_cst)) futex(wake_, FUTEX_WAIT, seen);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

int default_threads() { return std::max(1, usable_processors().cores); }

}  // namespace gristmill
