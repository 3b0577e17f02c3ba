// Which instruction sets this processor and its operating system can run.
#include <cstring>

#include "kernels.h"
#include "target.h"

namespace gristmill {

bool reads_far_ahead = false;

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
#if defined(GRISTMILL_X86)
  __builtin_cpu_init();
  reads_far_ahead = __builtin_cpu_is("amd") != 0;
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  found.add(avx512 && __builtin_cpu_supports("avx512vnni"), avx512vnni_kernels);
  found.add(avx512, avx512_kernels);
  found.add(avx2, avx2_kernels);
#endif
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
