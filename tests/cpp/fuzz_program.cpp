// Mutates a small valid program.json and the header of its weights, loads the result, and runs it where it
// loads: an Error or a forward, never a crash. Run it under the sanitizers. Build: g++ -std=c++17 -O1 -g
// -ffp-contract=off -fsanitize=address,undefined -pthread -I runtime/cpu -I kernels/cpu
//   tests/cpp/fuzz_program.cpp $(ls runtime/cpu/*.cpp | grep -v bindings) kernels/cpu/*.cpp
// Usage: fuzz_program [rounds] [seed]; with rounds 0 only forwards of several threads at once (for
// -fsanitize=thread).
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "executor.h"
#include "json.h"

using namespace gristmill;

namespace {

const char* const kProgram = R"({"format": 1, "name": "decoder", "vocabulary": 50,
"limits": {"max_tokens": 8, "max_slots": 2, "max_len": 40, "max_position": 64}, "arena_bytes": 65536,
"values": [{"rows": "T", "width": 40, "offset": 0}, {"rows": "T", "width": 40, "offset": 1280},
 {"rows": "T", "width": 80, "offset": 2560}, {"rows": "T", "width": 40, "offset": 5120}, {"rows": "T",
  "width": 72, "offset": 6400},
 {"rows": "R", "width": 40, "offset": 8704}, {"rows": "T", "width": 1, "offset": 9984}, {"rows": "R",
  "width": 50, "offset": 10048}],
"caches": [{"kv_heads": 2, "k_dim": 10, "v_dim": 10, "k_dtype": "int8", "v_dtype": "fp8", "window": 5},
 {"kv_heads": 2, "k_dim": 10, "v_dim": 10, "k_dtype": "int4", "v_dtype": "f16"}],
"ropes": [{"inv_freq": "inv_freq", "dims": 8, "style": "half", "scale": 1.0}],
"weights": {
 "embed": [{"name": "embed", "format": "int8", "n": 50, "k": 40, "group": 32, "symmetric": true}],
 "wpe": [{"name": "wpe", "format": "bf16", "n": 66, "k": 40}],
 "qkv": [{"name": "q", "format": "int4", "n": 40, "k": 40, "group": 32, "symmetric": false},
         {"name": "k", "format": "int3", "n": 20, "k": 40, "group": 32, "symmetric": false},
         {"name": "v", "format": "int2", "n": 20, "k": 40, "group": 0, "symmetric": true}],
 "o": [{"name": "o", "format": "int8", "n": 40, "k": 40, "group": 0, "symmetric": false}],
 "up": [{"name": "gate", "format": "fp8", "n": 72, "k": 40, "group": 32},
        {"name": "up", "format": "f16", "n": 72, "k": 40, "group": 0}],
 "down": [{"name": "down", "format": "int8", "n": 40, "k": 72, "group": 64, "symmetric": true}],
 "one": [{"name": "one", "format": "f32", "n": 1, "k": 40}]},
"instructions": [
 {"op": "embedding", "ids": "positions", "weight": "wpe", "offset": 2, "out": [1, 0, 40]},
 {"op": "embedding", "ids": "tokens", "weight": "embed", "scale": 2.0, "residual": [1, 0, 40],
  "out": [0, 0, 40]},
 {"op": "rms_norm", "in": [0, 0, 40], "weight": "norm", "eps": 1e-5, "out": [1, 0, 40]},
 {"op": "linear", "in": [1, 0, 40], "weight": "qkv", "bias": "bias", "act_group": 32, "out": [2, 0, 80]},
 {"op": "attention", "q": [2, 0, 40], "k": [2, 40, 20], "v": [2, 60, 20], "out": [3, 0, 40],
  "cache": 0, "heads": 4, "scale": 0.3,
  "rope": 0, "q_norm": "head_norm", "k_norm": "head_norm", "norm_eps": 1e-6, "sinks": "sinks"},
 {"op": "attention", "q": [2, 0, 40], "k": [2, 40, 20], "v": [2, 60, 20], "out": [1, 0, 40],
  "cache": 1, "heads": 4, "scale": 0.3, "hadamard": 2,
  "softcap": 5.0},
 {"op": "linear", "in": [3, 0, 40], "weight": "o", "order": "order", "act_group": 32, "residual": [0, 0, 40], "out": [0,
  0, 40]},
 {"op": "layer_norm", "in": [0, 0, 40], "weight": "norm", "bias": "norm", "eps": 1e-5, "residual": [1,
  0, 40], "out": [3, 0, 40]},
 {"op": "linear", "in": [3, 0, 40], "weight": "up", "activation": "gelu", "glu": true, "act_group": 0,
  "out": [4, 0, 72]},
 {"op": "linear", "in": [4, 0, 72], "weight": "down", "act_group": 64, "residual": [0, 0, 40],
  "out": [0, 0, 40]},
 {"op": "linear", "in": [0, 0, 40], "weight": "one", "act_group": 0, "out": [6, 0, 1]},
 {"op": "pointwise", "in": [[0, 0, 40], [6, 0, 1]], "out": [0, 0, 40], "steps": [["sigmoid", 1, null],
  ["mul", 0, 2], ["add", 3, {"const": 0.5}]]},
 {"op": "gather_rows", "in": [0, 0, 40], "out": [5, 0, 40]},
 {"op": "linear", "in": [5, 0, 40], "weight": "embed", "act_group": 32, "out": [7, 0, 50]},
 {"op": "pointwise", "in": [[7, 0, 50]], "out": [-1, 0, 50], "steps": [["tanh", 0]]}]})";

using Random = std::mt19937_64;

size_t below(Random& random, size_t limit) { return static_cast<size_t>(random() % limit); }

// ---- JSON back to text ----

void print(const Json& value, std::string& out);

void print_string(const std::string& text, std::string& out) {
  out += '"';
  for (const char c : text)
    if (c == '"' || c == '\\')
      (out += '\\') += c;
    else if (static_cast<unsigned char>(c) >= 0x20)
      out += c;
  out += '"';
}

void print_items(const Json& value, char open, char close, std::string& out) {
  out += open;
  for (size_t i = 0; i < value.items.size(); i++) {
    if (i) out += ',';
    if (value.kind == Json::Kind::object) print_string(value.keys[i], out), out += ':';
    print(value.items[i], out);
  }
  out += close;
}

void print(const Json& value, std::string& out) {
  switch (value.kind) {
    case Json::Kind::null: out += "null"; break;
    case Json::Kind::boolean: out += value.boolean ? "true" : "false"; break;
    case Json::Kind::string: print_string(value.string, out); break;
    case Json::Kind::array: print_items(value, '[', ']', out); break;
    case Json::Kind::object: print_items(value, '{', '}', out); break;
    case Json::Kind::number:
      if (value.is_integer) {
        out += std::to_string(value.integer);
      } else {
        char text[64];
        std::snprintf(text, sizeof text, "%.17g", value.number);
        out += text;
      }
  }
}

// ---- mutations ----

void collect(Json& value, std::vector<Json*>& all) {
  all.push_back(&value);
  for (Json& item : value.items) collect(item, all);
}

void mutate_number(Json& value, Random& random) {
  static const int64_t kValues[] = {0,
                                    1,
                                    -1,
                                    2,
                                    31,
                                    32,
                                    33,
                                    63,
                                    64,
                                    65,
                                    127,
                                    128,
                                    129,
                                    4096,
                                    65535,
                                    65536,
                                    1 << 24,
                                    INT32_MAX,
                                    int64_t{1} << 32,
                                    int64_t{1} << 36,
                                    INT64_MAX,
                                    INT64_MIN};
  value.is_integer = true;
  const auto add = [&value](uint64_t n) {
    value.integer = static_cast<int64_t>(static_cast<uint64_t>(value.integer) + n);
  };
  switch (below(random, 8)) {
    case 0: add(1); break;
    case 1: add(~uint64_t{0}); break;
    case 2: add(static_cast<uint64_t>(value.integer)); break;
    case 3: add(64); break;
    case 4: value.is_integer = false, value.number = value.number * 0.5 + 0.1; break;
    case 5: value.is_integer = false, value.number = 1e300; break;
    default: value.integer = kValues[below(random, std::size(kValues))];
  }
}

void mutate_list(Json& value, Random& random) {
  if (value.items.empty()) return;
  const size_t at = below(random, value.items.size()), to = below(random, value.items.size());
  const bool object = value.kind == Json::Kind::object;
  switch (below(random, 4)) {
    case 0:
      value.items.erase(value.items.begin() + static_cast<std::ptrdiff_t>(at));
      if (object) value.keys.erase(value.keys.begin() + static_cast<std::ptrdiff_t>(at));
      break;
    case 1: {
      Json copy = value.items[at];
      value.items.push_back(std::move(copy));
      if (object) value.keys.push_back(below(random, 2) ? value.keys[at] : value.keys[at] + "x");
      break;
    }
    case 2: std::swap(value.items[at], value.items[to]); break;
    default:
      if (object) std::swap(value.keys[at], value.keys[to]);
  }
}

void mutate_one(Json& root, Random& random) {
  std::vector<Json*> all;
  collect(root, all);
  Json& value = *all[below(random, all.size())];
  const Json other = *all[below(random, all.size())];
  if (below(random, 8) == 0) {
    value = other.kind == Json::Kind::object && below(random, 2) ? Json() : other;
  } else if (value.kind == Json::Kind::number) {
    mutate_number(value, random);
  } else if (value.kind == Json::Kind::string) {
    value.string = other.kind == Json::Kind::string ? other.string : value.string + "\xff\n";
  } else if (value.kind == Json::Kind::boolean) {
    value.boolean = !value.boolean;
  } else {
    mutate_list(value, random);
  }
}

// Numbers are what programs are made of: half of the mutations change one or two of them only.
std::string mutate(const std::string& text, Random& random) {
  Json root = parse_json(text, "the base");
  const size_t changes = below(random, 2) ? 1 : 1 + below(random, 3);
  for (size_t i = 0; i < changes; i++) {
    std::vector<Json*> all, numbers;
    collect(root, all);
    for (Json* value : all)
      if (value->kind == Json::Kind::number) numbers.push_back(value);
    if (!numbers.empty() && below(random, 2)) {
      mutate_number(*numbers[below(random, numbers.size())], random);
    } else {
      mutate_one(root, random);
    }
  }
  std::string out;
  print(root, out);
  for (size_t flips = below(random, 5) == 0 ? 1 + below(random, 3) : 0; flips > 0 && !out.empty(); flips--)
    out[below(random, out.size())] ^= static_cast<char>(1 << below(random, 8));
  return out;
}

// ---- weights ----

struct TensorSpec {
  const char *name, *dtype;
  std::vector<int64_t> shape;
};

const std::vector<TensorSpec> kTensors = {
    {"inv_freq", "F32", {4}},        {"norm", "F32", {40}},         {"head_norm", "F32", {10}},
    {"sinks", "F32", {4}},           {"bias", "F32", {80}},         {"embed.weight", "I8", {50, 64}},
    {"embed.scale", "F16", {50, 2}}, {"wpe.weight", "BF16", {66, 40}}, {"q.weight", "U8", {40, 32}},
    {"q.scale", "F16", {40, 2}},     {"q.zero", "U8", {40, 1}},     {"k.weight", "U8", {20, 24}},
    {"k.scale", "F16", {20, 2}},     {"k.zero", "U8", {20, 1}},     {"v.weight", "U8", {20, 16}},
    {"v.scale", "F32", {20, 1}},     {"o.weight", "I8", {40, 64}},  {"o.scale", "F32", {40, 1}},
    {"o.zero", "I8", {40, 1}},       {"gate.weight", "U8", {72, 64}}, {"gate.scale", "F16", {72, 2}},
    {"up.weight", "F16", {72, 40}},  {"down.weight", "I8", {40, 128}}, {"down.scale", "F16", {40, 2}},
    {"one.weight", "F32", {1, 40}},  {"order", "I32", {40}}};

struct File {
  std::string header, data;
};

File make_weights(Random& random) {
  File file;
  const auto put = [&](const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape) {
    int64_t bytes = dtype == "F32" ? 4 : dtype == "F16" || dtype == "BF16" ? 2 : 1;
    std::string sizes;
    for (const int64_t size : shape)
      bytes *= size, sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
    const size_t begin = file.data.size();
    if (name == "order") {  // a permutation: 7 has no divisor in common with 40
      for (int32_t i = 0; i < shape[0]; i++) {
        const auto value = static_cast<int32_t>(i * 7 % shape[0]);
        file.data.append(reinterpret_cast<const char*>(&value), sizeof value);
      }
      bytes = 4 * shape[0];
    } else {
      for (int64_t i = 0; i < bytes; i++)
        file.data += static_cast<char>(random());  // floats of any bits: NaN and infinity, too
    }
    file.header += (file.header.empty() ? "{\"" : ",\"") + name + "\":{\"dtype\":\"" + dtype +
                   "\",\"shape\":[" + sizes + "],\"data_offsets\":[" + std::to_string(begin) + "," +
                   std::to_string(file.data.size()) + "]}";
  };
  int pads = 0;
  for (const TensorSpec& tensor : kTensors) {
    put(tensor.name, tensor.dtype, tensor.shape);
    put("__pad_" + std::to_string(pads++), "U8", {static_cast<int64_t>(128 - file.data.size() % 64)});
  }
  file.header += "}";
  return file;
}

// The file's bytes; `loose`: the length of the header may lie, or the end be missing.
std::string file_bytes(std::string header, const std::string& data, bool loose, Random& random) {
  header.append(63 - (header.size() + 7) % 64, ' ');
  uint64_t length = header.size();
  if (loose && below(random, 8) == 0) length ^= uint64_t{1} << below(random, 64);
  std::string bytes(8, '\0');
  std::memcpy(&bytes[0], &length, 8);
  bytes += header + data;
  if (loose && below(random, 8) == 0) bytes.resize(below(random, bytes.size()));
  return bytes;
}

// A file in memory under a path of its own.
class MemoryFile {
 public:
  explicit MemoryFile(const std::string& bytes) : descriptor_(memfd_create("weights", 0)) {
    if (descriptor_ < 0 ||
        write(descriptor_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()))
      std::abort();
  }
  ~MemoryFile() { close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

// ---- running ----

void run_forwards(Executor& executor, int32_t slot) {
  const int64_t vocabulary = executor.program().vocabulary;
  std::vector<float> logits(static_cast<size_t>(2 * vocabulary));
  std::vector<float> hidden(static_cast<size_t>(2 * executor.hidden_width()));
  std::vector<int32_t> tokens, positions, slots;
  const int64_t rows = std::min<int64_t>({7, executor.program().max_tokens, executor.max_len()});
  for (int32_t t = 0; t < rows; t++)
    tokens.push_back(static_cast<int32_t>(t % vocabulary)), positions.push_back(t), slots.push_back(slot);
  const int32_t wanted[] = {static_cast<int32_t>(rows - 1), 0};
  executor.forward(tokens.data(), positions.data(), slots.data(), rows, wanted,
                   std::min<int64_t>(2, executor.program().max_tokens), logits.data(),
                   hidden.empty() ? nullptr : hidden.data());
  const int32_t next = std::min(static_cast<int32_t>(rows), static_cast<int32_t>(executor.max_len() - 1));
  executor.forward(tokens.data(), &next, slots.data(), 1, &wanted[1], 1, logits.data());
}

// The error that refused them; empty where they loaded and ran.
std::string load_and_run(const std::string& program, const std::string& weights, Random& random) {
  const MemoryFile file(weights);
  Options options;
  options.threads = 1 + static_cast<int>(below(random, 8) == 0);
  options.max_len = 8 + static_cast<int64_t>(below(random, 32));
  options.max_slots = 2;
  options.alone_below = 0;
  if (below(random, 2)) options.isa = "portable";
  try {
    Executor executor(program, file.path(), options);
    run_forwards(executor, 1);
    executor.copy_slot(1, 0, 8);
    executor.copy_slot(0, 1, 8, 3);
    return "";
  } catch (const Error& error) {
    if (std::strchr(error.what(), '\n'))
      std::printf("an error of several lines: %s\n", error.what()), std::abort();
    return error.what();
  }
}

// For four slots of 40 positions, and threads even for programs as small as this.
Options with_threads(int threads) {
  Options options;
  options.threads = threads;
  options.max_len = 40;
  options.max_slots = 4;
  options.alone_below = 0;
  return options;
}

void run_at_once(const File& base, Random& random) {
  const MemoryFile file(file_bytes(base.header, base.data, false, random));
  Executor one(kProgram, file.path(), with_threads(3)), other(kProgram, file.path(), with_threads(2));
  std::vector<std::thread> threads;
  for (int32_t slot = 0; slot < 4; slot++) {
    threads.emplace_back([&one, &other, slot] {
      for (int i = 0; i < 50; i++) run_forwards(i % 3 ? one : other, slot);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  const long rounds = argc > 1 ? std::atol(argv[1]) : 20000;
  const unsigned long seed = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 1;
  Random random(seed);
  const File base = make_weights(random);
  const std::string whole = file_bytes(base.header, base.data, false, random);
  const std::string refused = load_and_run(kProgram, whole, random);
  if (!refused.empty()) {
    std::printf("the unchanged program does not load: %s\n", refused.c_str());
    return 1;
  }
  run_at_once(base, random);
  long loaded = 0;
  for (long round = 0; round < rounds; round++) {
    random.seed(seed * 1000003 +
                static_cast<unsigned long>(round));  // so that one round can be repeated alone
    const bool header = below(random, 4) == 0;
    const std::string program = header ? kProgram : mutate(kProgram, random);
    const std::string weights =
        file_bytes(header ? mutate(base.header, random) : base.header, base.data, header, random);
    loaded += load_and_run(program, weights, random).empty();
  }
  std::printf("fuzz: %ld rounds, %ld loaded and ran, seed %lu\n", rounds, loaded, seed);
  return 0;
}
