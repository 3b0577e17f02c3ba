// Anonymous zero pages: reserved at once, touched when used. So a page lies in the memory of the processor whose
// thread writes it first: an arena's row, a cache's tile, a thread's scratch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace gristmill {

uint64_t page_bytes();
uint64_t physical_memory();

class Region {
 public:
  Region() = default;
  // Throws Error when the machine has no such memory. huge_pages: ask for them, where the system has any.
  Region(size_t bytes, const char* what, bool huge_pages = false);
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

// Cuts one Region into 64-byte aligned pieces: first pass counts (base null), second pass hands out. Under
// the address sanitizer, pieces that are cut for good (`fenced`) have a forbidden line of 64 bytes behind
// them.
class Carver {
 public:
  explicit Carver(char* base = nullptr, bool fenced = false) : base_(base), fence_(fenced ? kFence : 0) {}
  template <typename T>
  T* take(int64_t count) {
    const size_t at = used_, bytes = static_cast<size_t>(count) * sizeof(T);
    used_ += (bytes + 63) / 64 * 64 + fence_;
    if (!base_) return nullptr;
    if (fence_) forbid(base_ + at + bytes, used_ - at - bytes);
    return reinterpret_cast<T*>(base_ + at);
  }
  // The next piece begins a page: nobody else's first touch decides which memory it lies in.
  void begin_page() { used_ = (used_ + page_bytes() - 1) / page_bytes() * page_bytes(); }
  size_t used() const { return used_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kFence = 64;
  static void forbid(const char* begin, size_t bytes) { ASAN_POISON_MEMORY_REGION(begin, bytes); }
#else
  static constexpr size_t kFence = 0;
  static void forbid(const char*, size_t) {}
#endif
  char* base_;
  size_t fence_;
  size_t used_ = 0;
};

}  // namespace gristmill
