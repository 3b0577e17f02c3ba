// The roofs: how fast this machine's threads together read memory and compute.
#pragma once
#include <cstdint>
#include <string>

namespace gristmill {

// Read-only passes over `bytes` of touched anonymous memory, by the fastest of several readers, for `seconds`:
// what memory sustains over the time that a measurement takes, not its luckiest moment; GB/s (1e9 bytes).
double read_bandwidth(int64_t bytes, int threads, double seconds);

// Best of several runs of the multiply-adds of one instruction set ("auto": the best) on all threads; 1e9
// operations per second.
double arithmetic_peak(const std::string& isa, bool integer, int threads, double seconds);

}  // namespace gristmill
