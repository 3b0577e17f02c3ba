// What the tests of kernels share: buffers of exact sizes, random numbers, checks that print and count.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "half.h"
#include "kernels.h"

namespace gristmill {

inline int failures = 0;
inline long checks = 0;
inline std::mt19937 random_bits(7);

inline int uniform(int low, int high) {
  return low + static_cast<int>(random_bits() % static_cast<unsigned>(high - low + 1));
}
inline float normal() { return std::normal_distribution<float>()(random_bits); }

// Exactly `count` elements, 64-byte aligned as in the artifact and the arena; freed with the vector.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : count_(count), data_(allocate(count), std::free) {
    if (count) std::memset(static_cast<void*>(data_.get()), 0, static_cast<size_t>(count) * sizeof(T));
  }
  T* data() const { return data_.get(); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static T* allocate(int64_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, std::max<size_t>(static_cast<size_t>(count) * sizeof(T), 1))) std::abort();
    return static_cast<T*>(p);
  }
  int64_t count_;
  std::shared_ptr<T> data_;
};

inline Buffer<float> random_floats(int64_t count) {
  Buffer<float> out(count);
  for (int64_t i = 0; i < count; i++) out[i] = normal();
  return out;
}

inline void fail(const std::string& what, int64_t index, double got, double expected) {
  if (failures++ < 40)
    std::printf("FAIL %s [%ld]: got %.9g expected %.9g\n", what.c_str(), static_cast<long>(index), got,
                expected);
}

inline void check_equal(const std::string& what, const float* got, const float* expected, int64_t count) {
  checks++;
  for (int64_t i = 0; i < count; i++) {
    if (bits_of(got[i]) != bits_of(expected[i])) return fail(what + " bits", i, got[i], expected[i]);
  }
}

inline void check_near(const std::string& what, double got, double expected, double tolerance, int64_t index = 0) {
  checks++;
  if (!(std::fabs(got - expected) <= tolerance)) fail(what, index, got, expected);
}

inline std::vector<const Kernels*> all_kernels() {
  int count = 0;
  const Kernels* const* list = available_kernels(&count);
  return {list, list + count};
}

// The last line of a test's output; its result is main's.
inline int report() {
  for (const Kernels* kernels : all_kernels()) std::printf("%s ", kernels->name);
  std::printf("\n%ld checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}

}  // namespace gristmill
