// The roof: how fast this machine's threads together read memory.
#pragma once
#include <cstdint>

namespace gristmill {

// Best of several read-only passes over `bytes` of touched anonymous memory within `seconds`; GB/s (1e9
// bytes).
double read_bandwidth(int64_t bytes, int threads, double seconds);

}  // namespace gristmill
