// Anonymous zero pages: reserved at once, touched when used.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace gristmill {

class Region {
 public:
  Region() = default;
  Region(size_t bytes, const char* what);  // throws Error when the machine has no such memory
  ~Region();
  Region(Region&& other) noexcept { swap(other); }
  Region& operator=(Region&& other) noexcept {
    swap(other);
    return *this;
  }
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(Region& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

// Cuts one Region into 64-byte aligned pieces: first pass counts (base null), second pass hands out.
class Carver {
 public:
  explicit Carver(char* base = nullptr) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

uint64_t physical_memory();

}  // namespace gristmill
