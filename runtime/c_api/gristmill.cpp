// The functions of gristmill.h.
#include "gristmill.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "artifact.h"
#include "error.h"
#include "executor.h"
#include "sampling.h"
#include "sequences.h"

using gristmill::Executor;
using gristmill::fail;

struct gristmill_model {
  gristmill_model(const gristmill::ArtifactFiles& files, const gristmill::Options& options)
      : executor(files.program, files.weights_path, options),
        sequences(executor.max_slots(), executor.max_len(), executor.shortest_ring(), max_tokens()),
        end_ids(files.end_ids),
        logits(static_cast<size_t>(executor.program().vocabulary)) {}

  int64_t max_tokens() const { return executor.program().max_tokens; }

  std::mutex mutex;
  Executor executor;
  gristmill::Sequences sequences;
  const std::vector<int32_t> end_ids;
  std::vector<float> logits;  // of one row
  std::vector<int32_t> positions, slots;
};

namespace {

thread_local std::string last_error;

// What f returns, or `failed` and the reason in last_error.
template <typename Result, typename F>
Result guarded(Result failed, F f) noexcept {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    try {
      last_error = "not enough memory; open with fewer max_slots or a smaller max_len";
    } catch (...) {
      last_error.clear();
    }
  } catch (const std::exception& error) {
    try {
      last_error = error.what();
    } catch (...) {
      last_error.clear();
    }
  } catch (...) {
    last_error.clear();
  }
  return failed;
}

// The same with the model to itself.
template <typename Result, typename F>
Result locked(gristmill_model* model, Result failed, F f) noexcept {
  return guarded(failed, [&] {
    if (!model) fail("got NULL for a model, expected what gristmill_open returned");
    const std::lock_guard<std::mutex> lock(model->mutex);
    return f(*model);
  });
}

void need(const void* pointer, const char* name) {
  if (!pointer) fail("got NULL for ", name);
}

// A struct that callers of an older header know the beginning of; what they do not know stays as it is.
template <typename Struct>
Struct filled(const Struct* given, Struct defaults, const char* name) {
  if (!given) return defaults;
  if (given->size < sizeof(size_t) || given->size > sizeof(Struct))
    fail(name, " has size ", given->size, ", expected at most ", sizeof(Struct), "; begin with its _INIT");
  std::memcpy(&defaults, given, given->size);
  return defaults;
}

// `given`, or `standard` where it is 0.
int64_t within(const char* name, int64_t given, int64_t standard, int64_t most) {
  if (given < 0 || given > most) fail("got ", name, " ", given, ", expected 1 to ", most, ", or 0 for the default");
  return given ? given : standard;
}

gristmill::Options options_of(const gristmill_options* given) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const gristmill_options asked = filled<gristmill_options>(given, GRISTMILL_OPTIONS_INIT, "gristmill_options");
  gristmill::Options options;
  options.threads = static_cast<int>(within("threads", asked.threads, 0, 1024));
  options.max_len = within("max_len", asked.max_len, gristmill::Options::kCompiled, kMost);
  options.max_slots = within("max_slots", asked.max_slots, gristmill::Options::kCompiled, kMost);
  options.huge_pages = asked.huge_pages != 0;
  options.pinned = asked.pinned != 0;
  if (asked.isa) options.isa = asked.isa;
  return options;
}

// The rows of each slot of a batch follow each other without a gap: slot -> first position and the one after
// the last.
using Ranges = std::map<int32_t, std::pair<int64_t, int64_t>>;

Ranges ranges(const gristmill_model& model, const int32_t* positions, const int32_t* slots, int64_t rows) {
  std::map<int32_t, std::vector<int32_t>> of_slots;
  for (int64_t t = 0; t < rows; t++) of_slots[slots[t]].push_back(positions[t]);
  Ranges found;
  for (auto& [slot, own] : of_slots) {
    std::sort(own.begin(), own.end());
    for (size_t i = 1; i < own.size(); i++) {
      if (own[i] != own[i - 1] + 1)
        fail("slot ", slot, " got position ", own[i], " after ", own[i - 1], "; expected each once, without a gap");
    }
    model.sequences.check_start(slot, own.front());
    if (own.back() >= model.executor.max_len())
      fail("got position ", own.back(), " in slot ", slot, ", which has room for ", model.executor.max_len(),
           "; open with a larger max_len or truncate the slot");
    found[slot] = {own.front(), int64_t{own.back()} + 1};
  }
  return found;
}

void forward(gristmill_model& model, const int32_t* tokens, const int32_t* positions, const int32_t* slots,
             int64_t rows, const int32_t* wanted, int64_t wanted_rows, float* logits) {
  const Ranges taken = ranges(model, positions, slots, rows);
  for (const auto& [slot, range] : taken) model.sequences.begin(slot, range.first, range.second);
  model.executor.forward(tokens, positions, slots, rows, wanted, wanted_rows, logits);
  for (const auto& [slot, range] : taken) model.sequences.advance(slot, range.first, range.second);
}

// Appends tokens to a slot, as many as fit a forward at a time; the logits after the last one are model.logits.
void append(gristmill_model& model, int64_t slot, const int32_t* tokens, int64_t count) {
  need(tokens, "tokens");
  const int64_t length = model.sequences.length(slot), room = model.executor.max_len() - length;
  if (count < 1 || count > room)
    fail("got ", count, " tokens for slot ", slot, ", expected 1 to ", room, ", which is the room it has left");
  for (int64_t i = 0; i < count; i++) {  // before any of them is in the slot
    if (tokens[i] < 0 || tokens[i] >= model.executor.program().vocabulary)
      fail("got token ", tokens[i], ", expected 0 to ", model.executor.program().vocabulary - 1);
  }
  for (int64_t done = 0; done < count;) {
    const int64_t rows = std::min(count - done, model.max_tokens());
    model.positions.clear();
    for (int64_t i = 0; i < rows; i++) model.positions.push_back(static_cast<int32_t>(length + done + i));
    model.slots.assign(static_cast<size_t>(rows), static_cast<int32_t>(slot));
    const auto last = static_cast<int32_t>(rows - 1);
    const bool ends = done + rows == count;
    forward(model, tokens + done, model.positions.data(), model.slots.data(), rows, &last, ends ? 1 : 0,
            model.logits.data());
    done += rows;
  }
}

gristmill::Sampling sampling_of(const gristmill_sampling* given) {
  need(given, "sampling");
  const gristmill_sampling asked = filled<gristmill_sampling>(given, GRISTMILL_SAMPLING_INIT, "gristmill_sampling");
  if (!(asked.temperature > 0) || !std::isfinite(asked.temperature))
    fail("got temperature ", asked.temperature, ", expected a number above 0; gristmill_greedy takes the best");
  if (!(asked.top_p > 0 && asked.top_p <= 1)) fail("got top_p ", asked.top_p, ", expected above 0, at most 1");
  if (asked.top_k < 0) fail("got top_k ", asked.top_k, ", expected 0 for all, or more");
  return {asked.temperature, asked.top_p, asked.top_k, asked.seed, asked.sequence};
}

}  // namespace

extern "C" {

int gristmill_api(void) { return GRISTMILL_API; }

const char* gristmill_last_error(void) { return last_error.c_str(); }

gristmill_model* gristmill_open(const char* artifact, const gristmill_options* options) {
  return guarded<gristmill_model*>(nullptr, [&] {
    need(artifact, "artifact");
    const gristmill::Options asked = options_of(options);
    return new gristmill_model(gristmill::open_artifact(artifact), asked);
  });
}

void gristmill_close(gristmill_model* model) { delete model; }

int gristmill_get_limits(gristmill_model* model, gristmill_limits* limits) {
  return locked(model, -1, [&](gristmill_model& m) {
    need(limits, "limits");
    const gristmill_limits all = {limits->size, m.executor.max_len(), m.executor.max_slots(), m.max_tokens(),
                                  m.executor.program().vocabulary, m.executor.threads(),
                                  m.executor.weight_bytes(), m.executor.kv_bytes()};
    filled<gristmill_limits>(limits, all, "gristmill_limits");
    std::memcpy(limits, &all, limits->size);
    return 0;
  });
}

int64_t gristmill_end_ids(gristmill_model* model, int32_t* ids, int64_t capacity) {
  return locked(model, int64_t{-1}, [&](gristmill_model& m) {
    const auto count = static_cast<int64_t>(m.end_ids.size());
    if (capacity > 0) {
      need(ids, "ids");
      std::copy_n(m.end_ids.begin(), std::min(count, capacity), ids);
    }
    return count;
  });
}

int32_t gristmill_greedy(gristmill_model* model, int64_t slot, const int32_t* tokens, int64_t count) {
  return locked(model, -1, [&](gristmill_model& m) {
    append(m, slot, tokens, count);
    return gristmill::most_likely(m.logits.data(), m.executor.program().vocabulary);
  });
}

int32_t gristmill_sample(gristmill_model* model, int64_t slot, const int32_t* tokens, int64_t count,
                         const gristmill_sampling* sampling) {
  return locked(model, -1, [&](gristmill_model& m) {
    const gristmill::Sampling asked = sampling_of(sampling);
    append(m, slot, tokens, count);
    return gristmill::draw(m.logits.data(), m.executor.program().vocabulary, m.sequences.length(slot) - 1, asked);
  });
}

int64_t gristmill_length(gristmill_model* model, int64_t slot) {
  return locked(model, int64_t{-1}, [&](gristmill_model& m) { return m.sequences.length(slot); });
}

int gristmill_truncate(gristmill_model* model, int64_t slot, int64_t length) {
  return locked(model, -1, [&](gristmill_model& m) {
    m.sequences.truncate(slot, length);
    return 0;
  });
}

int gristmill_copy(gristmill_model* model, int64_t from, int64_t to, int64_t length) {
  return locked(model, -1, [&](gristmill_model& m) {
    m.sequences.check_start(from, length);
    m.sequences.check_start(to, 0);
    if (from == to) return 0;
    m.executor.copy_slot(from, to, length);
    m.sequences.copied(from, to, length);
    return 0;
  });
}

int gristmill_forward(gristmill_model* model, const int32_t* tokens, const int32_t* positions,
                      const int32_t* slots, int64_t rows, const int32_t* wanted, int64_t wanted_rows,
                      float* logits) {
  return locked(model, -1, [&](gristmill_model& m) {
    need(tokens, "tokens");
    need(positions, "positions");
    need(slots, "slots");
    if (rows < 1 || rows > m.max_tokens()) fail("got ", rows, " rows, expected 1 to ", m.max_tokens());
    if (wanted_rows < 0 || wanted_rows > m.max_tokens())
      fail("got ", wanted_rows, " wanted rows, expected 0 to ", m.max_tokens());
    if (wanted_rows) need(wanted, "wanted"), need(logits, "logits");
    for (int64_t t = 0; t < rows; t++) {
      if (tokens[t] < 0 || tokens[t] >= m.executor.program().vocabulary)
        fail("got token ", tokens[t], " in row ", t, ", expected 0 to ", m.executor.program().vocabulary - 1);
    }
    for (int64_t r = 0; r < wanted_rows; r++) {
      if (wanted[r] < 0 || wanted[r] >= rows)
        fail("got wanted row ", wanted[r], ", expected 0 to ", rows - 1);
    }
    forward(m, tokens, positions, slots, rows, wanted, wanted_rows, logits);
    return 0;
  });
}

}  // extern "C"
