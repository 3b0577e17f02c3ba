#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "error.h"

namespace gristmill {
namespace {

struct Candidate {
  int32_t id;
  float score;  // logit below the best one, over temperature
  float weight = 0;
};

bool likelier(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

// The top_k best, and those that equal the last of them.
void keep_best(int64_t top_k, std::vector<Candidate>& all) {
  if (top_k <= 0 || top_k >= static_cast<int64_t>(all.size())) return;
  std::vector<float> scores;
  for (const Candidate& c : all) scores.push_back(c.score);
  const auto last = scores.begin() + (top_k - 1);
  std::nth_element(scores.begin(), last, scores.end(), [](float a, float b) { return a > b; });
  all.erase(std::remove_if(all.begin(), all.end(), [&](const Candidate& c) { return c.score < *last; }), all.end());
}

// The fewest most likely that reach top_p, one at least; in the order of their ids.
void keep_nucleus(float top_p, std::vector<Candidate>& all) {
  if (top_p >= 1) return;
  double total = 0, mass = 0;
  for (const Candidate& c : all) total += c.weight;
  std::sort(all.begin(), all.end(), likelier);
  size_t count = 0;
  while (count < all.size() && (count == 0 || mass < double{top_p} * total)) mass += all[count++].weight;
  all.resize(count);
  std::sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
}

struct Words {
  uint64_t high, low;
};
Words product(uint64_t a, uint64_t b) {
  const uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (middle & 0xffffffff);
  return {a1 * b1 + (middle >> 32) + (other >> 32), a * b};
}

}  // namespace

int32_t most_likely(const float* logits, int64_t size) {
  int64_t best = 0;
  for (int64_t i = 0; i < size; i++) {
    if (std::isnan(logits[i])) best = i;
    if (std::isnan(logits[best])) break;
    if (logits[i] > logits[best]) best = i;
  }
  if (!std::isfinite(logits[best]))
    fail("the model gave ", logits[best], " as a logit: damaged weights (see `gristmill verify`) or overflow");
  return static_cast<int32_t>(best);
}

int32_t draw(const float* logits, int64_t size, int64_t position, const Sampling& sampling) {
  const float best = logits[most_likely(logits, size)];
  std::vector<Candidate> all;
  all.reserve(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; i++)
    all.push_back({static_cast<int32_t>(i), (logits[i] - best) / sampling.temperature});
  keep_best(sampling.top_k, all);
  for (Candidate& c : all) c.weight = std::exp(c.score);
  keep_nucleus(sampling.top_p, all);
  double total = 0;
  for (const Candidate& c : all) total += c.weight;
  const double point = uniform(sampling.seed, sampling.sequence, static_cast<uint64_t>(position));
  const double target = std::min(point * total, std::nextafter(total, 0.0));
  double end = 0;
  for (const Candidate& c : all) {
    end += c.weight;
    if (end > target) return c.id;
  }
  return all.back().id;
}

double uniform(uint64_t seed, uint64_t sequence, uint64_t position) {
  uint64_t counter[4] = {position + 1, position + 1 == 0, 0, 0}, key[2] = {seed, sequence};
  for (int round = 0; round < 10; round++) {
    const Words first = product(0xd2e7470ee14c6c93, counter[0]), second = product(0xca5a826395121157, counter[2]);
    const uint64_t next[4] = {second.high ^ counter[1] ^ key[0], second.low, first.high ^ counter[3] ^ key[1],
                              first.low};
    std::copy(next, next + 4, counter);
    key[0] += 0x9e3779b97f4a7c15;
    key[1] += 0xbb67ae8584caa73b;
  }
  return static_cast<double>(counter[0] >> 11) * 0x1p-53;
}

}  // namespace gristmill
