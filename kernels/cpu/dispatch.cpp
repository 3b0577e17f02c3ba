// Which instruction sets this processor and its operating system can run.
#include <cstring>

#include "kernels.h"

namespace gristmill {
namespace {

struct Available {
  const Kernels* list[4];
  int count = 0;
  void add(bool runs, const Kernels& kernels) {
    if (runs) list[count++] = &kernels;
  }
};

Available detect() {
  Available found;
  found.add(true, portable_kernels);
  return found;
}

const Available& available() {
  static const Available found = detect();
  return found;
}

}  // namespace

const Kernels* const* available_kernels(int* count) {
  *count = available().count;
  return available().list;
}

const Kernels* find_kernels(const char* name) {
  if (std::strcmp(name, "auto") == 0) return available().list[0];
  for (int i = 0; i < available().count; i++) {
    if (std::strcmp(available().list[i]->name, name) == 0) return available().list[i];
  }
  return nullptr;
}

}  // namespace gristmill
