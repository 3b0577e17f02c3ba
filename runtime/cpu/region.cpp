#include "region.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"

namespace gristmill {

Region::Region(size_t bytes, const char* what, bool huge_pages) : bytes_(bytes) {
  if (bytes == 0) return;
  if (bytes > physical_memory()) {
    fail(what, " needs ", bytes >> 20, " MiB, this machine has ", physical_memory() >> 20,
         " MiB: ask for a smaller max_len or max_slots");
  }
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) fail(what, ": no ", bytes >> 20, " MiB of memory to be had: ", std::strerror(errno));
  data_ = static_cast<char*>(at);
#if defined(MADV_HUGEPAGE)
  if (huge_pages) madvise(at, bytes, MADV_HUGEPAGE);  // a wish: refused, pages stay small
#else
  (void)huge_pages;
#endif
}

Region::~Region() {
  if (!data_) return;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(data_, bytes_);
#endif
  munmap(data_, bytes_);
}

uint64_t page_bytes() { return static_cast<uint64_t>(sysconf(_SC_PAGESIZE)); }
uint64_t physical_memory() { return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * page_bytes(); }

}  // namespace gristmill
