// Speed of the CPU kernels on the linears of TinyLlama-1.1B, beside a read-only stream over the same weights.
//
//   g++ -std=c++17 -O2 -pthread -I kernels/cpu benchmarks/cpp/kernels_bench.cpp kernels/cpu/*.cpp -o
//   kernels_bench
//   [ISA=avx2] [SCHEME="int4 g128"] ./kernels_bench [decode|batch|prefill|attention|all] [threads]
//   [repetitions]
//
// Stream and instruction sets take turns within each repetition; printed are medians. GB/s counts weights and
// scales, "of stream" is the share of the stream's rate, GOPS counts two operations per weight and row.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "half.h"
#include "kernels.h"

using namespace gristmill;

namespace {

struct Shape {
  int64_t n, k;
};
constexpr Shape kLayer[] = {{2560, 2048}, {2048, 2048}, {11264, 2048}, {2048, 5632}};
constexpr Shape kHead = {32000, 2048};
constexpr int64_t kWidest = 5632, kMostRows = 256;

template <typename T>
T* allocate(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  return static_cast<T*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64));
}

// ---- threads: a job of many chunks, claimed one by one ----

int64_t thread_nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec * 1000000000 + now.tv_nsec;
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int id = 1; id < threads; id++) workers_.emplace_back([this, id] { work(id); });
  }
  ~Pool() {
    stop_ = true;
    round_++;
    for (auto& worker : workers_) worker.join();
  }
  // f(chunk, thread) for all chunks
  void run(int64_t chunks, const std::function<void(int64_t, int)>& f) {
    f_ = &f;
    chunks_ = chunks;
    next_ = 0;
    busy_ = threads_ - 1;
    round_++;
    claim(0);
    while (busy_.load()) std::this_thread::yield();
  }
  // Seconds of work since the last call, per thread.
  double take_seconds() { return 1e-9 * static_cast<double>(nanoseconds_.exchange(0)) / threads_; }
  int threads() const { return threads_; }

 private:
  void claim(int id) {
    const int64_t begin = thread_nanoseconds();
    for (int64_t i = next_++; i < chunks_; i = next_++) (*f_)(i, id);
    nanoseconds_ += thread_nanoseconds() - begin;
  }
  void work(int id) {
    for (int seen = 0;;) {
      while (round_.load() == seen) std::this_thread::yield();
      seen++;
      if (stop_) return;
      claim(id);
      busy_--;
    }
  }
  int threads_;
  std::atomic<int64_t> next_{0}, nanoseconds_{0};
  std::atomic<int> round_{0}, busy_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(int64_t, int)>* f_ = nullptr;
  int64_t chunks_ = 0;
  std::vector<std::thread> workers_;
};

// ---- a model's linears in one format ----

struct Scheme {
  std::string name;
  Format format;
  int64_t group, act_group;
  bool symmetric;
};

struct Model {
  std::vector<Matrix> weights;
  std::vector<void*> buffers;
  int64_t bytes = 0, elements = 0;
  Model() = default;
  Model(const Model&) = delete;
  ~Model() {
    for (void* p : buffers) std::free(p);
  }
};

void* filled(Model& model, int64_t bytes) {
  uint8_t* p = allocate<uint8_t>(bytes);
  uint64_t state = 88172645463325252u;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    std::memcpy(p + i, &state, 8);
  }
  model.buffers.push_back(p);
  model.bytes += bytes;
  return p;
}

void add_matrix(Model& model, const Scheme& scheme, Shape shape) {
  Matrix w;
  w.format = scheme.format;
  w.n = shape.n;
  w.k = shape.k;
  w.group = scheme.group;
  w.symmetric = scheme.symmetric;
  w.data = filled(model, w.n * w.row_bytes());
  if (has_scales(w.format)) {
    f16* scale = static_cast<f16*>(filled(model, w.n * w.groups() * 2));
    for (int64_t i = 0; i < w.n * w.groups(); i++) scale[i] = to_f16(0.01f);
    w.scale = scale;
    if (!w.symmetric) w.zero = filled(model, w.n * zero_bytes(w.format, w.groups()));
  } else {
    uint8_t* data = static_cast<uint8_t*>(const_cast<void*>(w.data));
    std::memset(data, 0x3c, static_cast<size_t>(w.n * w.row_bytes()));
  }
  model.elements += w.n * w.k;
  model.weights.push_back(w);
}

void fill_model(Model& model, const Scheme& scheme, int layers, bool head) {
  for (int layer = 0; layer < layers; layer++) {
    for (const Shape& shape : kLayer) add_matrix(model, scheme, shape);
  }
  if (head) add_matrix(model, scheme, kHead);
}

struct Activations {
  float* x = allocate<float>(kMostRows * kWidest);
  float* y = allocate<float>(kMostRows * kHead.n);
  int8_t* q = allocate<int8_t>(kMostRows * kWidest);
  float* scale = allocate<float>(kMostRows * kWidest / 32);
  int32_t* sum = allocate<int32_t>(kMostRows * kWidest / 32);
  std::vector<void*> scratch;
  Activations(int threads) {
    for (int64_t i = 0; i < kMostRows * kWidest; i++) x[i] = static_cast<float>(i % 37) - 18.f;
    for (int i = 0; i < threads; i++) scratch.push_back(allocate<uint8_t>(1 << 20));
  }
};

// ---- measuring ----

void run_linear(const Kernels& kernels, const Scheme& scheme, const Matrix& w, Activations& a, int64_t rows,
                Pool& pool) {
  QuantizedRows x;
  x.q = a.q;
  x.scale = a.scale;
  x.sum = a.sum;
  x.k = w.k;
  x.group = scheme.act_group;
  if (scheme.act_group) kernels.quantize_rows(a.x, w.k, rows, x);
  const int64_t chunk = 128;
  pool.run((w.n + chunk - 1) / chunk, [&](int64_t i, int id) {
    const int64_t n0 = i * chunk, n1 = std::min(n0 + chunk, w.n);
    void* scratch = a.scratch[static_cast<size_t>(id)];
    if (scheme.act_group) kernels.product_int(w, x, rows, n0, n1, a.y + n0, w.n, scratch);
    else kernels.product_float(w, a.x, w.k, rows, n0, n1, a.y + n0, w.n, scratch);
  });
}

// Sums all bytes as integers, eight registers wide.
uint64_t read_all(const void* data, int64_t bytes) {
  typedef uint64_t Wide __attribute__((vector_size(64)));
  const Wide* p = static_cast<const Wide*>(data);
  Wide sum[4] = {};
  for (int64_t i = 0; i + 4 <= bytes / 64; i += 4) {
    for (int j = 0; j < 4; j++) sum[j] += p[i + j];
  }
  const Wide all = sum[0] + sum[1] + sum[2] + sum[3];
  return all[0] + all[1] + all[2] + all[3] + all[4] + all[5] + all[6] + all[7];
}

std::atomic<uint64_t> sink{0};

void run_stream(const Matrix& w, Pool& pool) {
  const int64_t chunk = 128;
  pool.run((w.n + chunk - 1) / chunk, [&](int64_t i, int) {
    const int64_t n0 = i * chunk, n1 = std::min(n0 + chunk, w.n);
    sink += read_all(static_cast<const uint8_t*>(w.data) + n0 * w.row_bytes(), (n1 - n0) * w.row_bytes());
  });
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

std::vector<const Kernels*> vector_kernels() {
  int count = 0;
  const Kernels* const* list = available_kernels(&count);
  std::vector<const Kernels*> out;
  const char* only = std::getenv("ISA");
  for (int i = 0; i < count; i++) {
    const std::string name = list[i]->name;
    if (only ? name == only : name != "portable") out.push_back(list[i]);
  }
  return out;
}

void measure(const Scheme& scheme, int64_t rows, int layers, bool head, Pool& pool, int repetitions) {
  const char* only = std::getenv("SCHEME");
  if (only && scheme.name != only) return;
  Model model;
  fill_model(model, scheme, layers, head);
  Activations a(pool.threads());
  const auto kernels = vector_kernels();
  std::vector<std::vector<double>> times(kernels.size() + 1);
  for (int repetition = 0; repetition < repetitions; repetition++) {
    pool.take_seconds();
    for (const Matrix& w : model.weights) run_stream(w, pool);
    times[0].push_back(pool.take_seconds());
    for (size_t i = 0; i < kernels.size(); i++) {
      for (const Matrix& w : model.weights) run_linear(*kernels[i], scheme, w, a, rows, pool);
      times[i + 1].push_back(pool.take_seconds());
    }
  }
  int64_t data_bytes = 0;
  for (const Matrix& w : model.weights) data_bytes += w.n * w.row_bytes();
  const double stream = static_cast<double>(data_bytes) / median(times[0]) / 1e9;
  std::printf("%-22s rows %3ld stream %5.1f GB/s", scheme.name.c_str(), static_cast<long>(rows), stream);
  for (size_t i = 0; i < kernels.size(); i++) {
    const double t = median(times[i + 1]), rate = static_cast<double>(model.bytes) / t / 1e9;
    std::printf(" | %s %5.1f GB/s %3.0f%% of stream %4.0f GOPS", kernels[i]->name, rate, 100 * rate / stream,
                2e-9 * static_cast<double>(model.elements * rows) / t);
  }
  std::printf("\n");
  std::fflush(stdout);
}

const Scheme kInt4[] = {
    {"int4 g128", Format::int4, 128, 128, true},      {"int4 g64", Format::int4, 64, 64, true},
    {"int4 g32", Format::int4, 32, 32, true},         {"int4 row", Format::int4, 0, 128, true},
    {"int4 g128 act32", Format::int4, 128, 32, true}, {"int4 g128 asym", Format::int4, 128, 128, false},
    {"int4 g32 asym", Format::int4, 32, 32, false}};
const Scheme kInt8[] = {{"int8 row", Format::int8, 0, 128, true},
                        {"int8 g128", Format::int8, 128, 128, true},
                        {"int8 g32", Format::int8, 32, 32, true},
                        {"int8 g128 asym", Format::int8, 128, 128, false}};
const Scheme kPlanes[] = {{"int3 g128", Format::int3, 128, 128, true},
                          {"int3 g32", Format::int3, 32, 32, true},
                          {"int3 g128 asym", Format::int3, 128, 128, false},
                          {"int2 g128", Format::int2, 128, 128, true},
                          {"int2 g32", Format::int2, 32, 32, true},
                          {"int2 g128 asym", Format::int2, 128, 128, false}};
const Scheme kFloat[] = {{"bf16", Format::bf16, 0, 0, true},
                         {"f16", Format::f16, 0, 0, true},
                         {"f32", Format::f32, 0, 0, true},
                         {"fp8 row", Format::fp8, 0, 0, true},
                         {"fp8 g128", Format::fp8, 128, 0, true}};

void bench_decode(Pool& pool, int repetitions) {
  for (const Scheme& scheme : kInt4) measure(scheme, 1, 5, true, pool, repetitions);
  for (const Scheme& scheme : kPlanes) measure(scheme, 1, 6, true, pool, repetitions);
  for (const Scheme& scheme : kInt8) measure(scheme, 1, 3, true, pool, repetitions);
  for (const Scheme& scheme : kFloat) measure(scheme, 1, 2, false, pool, repetitions);
}

void bench_batch(Pool& pool, int repetitions) {
  for (int64_t rows : {2, 3, 4, 6, 8, 16}) {
    measure(kInt4[0], rows, 5, true, pool, repetitions);
    measure(kInt4[2], rows, 5, true, pool, repetitions);
    measure(kInt8[0], rows, 3, true, pool, repetitions);
    measure(kFloat[0], rows, 2, false, pool, repetitions);
  }
}

void bench_prefill(Pool& pool, int repetitions) {
  for (const Scheme& scheme : kInt4) measure(scheme, 256, 1, false, pool, repetitions);
  for (const Scheme& scheme : kPlanes) measure(scheme, 256, 1, false, pool, repetitions);
  for (const Scheme& scheme : kInt8) measure(scheme, 256, 1, false, pool, repetitions);
  for (const Scheme& scheme : kFloat) measure(scheme, 256, 1, false, pool, 1 + repetitions / 4);
}

// ---- attention: one layer of TinyLlama-1.1B, 32 heads on 4, or 32 on 32 ----

void measure_attention(CacheType type, int64_t kv_heads, int64_t rows, int64_t length, Pool& pool,
                       int repetitions) {
  constexpr int64_t heads = 32, dim = 64;
  const int64_t group = heads / kv_heads;
  Cache cache{{type, dim}, {type, dim}, kv_heads, length};
  const int64_t bytes = kv_heads * length * cache.k.row_bytes();
  cache.k.data = allocate<char>(bytes);
  cache.v.data = allocate<char>(bytes);
  float* q = allocate<float>(rows * heads * dim);
  for (int64_t i = 0; i < rows * heads * dim; i++) q[i] = static_cast<float>(i % 23) * 0.1f - 1.1f;
  const int64_t splits = (length + kSplit - 1) / kSplit, queries = rows * group;
  float* m = allocate<float>(kv_heads * splits * queries * 2);
  float* acc = allocate<float>(kv_heads * splits * queries * dim);
  AttentionShape shape{heads, 0.125f, 0, nullptr};
  std::vector<void*> scratch;
  for (int i = 0; i < pool.threads(); i++) scratch.push_back(allocate<uint8_t>(4 << 20));
  const char* const names[] = {"f32", "f16", "int8", "fp8", "int4"};
  std::printf("attention %4s kv_heads %2ld rows %3ld context %ld:", names[static_cast<int>(type)],
              static_cast<long>(kv_heads), static_cast<long>(rows), static_cast<long>(length));
  for (const Kernels* kernels : vector_kernels()) {
    for (int64_t p = 0; p < length; p++) {
      for (int64_t h = 0; h < kv_heads; h++) kernels->append(cache, 0, h, p, q, q);
    }
    const int64_t chunks_of_rows = (rows + kernels->attention_rows - 1) / kernels->attention_rows;
    std::vector<double> times;
    for (int repetition = 0; repetition < repetitions; repetition++) {
      pool.take_seconds();
      pool.run(kv_heads * splits * chunks_of_rows, [&](int64_t i, int id) {
        const int64_t head = i / splits / chunks_of_rows, split = i / chunks_of_rows % splits;
        const int64_t t = i % chunks_of_rows * kernels->attention_rows;
        const int64_t first = (head * splits + split) * queries, at = first + t * group;
        float* largest = m + first + at;  // [queries] maxima, then [queries] sums for each head and split
        auto* own = static_cast<uint8_t*>(scratch[static_cast<size_t>(id)]);
        const int64_t count = std::min(kernels->attention_rows, rows - t);
        kernels->attention_prepare(cache, shape, q + (t * heads + head * group) * dim, heads * dim, count, own);
        kernels->attention_split(cache, shape, count, 0, head, length - rows + t, split, largest,
                                 largest + queries, acc + at * dim, own);
      });
      times.push_back(pool.take_seconds());
    }
    const double t = median(times), operations = 4. * heads * dim * static_cast<double>(rows) *
                                                 static_cast<double>(length - rows / 2);
    std::printf(" | %s %7.0f us %5.1f GB/s %4.0f GFLOPS", kernels->name, t * 1e6,
                2e-9 * static_cast<double>(bytes) / t, operations / t / 1e9);
  }
  std::printf("\n");
  for (char* p : {cache.k.data, cache.v.data}) std::free(p);
  for (float* p : {q, m, acc}) std::free(p);
  for (void* p : scratch) std::free(p);
}

void bench_attention(Pool& pool, int repetitions) {
  for (const CacheType type : {CacheType::f16, CacheType::int8, CacheType::fp8, CacheType::int4}) {
    for (int64_t kv_heads : {4, 32}) {
      measure_attention(type, kv_heads, 1, 2048, pool, repetitions * 5);
      measure_attention(type, kv_heads, 256, 256, pool, repetitions);
      measure_attention(type, kv_heads, 256, 2048, pool, repetitions);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  Pool pool(argc > 2 ? std::atoi(argv[2]) : 2);
  const int repetitions = argc > 3 ? std::atoi(argv[3]) : 9;
  if (what == "decode" || what == "all") bench_decode(pool, repetitions);
  if (what == "batch" || what == "all") bench_batch(pool, repetitions);
  if (what == "prefill" || what == "all") bench_prefill(pool, repetitions);
  if (what == "attention" || what == "all") bench_attention(pool, repetitions);
}
