// One row of logits to one token, as runtime/decoding/sampling.py has it.
#pragma once
#include <cstdint>
#include <vector>

namespace gristmill {

struct Sampling {
  float temperature = 1, top_p = 1;
  int64_t top_k = 0;  // 0: all
  uint64_t seed = 0, sequence = 0;
};

// The largest of logits[size], the lowest id among equals. Throws Error where it is not finite.
int32_t most_likely(const float* logits, int64_t size);

// The token after `position`.
int32_t draw(const float* logits, int64_t size, int64_t position, const Sampling& sampling);

// A number in [0, 1): Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed
// by (seed, sequence), at the counter that follows `position`, as numpy's Philox counts.
double uniform(uint64_t seed, uint64_t sequence, uint64_t position);

}  // namespace gristmill
