#include "program.h"

#include <unordered_map>

#include "fields.h"

namespace gristmill {
namespace {

constexpr int64_t kMostWidth = int64_t{1} << 24;
constexpr int64_t kMostArena = int64_t{64} << 30;
constexpr int64_t kMostTokens = 65536;
constexpr int64_t kMostPosition = int64_t{1} << 24;
constexpr int64_t kMostSlots = 65536;
constexpr int64_t kMostHeads = 4096;
constexpr size_t kMostItems = 16384;  // values, instructions, weights ...

const std::initializer_list<std::pair<const char*, Function>> kFunctions = {
    {"add", Function::add},
    {"sub", Function::sub},
    {"mul", Function::mul},
    {"div", Function::div},
    {"neg", Function::neg},
    {"exp", Function::exp},
    {"tanh", Function::tanh},
    {"sigmoid", Function::sigmoid},
    {"silu", Function::silu},
    {"gelu", Function::gelu},
    {"gelu_tanh", Function::gelu_tanh},
    {"relu", Function::relu},
    {"sqrt", Function::sqrt},
    {"rsqrt", Function::rsqrt},
    {"square", Function::square},
    {"maximum", Function::maximum},
    {"minimum", Function::minimum},
    {"abs", Function::abs},
    {"reciprocal", Function::reciprocal}};

bool takes_two(Function f) {
  return f == Function::add || f == Function::sub || f == Function::mul || f == Function::div ||
         f == Function::maximum || f == Function::minimum;
}

class Loader {
 public:
  Loader(const Json& root, const Weights& weights, const Split& split)
      : root_(root, "program.json"), tensors_(weights), split_(split) {}

  Program load() {
    root_.integer("format", 1, 1);
    program_.name = root_.text("name");
    program_.vocabulary = root_.integer("vocabulary", 1, kMostWidth);
    load_limits(root_.required("limits"));
    program_.arena_bytes = root_.integer("arena_bytes", 0, kMostArena);
    each("values", [&](const Json& item, const std::string& where) { load_value(Fields(item, where)); });
    each("caches", [&](const Json& item, const std::string& where) { load_cache(Fields(item, where)); });
    each("ropes", [&](const Json& item, const std::string& where) { load_rope(Fields(item, where)); });
    load_weights(root_.required("weights"));
    each("instructions", [&](const Json& item, const std::string& where) { load_instruction(item, where); });
    root_.done();
    check_program(program_, split_.partial);
    return std::move(program_);
  }

 private:
  // Where the tensor of that name lies.
  const Weights& home(const std::string& name) const {
    return split_.base && !tensors_.find(name) ? *split_.base : tensors_;
  }

  template <typename Each>
  void each(const char* name, Each load) {
    const std::vector<Json>& items = root_.array(name);
    if (items.size() > kMostItems)
      fail("program.json: ", items.size(), " ", name, ", at most ", kMostItems, " are read");
    for (size_t i = 0; i < items.size(); i++)
      load(items[i], std::string(name) + "[" + std::to_string(i) + "]");
  }

  void load_limits(const Json& json) {
    Fields fields(json, "limits");
    program_.max_tokens = fields.integer("max_tokens", 1, kMostTokens);
    program_.max_slots = fields.integer("max_slots", 1, kMostSlots);
    program_.max_position = fields.integer("max_position", 1, kMostPosition);
    program_.max_len = fields.integer("max_len", 1, program_.max_position);
    fields.done();
  }

  void load_value(Fields fields) {
    Value value;
    value.requested = fields.choice<bool>("rows", {{"T", false}, {"R", true}});
    value.width = fields.integer("width", 1, kMostWidth);
    value.offset = fields.integer("offset", 0, program_.arena_bytes);
    fields.done();
    const int64_t bytes = program_.max_tokens * value.width * 4;  // < 2^16 * 2^24 * 4
    if (value.offset % 64) fail(fields.where(), ": offset ", value.offset, " is not a multiple of 64");
    if (bytes > program_.arena_bytes - value.offset)
      fail(fields.where(), ": ends at byte ", value.offset + bytes, " of the arena, which has ",
           program_.arena_bytes);
    program_.values.push_back(value);
  }

  void load_cache(Fields fields) {
    CacheSpec cache;
    cache.kv_heads = fields.integer("kv_heads", 1, kMostHeads);
    cache.k_dim = fields.integer("k_dim", 1, kMostHeads);
    cache.v_dim = fields.integer("v_dim", 1, kMostHeads);
    cache.k_type = cache_type(fields, "k_dtype");
    cache.v_type = cache_type(fields, "v_dtype");
    cache.window = fields.integer("window", 0, kMostPosition, 0);
    fields.done();
    program_.caches.push_back(cache);
  }

  static CacheType cache_type(Fields& fields, const char* name) {
    return fields.choice<CacheType>(name, {{"f32", CacheType::f32},
                                           {"f16", CacheType::f16},
                                           {"int8", CacheType::int8},
                                           {"fp8", CacheType::fp8},
                                           {"int4", CacheType::int4}});
  }

  void load_rope(Fields fields) {
    RopeSpec rope;
    rope.dims = fields.integer("dims", 2, kMostHeads);
    if (rope.dims % 2) fail(fields.where(), ": dims is ", rope.dims, ", expected an even number");
    rope.inv_freq = vector(&fields.required("inv_freq"), fields, "inv_freq", rope.dims / 2);
    rope.interleaved = fields.choice<bool>("style", {{"half", false}, {"interleaved", true}});
    rope.scale = fields.real("scale", 1);
    fields.done();
    program_.ropes.push_back(rope);
  }

  // A named f32 vector of the given size; null when the field is.
  const float* vector(const Json* field, const Fields& fields, const char* name, int64_t size) const {
    if (!field) return nullptr;
    const std::string& tensor = fields.as_text(*field, name);
    const char* data = home(tensor).need(tensor, "F32", {size});
    return reinterpret_cast<const float*>(data);
  }

  // A named i32 vector that holds each of 0 .. size - 1 once; null when the field is.
  const int32_t* permutation(const Json* field, const Fields& fields, const char* name, int64_t size) const {
    if (!field) return nullptr;
    const std::string& tensor = fields.as_text(*field, name);
    const auto* values = reinterpret_cast<const int32_t*>(home(tensor).need(tensor, "I32", {size}));
    std::vector<bool> seen(static_cast<size_t>(size), false);
    for (int64_t i = 0; i < size; i++) {
      const int32_t value = values[i];
      if (value < 0 || value >= size)
        fail(fields.where(), ": ", name, "[", i, "] is ", value, ", expected 0 to ", size - 1);
      if (seen[static_cast<size_t>(value)]) fail(fields.where(), ": ", name, " holds ", value, " twice");
      seen[static_cast<size_t>(value)] = true;
    }
    return values;
  }

  void load_weights(const Json& json) {
    if (json.kind != Json::Kind::object)
      fail("program.json: weights is ", json.kind_name(), ", expected an object");
    if (json.keys.size() > kMostItems)
      fail("program.json: ", json.keys.size(), " weights, at most ", kMostItems, " are read");
    for (size_t i = 0; i < json.keys.size(); i++) {
      const std::string where = "weights[" + quote(json.keys[i]) + "]";
      program_.weights.push_back(load_weight(json.items[i], where));
      weight_index_[json.keys[i]] = program_.weights.back().get();
    }
  }

  std::unique_ptr<Weight> load_weight(const Json& json, const std::string& where) const {
    if (json.kind != Json::Kind::array || json.items.empty() || json.items.size() > kMostItems)
      fail(where, ": expected an array of segments");
    auto weight = std::make_unique<Weight>();
    for (size_t i = 0; i < json.items.size(); i++) {
      const std::string label = where + "[" + std::to_string(i) + "]";
      const Matrix matrix = load_segment(Fields(json.items[i], label), weight->bytes);
      const bool integer = is_integer(matrix.format);
      if (i == 0) weight->k = matrix.k, weight->integer = integer;
      if (matrix.k != weight->k) fail(label, ": k is ", matrix.k, ", the first segment has ", weight->k);
      if (integer != weight->integer) fail(label, ": float and integer segments do not mix");
      weight->n += matrix.n;
      if (weight->n > kMostWidth) fail(label, ": more than ", kMostWidth, " rows in all");
      weight->segments.push_back(matrix);
    }
    return weight;
  }

  Matrix load_segment(Fields fields, int64_t& bytes) const {
    Matrix matrix;
    const std::string& name = fields.text("name");
    matrix.format = fields.choice<Format>("format", {{"f32", Format::f32},
                                                     {"f16", Format::f16},
                                                     {"bf16", Format::bf16},
                                                     {"fp8", Format::fp8},
                                                     {"int8", Format::int8},
                                                     {"int4", Format::int4},
                                                     {"int3", Format::int3},
                                                     {"int2", Format::int2}});
    matrix.n = fields.integer("n", 1, kMostWidth);
    matrix.k = fields.integer("k", 1, kMostWidth);
    matrix.group = fields.integer("group", 0, 128, 0);
    matrix.symmetric = fields.flag("symmetric", true);
    fields.done();
    const bool scaled = has_scales(matrix.format);
    const bool known_group =
        matrix.group == 0 || matrix.group == 32 || matrix.group == 64 || matrix.group == 128;
    if (!known_group || (matrix.group >= matrix.k && matrix.group) || (!scaled && matrix.group))
      fail(fields.where(), ": group ", matrix.group,
           ", expected 32, 64 or 128 below k, or 0 (whole row; formats without scales: always)");
    if (!is_integer(matrix.format) && !matrix.symmetric) fail(fields.where(), ": float formats have no zero point");
    bytes += matrix.n * matrix.row_bytes();
    matrix.data = load_data(name, matrix);
    if (scaled) load_scales(name, matrix, bytes);
    return matrix;
  }

  const char* load_data(const std::string& name, const Matrix& matrix) const {
    const std::string tensor = name + ".weight";
    const Weights& file = home(tensor);
    switch (matrix.format) {
      case Format::f32: return file.need(tensor, "F32", {matrix.n, matrix.k});
      case Format::f16: return file.need(tensor, "F16", {matrix.n, matrix.k});
      case Format::bf16: return file.need(tensor, "BF16", {matrix.n, matrix.k});
      case Format::int8: return file.need(tensor, "I8", {matrix.n, matrix.row_bytes()});
      case Format::fp8:
      case Format::int4:
      case Format::int3:
      case Format::int2: return file.need(tensor, "U8", {matrix.n, matrix.row_bytes()});
    }
    return nullptr;
  }

  void load_scales(const std::string& name, Matrix& matrix, int64_t& bytes) const {
    const int64_t groups = matrix.groups();
    const Weights& file = home(name + ".scale");
    const Tensor* scale = file.find(name + ".scale");
    matrix.scale_is_f32 = scale && scale->dtype == "F32";
    matrix.scale = file.need(name + ".scale", matrix.scale_is_f32 ? "F32" : "F16", {matrix.n, groups});
    bytes += matrix.n * groups * (matrix.scale_is_f32 ? 4 : 2);
    if (matrix.symmetric) return;
    const int64_t size = zero_bytes(matrix.format, groups);
    matrix.zero = file.need(name + ".zero", is_unsigned(matrix.format) ? "U8" : "I8", {matrix.n, size});
    bytes += matrix.n * size;
  }

  View view(const Json& json, const Fields& fields, const char* name) const {
    const std::vector<Json>& parts = fields.as_array(json, name);
    if (parts.size() != 3)
      fail(fields.where(), ": field ", quote(name), " has ", parts.size(),
           " items, expected [value, column, width]");
    View view;
    view.value = static_cast<int32_t>(
        fields.as_integer(parts[0], name, -1, static_cast<int64_t>(program_.values.size()) - 1));
    const int64_t width =
        view.value < 0 ? program_.vocabulary : program_.values[static_cast<size_t>(view.value)].width;
    view.column = fields.as_integer(parts[1], name, 0, width - 1);
    view.width = fields.as_integer(parts[2], name, 1, width - view.column);
    return view;
  }
  View view(Fields& fields, const char* name) const { return view(fields.required(name), fields, name); }
  View optional_view(Fields& fields, const char* name) const {
    const Json* field = fields.optional(name);
    return field ? view(*field, fields, name) : View();
  }
  const Weight* weight(Fields& fields) const {
    const auto found = weight_index_.find(fields.text("weight"));
    if (found == weight_index_.end())
      fail(fields.where(), ": weight ", quote(fields.text("weight")), " is not listed under weights");
    return found->second;
  }

  void load_instruction(const Json& json, const std::string& where) {
    Instruction in;
    in.op = Fields(json, where)
                .choice<Op>("op", {{"embedding", Op::embedding},
                                   {"rms_norm", Op::rms_norm},
                                   {"layer_norm", Op::layer_norm},
                                   {"linear", Op::linear},
                                   {"attention", Op::attention},
                                   {"gather_rows", Op::gather_rows},
                                   {"pointwise", Op::pointwise}});
    Fields fields(json, where + " " + op_name(in.op));
    fields.text("op");
    in.out = view(fields, "out");
    switch (in.op) {
      case Op::embedding: load_embedding(fields, in); break;
      case Op::rms_norm:
      case Op::layer_norm: load_norm(fields, in); break;
      case Op::linear: load_linear(fields, in); break;
      case Op::attention: load_attention(fields, in); break;
      case Op::gather_rows: in.in = view(fields, "in"); break;
      case Op::pointwise: load_pointwise(fields, in); break;
    }
    fields.done();
    program_.instructions.push_back(std::move(in));
  }

  void load_embedding(Fields& fields, Instruction& in) const {
    in.positions = fields.choice<bool>("ids", {{"tokens", false}, {"positions", true}});
    in.weight = weight(fields);
    in.scale = fields.real("scale", 1);
    in.offset = fields.integer("offset", 0, kMostPosition, 0);
    in.residual = optional_view(fields, "residual");
  }

  void load_norm(Fields& fields, Instruction& in) const {
    in.in = view(fields, "in");
    in.gain = vector(fields.optional("weight"), fields, "weight", in.in.width);
    if (in.op == Op::layer_norm) in.bias = vector(fields.optional("bias"), fields, "bias", in.in.width);
    in.eps = fields.real("eps");
    in.residual = optional_view(fields, "residual");
  }

  void load_linear(Fields& fields, Instruction& in) const {
    in.in = view(fields, "in");
    in.weight = weight(fields);
    in.bias = vector(fields.optional("bias"), fields, "bias", in.weight->n);
    in.order = permutation(fields.optional("order"), fields, "order", in.in.width);
    if (fields.has("activation"))
      in.activation = fields.choice<Activation>("activation", {{"none", Activation::none},
                                                               {"silu", Activation::silu},
                                                               {"gelu", Activation::gelu},
                                                               {"gelu_tanh", Activation::gelu_tanh},
                                                               {"relu", Activation::relu}});
    in.glu = fields.flag("glu", false);
    in.scale = fields.real("scale", 1);
    in.softcap = fields.real("softcap", 0);
    in.residual = optional_view(fields, "residual");
    in.act_group = fields.integer("act_group", 0, 128);
  }

  void load_attention(Fields& fields, Instruction& in) const {
    in.q = view(fields, "q");
    in.k = view(fields, "k");
    in.v = view(fields, "v");
    in.cache = fields.integer("cache", 0, static_cast<int64_t>(program_.caches.size()) - 1);
    in.heads = fields.integer("heads", 1, kMostHeads);
    in.scale = fields.real("scale");
    in.softcap = fields.real("softcap", 0);
    in.rope = fields.integer("rope", -1, static_cast<int64_t>(program_.ropes.size()) - 1, -1);
    in.hadamard = fields.integer("hadamard", 0, kMostHeads, 0);
    in.eps = fields.real("norm_eps", 0);
    const int64_t k_dim = program_.caches[static_cast<size_t>(in.cache)].k_dim;
    in.q_norm = vector(fields.optional("q_norm"), fields, "q_norm", k_dim);
    in.k_norm = vector(fields.optional("k_norm"), fields, "k_norm", k_dim);
    in.sinks = vector(fields.optional("sinks"), fields, "sinks", in.heads);
  }

  void load_pointwise(Fields& fields, Instruction& in) const {
    constexpr size_t kMostRegisters = 256;
    const std::vector<Json>& inputs = fields.array("in");
    const std::vector<Json>& steps = fields.array("steps");
    if (inputs.empty() || steps.empty() || inputs.size() + steps.size() > kMostRegisters)
      fail(fields.where(), ": ", inputs.size(), " inputs and ", steps.size(),
           " steps, expected 1 or more each, ", kMostRegisters, " together");
    for (const Json& input : inputs) in.inputs.push_back(view(input, fields, "in"));
    for (const Json& step : steps)
      in.steps.push_back(load_step(step, fields, inputs.size() + in.steps.size()));
  }

  PointwiseStep load_step(const Json& json, const Fields& fields, size_t registers) const {
    const std::vector<Json>& parts = fields.as_array(json, "steps");
    if (parts.empty() || parts.size() > 3)
      fail(fields.where(), ": a step has ", parts.size(), " items, expected [name, a, b]");
    const std::string& name = fields.as_text(parts[0], "steps");
    PointwiseStep step;
    bool known = false;
    for (const auto& [word, function] : kFunctions)
      if (name == word) step.function = function, known = true;
    if (!known) fail(fields.where(), ": unknown function ", quote(name));
    const bool two = takes_two(step.function), has_b = parts.size() == 3 && parts[2].kind != Json::Kind::null;
    if (parts.size() < 2 || two != has_b)
      fail(fields.where(), ": ", name, " takes ", two ? "two arguments" : "one argument");
    step.a = operand(parts[1], fields, registers);
    if (two) step.b = operand(parts[2], fields, registers);
    return step;
  }

  Operand operand(const Json& json, const Fields& fields, size_t registers) const {
    Operand operand;
    if (json.kind == Json::Kind::object) {
      Fields constant(json, fields.where() + " steps");
      operand.constant = constant.real("const");
      constant.done();
    } else {
      operand.reg =
          static_cast<int32_t>(fields.as_integer(json, "steps", 0, static_cast<int64_t>(registers) - 1));
    }
    return operand;
  }

  Fields root_;
  const Weights& tensors_;
  const Split& split_;
  Program program_;
  std::unordered_map<std::string, const Weight*> weight_index_;
};

}  // namespace

const char* op_name(Op op) {
  static const char* const kNames[] = {"embedding", "rms_norm",    "layer_norm", "linear",
                                       "attention", "gather_rows", "pointwise"};
  return kNames[static_cast<int>(op)];
}

Program parse_program(std::string_view json, const Weights& weights, const Split& split) {
  const Json root = parse_json(json, "program.json");
  return Loader(root, weights, split).load();
}

}  // namespace gristmill
