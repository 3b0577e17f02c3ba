// Norms, the ends of linears, rope, cache and attention of every instruction set against naive references:
// bitwise where the contract says bitwise, else within a tolerance written beside the check. Buffers have exactly
// the sizes an artifact gives them, so that an address sanitizer sees every read outside. The products have files
// of their own. Build: g++ -std=c++17 -O2 -I kernels/cpu tests/cpp/kernels_test.cpp kernels/cpu/*.cpp
#include "check.h"
#include "fp8.h"

using namespace gristmill;

namespace {

// ---- norms, epilogue, rope ----

void test_norms(const Kernels& kernels) {
  for (int64_t width : {1, 15, 16, 64, 100, 2048}) {
    const Buffer<float> x = random_floats(width), weight = random_floats(width), bias = random_floats(width),
                        residual = random_floats(width);
    Buffer<float> out(width), same(width);
    double mean = 0, square = 0, variance = 0;
    for (int64_t i = 0; i < width; i++) mean += x[i] / static_cast<double>(width);
    for (int64_t i = 0; i < width; i++)
      square += static_cast<double>(x[i]) * x[i] / static_cast<double>(width);
    for (int64_t i = 0; i < width; i++)
      variance += (x[i] - mean) * (x[i] - mean) / static_cast<double>(width);
    for (int options = 0; options < 8; options++) {
      const float *w = options & 1 ? weight.data() : nullptr, *b = options & 2 ? bias.data() : nullptr,
                  *r = options & 4 ? residual.data() : nullptr;
      const std::string what =
          std::string(kernels.name) + " norm " + std::to_string(width) + "/" + std::to_string(options);
      kernels.layer_norm(x.data(), w, b, r, width, 1e-5f, out.data());
      for (int64_t i = 0; i < width; i++) {
        const double z =
            (x[i] - mean) / std::sqrt(variance + 1e-5) * (w ? w[i] : 1) + (b ? b[i] : 0) + (r ? r[i] : 0);
        check_near(what, out[i], z, 1e-5, i);
      }
      portable_kernels.layer_norm(x.data(), w, b, r, width, 1e-5f, same.data());
      check_equal(what + " layer", out.data(), same.data(), width);
      if (b) continue;
      kernels.rms_norm(x.data(), w, r, width, 1e-5f, out.data());
      for (int64_t i = 0; i < width; i++) {
        check_near(what, out[i], x[i] / std::sqrt(square + 1e-5) * (w ? w[i] : 1) + (r ? r[i] : 0), 1e-5, i);
      }
      portable_kernels.rms_norm(x.data(), w, r, width, 1e-5f, same.data());
      check_equal(what + " rms", out.data(), same.data(), width);
    }
  }
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::gelu: return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::relu: return std::max(x, 0.);
  }
  return 0;
}

void test_epilogue(const Kernels& kernels) {
  const int64_t count = 4001;
  Buffer<float> y(count), out(count), same(count);
  for (int64_t i = 0; i < count; i++) y[i] = static_cast<float>(i - 2000) * (i % 7 ? 0.004f : 0.06f);
  const Buffer<float> up = random_floats(count), bias = random_floats(count), up_bias = random_floats(count),
                      residual = random_floats(count);
  for (const Activation activation :
       {Activation::none, Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu}) {
    for (int options = 0; options < 16; options++) {
      const float *b = options & 1 ? bias.data() : nullptr, *u = options & 2 ? up.data() : nullptr,
                  *ub = options & 2 && b ? up_bias.data() : nullptr,
                  *r = options & 4 ? residual.data() : nullptr;
      const float cap = options & 8 ? 5.f : 0.f;
      const std::string what = std::string(kernels.name) + " epilogue " +
                               std::to_string(static_cast<int>(activation)) + "/" + std::to_string(options);
      kernels.epilogue(y.data(), b, u, ub, activation, 0.7f, cap, r, count, out.data());
      portable_kernels.epilogue(y.data(), b, u, ub, activation, 0.7f, cap, r, count, same.data());
      check_equal(what, out.data(), same.data(), count);
      for (int64_t i = 0; i < count; i++) {
        double z = activated(activation, static_cast<double>(b ? y[i] + b[i] : y[i])) *
                   (u ? u[i] + (ub ? ub[i] : 0) : 1);
        z *= 0.7f;
        if (cap > 0) z = cap * std::tanh(z / cap);
        check_near(what, out[i], z + (r ? r[i] : 0), 1e-6 + 6e-7 * (std::fabs(z) + 1), i);
      }
    }
  }
}

void test_rotate(const Kernels& kernels) {
  for (int64_t half : {3, 8, 20, 32, 64}) {
    for (const bool interleaved : {false, true}) {
      const int64_t width = 2 * half + 5;
      Buffer<float> angle(3 * half), cos(3 * half), sin(3 * half);
      for (int64_t i = 0; i < 3 * half; i++) {
        angle[i] = normal();
        cos[i] = std::cos(angle[i]);
        sin[i] = std::sin(angle[i]);
      }
      const Buffer<float> x = random_floats(width);
      Buffer<float> out(width);
      std::copy(x.data(), x.data() + width, out.data());
      kernels.rotate(out.data(), {cos.data(), sin.data(), 2 * half, interleaved}, 2);
      for (int64_t i = 0; i < half; i++) {
        const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : half + i;
        const double c = cos[2 * half + i], s = sin[2 * half + i];
        check_near(std::string(kernels.name) + " rotate", out[a], x[a] * c - x[b] * s, 1e-6, i);
        check_near(std::string(kernels.name) + " rotate", out[b], x[b] * c + x[a] * s, 1e-6, i);
      }
      for (int64_t i = 2 * half; i < width; i++) check_near("rotate passes", out[i], x[i], 0, i);
    }
  }
}

// ---- attention ----

struct Context {
  Cache cache;
  AttentionShape shape;
  int64_t slots, length;
  Buffer<uint8_t> k, v;
  Buffer<float> sinks, q;
  double key(int64_t slot, int64_t head, int64_t position, int64_t d) const {
    const int64_t row = cache.row(slot, head, position);
    if (cache.k.type != CacheType::int8) return stored(cache.k, row, d);
    return in_tile(cache.k, row, CacheRows::key_byte(row, d));
  }
  double value(int64_t slot, int64_t head, int64_t position, int64_t d) const {
    const int64_t row = cache.row(slot, head, position);
    if (cache.v.type != CacheType::int8) return stored(cache.v, row, d);
    return in_tile(cache.v, row, cache.v.value_byte(row, d));
  }

  // Column d of a row, read as kernels.h describes rows.
  static double stored(const CacheRows& rows, int64_t index, int64_t d) {
    const char* row = rows.row(index);
    const auto real = [&](int64_t at) { return static_cast<double>(read<float>(row + at)); };
    const auto half = [&](int64_t at) { return static_cast<double>(to_float(read<f16>(row + at))); };
    switch (rows.type) {
      case CacheType::f32: return real(4 * d);
      case CacheType::f16: return half(2 * d);
      case CacheType::int8: return 0;  // lies in tiles
      case CacheType::fp8: return real(0) * static_cast<double>(to_float(read<fp8>(row + 4 + d)));
      case CacheType::int4: break;
    }
    const int64_t header = (rows.dim + 31) / 32 * 4;
    const int q = static_cast<uint8_t>(row[header + d / 2]) >> (d % 2 ? 4 : 0) & 15;
    return half(d / 32 * 4) * q + half(d / 32 * 4 + 2);
  }

 private:
  static double in_tile(const CacheRows& rows, int64_t index, int64_t byte) {
    const char* tile = rows.tile(index);
    const char* header = tile + index % 16 * 4;
    return static_cast<double>(read<float>(header)) * static_cast<uint8_t>(tile[byte]) +
           static_cast<double>(read<float>(header + 64));
  }
  template <typename T>
  static T read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
};

const CacheType kCacheTypes[] = {CacheType::f32, CacheType::f16, CacheType::int8, CacheType::fp8,
                                 CacheType::int4};

Context context(CacheType k_type, CacheType v_type, int64_t heads, int64_t kv_heads, int64_t k_dim,
                int64_t v_dim, int64_t window, float softcap, int64_t length) {
  Context c;
  c.slots = 2;
  c.length = length;
  c.cache.k = {k_type, k_dim};
  c.cache.v = {v_type, v_dim};
  c.cache.kv_heads = kv_heads;
  c.cache.window = window;
  c.cache.ring = whole_tiles(window ? std::min(length, window + 40) : length);
  const int64_t rows = c.slots * kv_heads * c.cache.ring;
  c.k = Buffer<uint8_t>(rows * c.cache.k.row_bytes());
  c.v = Buffer<uint8_t>(rows * c.cache.v.row_bytes());
  std::memset(c.k.data(), 0xff, static_cast<size_t>(c.k.size()));  // what was never appended is not a number
  std::memset(c.v.data(), 0xff, static_cast<size_t>(c.v.size()));
  c.cache.k.data = reinterpret_cast<char*>(c.k.data());
  c.cache.v.data = reinterpret_cast<char*>(c.v.data());
  c.sinks = random_floats(heads);
  c.shape.heads = heads;
  c.shape.scale = 1.f / std::sqrt(static_cast<float>(k_dim));
  c.shape.softcap = softcap;
  c.shape.sinks = softcap > 0 ? c.sinks.data() : nullptr;
  c.q = random_floats(length * heads * k_dim);
  for (int64_t i = 0; i < c.q.size(); i++) c.q[i] *= 2;
  return c;
}

void append_all(const Kernels& kernels, const Context& c, int64_t slot, int64_t length) {
  for (int64_t position = 0; position < length; position++) {
    for (int64_t head = 0; head < c.cache.kv_heads; head++) {
      const Buffer<float> k = random_floats(c.cache.k.dim), v = random_floats(c.cache.v.dim);
      kernels.append(c.cache, slot, head, position, k.data(), v.data());
    }
  }
}

// `rows` query rows from `first` on, all heads, through splits and their combination: [rows, heads, v_dim].
Buffer<float> attend(const Kernels& kernels, const Context& c, int64_t slot, int64_t first, int64_t rows) {
  const int64_t group = c.shape.heads / c.cache.kv_heads, splits = (first + rows - 1) / kSplit + 1,
                v_dim = c.cache.v.dim;
  const int64_t queries = rows * group;
  Buffer<float> out(rows * c.shape.heads * v_dim), m(splits * queries), l(splits * queries),
      acc(splits * queries * v_dim);
  Buffer<uint8_t> scratch(static_cast<int64_t>(kernels.attention_scratch_bytes(group, c.cache.k.dim, v_dim)));
  const int64_t ldq = c.shape.heads * c.cache.k.dim;
  for (int64_t head = 0; head < c.cache.kv_heads; head++) {
    kernels.attention_prepare(c.cache, c.shape, c.q.data() + first * ldq + head * group * c.cache.k.dim, ldq, rows,
                              scratch.data());
    for (int64_t split = 0; split < splits; split++) {
      kernels.attention_split(c.cache, c.shape, rows, slot, head, first, split, m.data() + split * queries,
                              l.data() + split * queries, acc.data() + split * queries * v_dim, scratch.data());
    }
    for (int64_t i = 0; i < queries; i++) {
      const int64_t h = head * group + i % group;
      kernels.attention_combine(m.data() + i, l.data() + i, queries, acc.data() + i * v_dim, queries * v_dim,
                                splits, c.shape.sinks ? c.shape.sinks + h : nullptr, v_dim,
                                out.data() + (i / group * c.shape.heads + h) * v_dim);
    }
  }
  return out;
}

std::vector<double> reference_attention(const Context& c, int64_t slot, int64_t position, int64_t h) {
  const int64_t head = h / (c.shape.heads / c.cache.kv_heads);
  const int64_t oldest = c.cache.window ? std::max<int64_t>(0, position - c.cache.window + 1) : 0;
  std::vector<double> score, out(static_cast<size_t>(c.cache.v.dim));
  double largest = c.shape.sinks ? c.shape.sinks[h] : -1e300;
  for (int64_t j = oldest; j <= position; j++) {
    double s = 0;
    for (int64_t d = 0; d < c.cache.k.dim; d++)
      s += c.q[(position * c.shape.heads + h) * c.cache.k.dim + d] * c.key(slot, head, j, d);
    s *= c.shape.scale;
    if (c.shape.softcap > 0) s = c.shape.softcap * std::tanh(s / c.shape.softcap);
    score.push_back(s);
    largest = std::max(largest, s);
  }
  double total = c.shape.sinks ? std::exp(c.shape.sinks[h] - largest) : 0;
  for (double& s : score) total += s = std::exp(s - largest);
  for (int64_t j = oldest; j <= position; j++) {
    for (int64_t d = 0; d < c.cache.v.dim; d++) {
      out[static_cast<size_t>(d)] +=
          score[static_cast<size_t>(j - oldest)] / total * c.value(slot, head, j, d);
    }
  }
  return out;
}

// Queries and probabilities that meet int8 are rounded to 16 bits. The probabilities' error is at most 3 % of what
// rounding the values to int8 does: sqrt(64) 128 / 32639 of their step.
double attention_tolerance(const Cache& cache) {
  return 1e-5 + (cache.k.type == CacheType::int8 ? 1e-4 : 0) + (cache.v.type == CacheType::int8 ? 6e-4 : 0);
}

void test_attention(const Context& c, const std::string& name) {
  const int64_t slot = 1, width = c.shape.heads * c.cache.v.dim;
  // a window's ring keeps window + 40 rows: only late rows can be asked, up to 16 at once
  for (const int64_t length : {c.length, c.length - 37}) {
    append_all(portable_kernels, c, slot, length);
    const int64_t rows = std::min<int64_t>(16, length), first = length - rows;
    const Buffer<float> expected = attend(portable_kernels, c, slot, first, rows);
    for (int64_t t = 0; t < rows; t += 5) {
      for (int64_t h = 0; h < c.shape.heads; h++) {
        const std::vector<double> exact = reference_attention(c, slot, first + t, h);
        for (int64_t d = 0; d < c.cache.v.dim; d++) {
          check_near(name, expected[t * width + h * c.cache.v.dim + d], exact[static_cast<size_t>(d)],
                     attention_tolerance(c.cache), d);
        }
      }
    }
    for (const Kernels* kernels : all_kernels()) {
      const std::string what = std::string(kernels->name) + " " + name;
      for (const int64_t count : {int64_t{1}, int64_t{3}, rows}) {
        for (int64_t t = 0; t + count <= rows; t += count) {
          const Buffer<float> got = attend(*kernels, c, slot, first + t, count);
          check_equal(what + " rows" + std::to_string(count), got.data(), expected.data() + t * width,
                      count * width);
        }
      }
    }
  }
}

// What one instruction set appends, every other appends too.
void test_append(const Kernels& kernels) {
  for (const CacheType type : kCacheTypes) {
    for (int64_t width : {5, 16, 40, 64}) {
      const Context a = context(type, type, 2, 2, width, width + 3, 0, 0, 9),
                    b = context(type, type, 2, 2, width, width + 3, 0, 0, 9);
      const auto before = random_bits;
      append_all(kernels, a, 1, 9);
      random_bits = before;
      append_all(portable_kernels, b, 1, 9);
      const std::string what = std::string(kernels.name) + " append";
      for (int64_t i = 0; i < a.k.size(); i++) check_near(what + " k", a.k[i], b.k[i], 0, i);
      for (int64_t i = 0; i < a.v.size(); i++) check_near(what + " v", a.v[i], b.v[i], 0, i);
    }
  }
}

// How far a value may be from what is stored for it, where the range of its group is `range`.
double rounding_bound(CacheType type, double value, double range) {
  switch (type) {
    case CacheType::f32: return 0;
    case CacheType::f16: return std::fabs(value) / 2048;
    case CacheType::int8: return range / 255 * 0.76;  // half of one and a half steps
    case CacheType::fp8: return std::max(std::fabs(value) / 16, range / 448 / 1024) * 1.0001;
    case CacheType::int4: return range * 0.135 + std::fabs(value) / 2048;  // three quarters of the range
  }
  return 0;
}

// Stored rows come back, constant parts, outliers, constant and zero rows included.
void test_rounding(const Kernels& kernels) {
  for (const CacheType type : kCacheTypes) {
    for (int64_t width : {1, 8, 31, 64, 80, 96}) {
      for (int kind = 0; kind < 4; kind++) {
        const Context c = context(type, type, 1, 1, width, width, 0, 0, 1);
        Buffer<float> x = random_floats(width);
        for (int64_t i = 0; i < width; i++) x[i] = kind == 0 ? 0.f : kind == 1 ? 7.25f : x[i];
        if (kind == 3) x[width / 2] *= 30;
        kernels.append(c.cache, 0, 0, 0, x.data(), x.data());
        for (int64_t d = 0; d < width; d++) {
          const int64_t size = type == CacheType::int4 ? 32 : width, begin = d / size * size;
          const float *first = x.data() + begin, *last = x.data() + std::min(width, begin + size);
          const auto [least, most] = std::minmax_element(first, last);
          const double largest = std::max(std::fabs(*least), std::fabs(*most));
          const double range = type == CacheType::fp8 ? largest : *most - *least;
          const double beyond = std::fabs(c.key(0, 0, 0, d) - x[d]) - rounding_bound(type, x[d], range);
          check_near(std::string(kernels.name) + " rounding", std::max(0., beyond), 0, 1e-5, d);
          check_near("values round as keys", c.value(0, 0, 0, d), c.key(0, 0, 0, d), 0, d);
        }
      }
    }
  }
}

// A number that is none makes its row none, and no other.
void test_poison(const Kernels& kernels) {
  for (const CacheType type : kCacheTypes) {
    for (const float bad : {NAN, INFINITY}) {
      const Context c = context(type, type, 1, 1, 40, 40, 0, 0, 2);
      Buffer<float> x = random_floats(40);
      kernels.append(c.cache, 0, 0, 0, x.data(), x.data());
      x[3] = bad;
      kernels.append(c.cache, 0, 0, 1, x.data(), x.data());
      check_near("poison", std::isfinite(c.key(0, 0, 1, 3)), 0, 0, 3);
      const Buffer<float> clean = attend(kernels, c, 0, 0, 1), both = attend(kernels, c, 0, 0, 2);
      check_equal(std::string(kernels.name) + " poison is not seen before", both.data(), clean.data(), 40);
      check_near("poison is seen", std::isfinite(both[40 + 3]), 0, 0, 3);
    }
  }
}

void test_hadamard(const Kernels& kernels) {
  const std::pair<int64_t, int64_t> shapes[] = {{8, 8}, {64, 32}, {80, 16}, {96, 32}, {128, 128}, {5, 1}};
  for (const auto& [dim, block] : shapes) {
    const Buffer<float> x = random_floats(dim);
    Buffer<float> got(dim);
    std::copy(x.data(), x.data() + dim, got.data());
    kernels.hadamard(got.data(), dim, block);
    for (int64_t i = 0; i < dim; i++) {
      double sum = 0;
      for (int64_t j = 0; j < block; j++) {
        const double sign = __builtin_parityll(static_cast<uint64_t>(i % block & j)) ? -1 : 1;
        sum += sign * x[i / block * block + j];
      }
      const double exact = sum / std::sqrt(static_cast<double>(block));
      check_near(std::string(kernels.name) + " hadamard", got[i], exact, 1e-5, i);
    }
  }
}

void test_attentions() {
  for (const CacheType k : kCacheTypes) {
    for (const CacheType v : kCacheTypes) {
      const std::string types = " " + std::to_string(static_cast<int>(k)) + std::to_string(static_cast<int>(v));
      test_attention(context(k, v, 6, 2, 40, 24, 0, 5.f, 130), "attention odd, softcap, sinks" + types);
      test_attention(context(k, v, 4, 2, 8, 16, 70, 0, 200), "attention narrow, window" + types);
      if (k != v) continue;
      test_attention(context(k, v, 4, 4, 64, 64, 0, 0, 150), "attention mha" + types);
      test_attention(context(k, v, 8, 1, 64, 64, 0, 0, 600), "attention mqa" + types);
      test_attention(context(k, v, 4, 2, 80, 96, 70, 0, 560), "attention window" + types);
      test_attention(context(k, v, 3, 1, 192, 128, 0, 0, 90), "attention wide" + types);
      test_attention(context(k, v, 2, 1, 5, 33, 0, 0, 70), "attention odd" + types);
      test_attention(context(k, v, 2, 1, 576, 512, 0, 0, 70), "attention widest" + types);
    }
  }
}

// e4m3 against its definition, for every code and for what lies between two of them.
void test_fp8() {
  const auto exact = [](uint32_t code) {
    const int exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
    return exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  };
  for (uint32_t code = 0; code < 0x7f; code++) {
    check_near("fp8 value", to_float(fp8{static_cast<uint8_t>(code)}), exact(code), 0, code);
    check_near("fp8 negative", to_float(fp8{static_cast<uint8_t>(code | 0x80)}), -exact(code), 0, code);
    check_near("fp8 round trip", to_fp8(static_cast<float>(exact(code))).bits, code, 0, code);
    if (code == 0x7e) continue;
    const double middle = (exact(code) + exact(code + 1)) / 2, step = exact(code + 1) - exact(code);
    check_near("fp8 tie", to_fp8(static_cast<float>(middle)).bits, code + code % 2, 0, code);
    check_near("fp8 below", to_fp8(static_cast<float>(middle - step / 64)).bits, code, 0, code);
    check_near("fp8 above", to_fp8(static_cast<float>(-middle - step / 64)).bits, (code + 1) | 0x80, 0, code);
  }
  check_near("fp8 saturates", to_fp8(1e9f).bits, 0x7e, 0, 0);
  check_near("fp8 keeps what is not a number", std::isnan(to_float(to_fp8(NAN))), 1, 0, 0);
}

}  // namespace

int main() {
  test_fp8();
  for (const Kernels* kernels : all_kernels()) {
    test_norms(*kernels);
    test_epilogue(*kernels);
    test_rotate(*kernels);
    test_append(*kernels);
    test_rounding(*kernels);
    test_poison(*kernels);
    test_hadamard(*kernels);
    check_near("operations", kernels->peak_float(6), 2 * kernels->peak_float(3), 0, 0);
    check_near("integer operations", kernels->peak_int(6), 2 * kernels->peak_int(3), 0, 0);
  }
  test_attentions();
  return report();
}
