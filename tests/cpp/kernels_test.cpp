// Norms, the ends of linears, rope, cache and attention of every instruction set against naive references:
// bitwise where the contract says bitwise, else within a tolerance written beside the check. Buffers have exactly
// the sizes an artifact gives them, so that an address sanitizer sees every read outside. The products have files
// of their own. Build: g++ -std=c++17 -O2 -I kernels/cpu tests/cpp/kernels_test.cpp kernels/cpu/*.cpp
#include "check.h"

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
  Buffer<float> k_scale, k_offset, v_scale, sinks, q;
  double key(int64_t slot, int64_t head, int64_t position, int64_t d) const {
    const double offset = cache.type == CacheType::int8 ? k_offset[cache.row(slot, head, position)] : 0;
    return at(k, k_scale, cache.k_dim, slot, head, position, d) + offset;
  }
  double value(int64_t slot, int64_t head, int64_t position, int64_t d) const {
    return at(v, v_scale, cache.v_dim, slot, head, position, d);
  }

 private:
  double at(const Buffer<uint8_t>& data, const Buffer<float>& scale, int64_t width, int64_t slot,
            int64_t head, int64_t position, int64_t d) const {
    const int64_t row = cache.row(slot, head, position), i = row * width + d;
    if (cache.type == CacheType::f32) return reinterpret_cast<const float*>(data.data())[i];
    if (cache.type == CacheType::f16) return to_float(reinterpret_cast<const f16*>(data.data())[i]);
    return static_cast<double>(scale[row]) * static_cast<int8_t>(data[i]);
  }
};

Context context(CacheType type, int64_t heads, int64_t kv_heads, int64_t k_dim, int64_t v_dim, int64_t window,
                float softcap, int64_t length) {
  Context c;
  c.slots = 2;
  c.length = length;
  c.cache.type = type;
  c.cache.kv_heads = kv_heads;
  c.cache.k_dim = k_dim;
  c.cache.v_dim = v_dim;
  c.cache.window = window;
  c.cache.ring = window ? std::min(length, window + 40) : length;
  const int64_t rows = c.slots * kv_heads * c.cache.ring, bytes = type == CacheType::f32   ? 4
                                                                  : type == CacheType::f16 ? 2
                                                                                           : 1;
  c.k = Buffer<uint8_t>(rows * k_dim * bytes);
  c.v = Buffer<uint8_t>(rows * v_dim * bytes);
  std::memset(c.k.data(), 0xff, static_cast<size_t>(c.k.size()));  // what was never appended is not a number
  std::memset(c.v.data(), 0xff, static_cast<size_t>(c.v.size()));
  if (type == CacheType::int8) {
    c.k_scale = Buffer<float>(rows);
    c.k_offset = Buffer<float>(rows);
    c.v_scale = Buffer<float>(rows);
    for (int64_t i = 0; i < rows; i++) c.k_scale[i] = c.k_offset[i] = c.v_scale[i] = NAN;
  }
  c.cache.k = c.k.data();
  c.cache.v = c.v.data();
  c.cache.k_scale = type == CacheType::int8 ? c.k_scale.data() : nullptr;
  c.cache.k_offset = type == CacheType::int8 ? c.k_offset.data() : nullptr;
  c.cache.v_scale = type == CacheType::int8 ? c.v_scale.data() : nullptr;
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
      const Buffer<float> k = random_floats(c.cache.k_dim), v = random_floats(c.cache.v_dim);
      kernels.append(c.cache, slot, head, position, k.data(), v.data());
    }
  }
}

// `rows` query rows from `first` on, all heads, through splits and their combination: [rows, heads, v_dim].
Buffer<float> attend(const Kernels& kernels, const Context& c, int64_t slot, int64_t first, int64_t rows) {
  const int64_t group = c.shape.heads / c.cache.kv_heads, splits = (first + rows - 1) / kSplit + 1,
                v_dim = c.cache.v_dim;
  const int64_t queries = rows * group;
  Buffer<float> out(rows * c.shape.heads * v_dim), m(splits * queries), l(splits * queries),
      acc(splits * queries * v_dim);
  Buffer<uint8_t> scratch(static_cast<int64_t>(kernels.attention_scratch_bytes(group, c.cache.k_dim, v_dim)));
  const int64_t ldq = c.shape.heads * c.cache.k_dim;
  for (int64_t head = 0; head < c.cache.kv_heads; head++) {
    for (int64_t split = 0; split < splits; split++) {
      kernels.attention_split(c.cache, c.shape, c.q.data() + first * ldq + head * group * c.cache.k_dim, ldq,
                              rows, slot, head, first, split, m.data() + split * queries,
                              l.data() + split * queries, acc.data() + split * queries * v_dim,
                              scratch.data());
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
  std::vector<double> score, out(static_cast<size_t>(c.cache.v_dim));
  double largest = c.shape.sinks ? c.shape.sinks[h] : -1e300;
  for (int64_t j = oldest; j <= position; j++) {
    double s = 0;
    for (int64_t d = 0; d < c.cache.k_dim; d++)
      s += c.q[(position * c.shape.heads + h) * c.cache.k_dim + d] * c.key(slot, head, j, d);
    s *= c.shape.scale;
    if (c.shape.softcap > 0) s = c.shape.softcap * std::tanh(s / c.shape.softcap);
    score.push_back(s);
    largest = std::max(largest, s);
  }
  double total = c.shape.sinks ? std::exp(c.shape.sinks[h] - largest) : 0;
  for (double& s : score) total += s = std::exp(s - largest);
  for (int64_t j = oldest; j <= position; j++) {
    for (int64_t d = 0; d < c.cache.v_dim; d++) {
      out[static_cast<size_t>(d)] +=
          score[static_cast<size_t>(j - oldest)] / total * c.value(slot, head, j, d);
    }
  }
  return out;
}

void test_attention(const Context& c, const std::string& name) {
  const int64_t slot = 1, width = c.shape.heads * c.cache.v_dim;
  // a window's ring keeps window + 40 rows: only late rows can be asked, up to 16 at once
  for (const int64_t length : {c.length, c.length - 37}) {
    append_all(portable_kernels, c, slot, length);
    const int64_t rows = std::min<int64_t>(16, length), first = length - rows;
    const Buffer<float> expected = attend(portable_kernels, c, slot, first, rows);
    for (int64_t t = 0; t < rows; t += 5) {
      for (int64_t h = 0; h < c.shape.heads; h++) {
        const std::vector<double> exact = reference_attention(c, slot, first + t, h);
        for (int64_t d = 0; d < c.cache.v_dim; d++) {
          check_near(name, expected[t * width + h * c.cache.v_dim + d], exact[static_cast<size_t>(d)], 1e-5,
                     d);
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
  for (const CacheType type : {CacheType::f32, CacheType::f16, CacheType::int8}) {
    for (int64_t width : {5, 16, 40, 64}) {
      const Context a = context(type, 2, 2, width, width + 3, 0, 0, 9),
                    b = context(type, 2, 2, width, width + 3, 0, 0, 9);
      const auto before = random_bits;
      append_all(kernels, a, 1, 9);
      random_bits = before;
      append_all(portable_kernels, b, 1, 9);
      const std::string what = std::string(kernels.name) + " append";
      for (int64_t i = 0; i < a.k.size(); i++) check_near(what + " k", a.k[i], b.k[i], 0, i);
      for (int64_t i = 0; i < a.v.size(); i++) check_near(what + " v", a.v[i], b.v[i], 0, i);
      const int64_t half = a.k_scale.size() / 2;  // slot 1; slot 0 stays untouched
      check_equal(what + " scale", a.k_scale.data() + half, b.k_scale.data() + half, half);
      check_equal(what + " offset", a.k_offset.data() + half, b.k_offset.data() + half, half);
    }
  }
}

void test_attentions() {
  for (const CacheType type : {CacheType::f32, CacheType::f16, CacheType::int8}) {
    test_attention(context(type, 4, 4, 64, 64, 0, 0, 150), "attention mha");
    test_attention(context(type, 8, 1, 64, 64, 0, 0, 600), "attention mqa");
    test_attention(context(type, 6, 2, 40, 24, 0, 5.f, 130), "attention odd, softcap, sinks");
    test_attention(context(type, 4, 2, 80, 96, 70, 0, 560), "attention window");
    test_attention(context(type, 3, 1, 192, 128, 0, 0, 90), "attention wide");
  }
}

}  // namespace

int main() {
  for (const Kernels* kernels : all_kernels()) {
    test_norms(*kernels);
    test_epilogue(*kernels);
    test_rotate(*kernels);
    test_append(*kernels);
  }
  test_attentions();
  return report();
}
