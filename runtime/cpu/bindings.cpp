// gristmill.runtime.cpu._native
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "error.h"
#include "executor.h"
#include "roof.h"

namespace py = pybind11;
using namespace gristmill;

namespace {

using Ids = py::array_t<int32_t, py::array::c_style>;

// An int32 vector of any stride; nothing else is converted in silence.
Ids ids(const py::object& given, const char* name) {
  if (!py::isinstance<py::array_t<int32_t>>(given)) fail(name, ": expected a numpy array of int32");
  const auto array = Ids::ensure(given);
  if (!array || array.ndim() != 1) fail(name, ": expected one dimension");
  return array;
}

using Floats = py::array_t<float>;

// Where a forward stops to call `between(i, first, rows, logits)`, with the interpreter; see Cuts.
struct Stops {
  std::vector<int64_t> after, band;
  py::object between;
};

Cuts cuts_of(const Stops& stops, const py::function& between, const Floats& logits) {
  return {stops.after, stops.band, [&](size_t i, int64_t first, int64_t rows) {
            const py::gil_scoped_acquire acquire;
            between(i, first, rows, logits);
          }};
}

// The logits; *hidden, if asked for, becomes the hidden states.
Floats run(Executor& executor, const py::object& tokens, const py::object& positions,
           const py::object& slots, const py::object& rows, const py::object& adapters, const Stops& stops,
           Floats* hidden) {
  const Ids t = ids(tokens, "tokens"), p = ids(positions, "positions"), s = ids(slots, "slots"),
            r = ids(rows, "rows");
  if (p.size() != t.size() || s.size() != t.size())
    fail("got ", t.size(), " tokens, ", p.size(), " positions and ", s.size(),
         " slots, expected as many of each");
  const Ids a = adapters.is_none() ? Ids(0) : ids(adapters, "adapters");
  if (!adapters.is_none() && a.size() != t.size())
    fail("got ", t.size(), " tokens and ", a.size(), " adapters, expected as many of each");
  if (r.size() > executor.program().max_tokens)
    fail("got ", r.size(), " rows, expected 0 to ", executor.program().max_tokens, " in one forward");
  Floats logits({r.size(), static_cast<py::ssize_t>(executor.program().vocabulary)});
  if (hidden) *hidden = Floats({r.size(), static_cast<py::ssize_t>(executor.hidden_width())});
  std::optional<py::function> call;
  if (!stops.after.empty()) call = py::function(stops.between);
  const Cuts cuts = call ? cuts_of(stops, *call, logits) : Cuts{};
  float* hidden_data = hidden ? hidden->mutable_data() : nullptr;
  {
    const py::gil_scoped_release release;
    executor.forward(t.data(), p.data(), s.data(), t.size(), r.data(), r.size(), logits.mutable_data(),
                     hidden_data, adapters.is_none() ? nullptr : a.data(), &cuts);
  }
  return logits;
}

Floats forward(Executor& executor, const py::object& tokens, const py::object& positions,
               const py::object& slots, const py::object& rows, const py::object& adapters,
               const std::vector<int64_t>& after, const std::vector<int64_t>& band, const py::object& between) {
  return run(executor, tokens, positions, slots, rows, adapters, {after, band, between}, nullptr);
}

std::pair<Floats, Floats> forward_hidden(Executor& executor, const py::object& tokens,
                                         const py::object& positions, const py::object& slots,
                                         const py::object& rows, const py::object& adapters,
                                         const std::vector<int64_t>& after, const std::vector<int64_t>& band,
                                         const py::object& between) {
  Floats hidden;
  const Floats logits =
      run(executor, tokens, positions, slots, rows, adapters, {after, band, between}, &hidden);
  return {logits, hidden};
}

// Of a contiguous matrix of any element type.
std::pair<const void*, size_t> bytes_of(const py::handle& matrix) {
  const auto array = py::reinterpret_borrow<py::array>(matrix);
  if (!py::isinstance<py::array>(matrix) || !(array.flags() & py::array::c_style) || array.ndim() != 2)
    fail("adapter: expected A and B as contiguous numpy matrices");
  return {array.data(), static_cast<size_t>(array.nbytes())};
}

int64_t add_adapter(Executor& executor, const py::list& pairs) {
  std::vector<GivenLowRank> given;
  for (const py::handle& item : pairs) {
    const auto pair = py::reinterpret_borrow<py::tuple>(item);
    GivenLowRank one;
    one.instruction = pair[0].cast<int64_t>();
    one.segment = pair[1].cast<int64_t>();
    const auto format = pair[2].cast<std::string>();
    if (format != "f32" && format != "f16" && format != "bf16")
      fail("adapter: format ", format, ", expected f32, f16 or bf16");
    one.format = format == "f32" ? Format::f32 : format == "f16" ? Format::f16 : Format::bf16;
    std::tie(one.a, one.a_bytes) = bytes_of(pair[3]);
    std::tie(one.b, one.b_bytes) = bytes_of(pair[4]);
    one.rank = py::reinterpret_borrow<py::array>(pair[3]).shape(0);
    one.scale = pair[5].cast<float>();
    given.push_back(one);
  }
  const py::gil_scoped_release release;
  return executor.add_adapter(given);
}

std::unique_ptr<Executor> make(const py::bytes& program, const std::string& path, int threads,
                               int64_t max_len, int64_t max_slots, const std::string& isa,
                               bool huge_pages, bool pinned, int64_t alone_below,
                               const std::string& base_weights, bool partial) {
  const std::string_view json = program;
  const py::gil_scoped_release release;
  Options options;
  options.threads = threads;
  options.max_len = max_len;
  options.max_slots = max_slots;
  options.isa = isa;
  options.huge_pages = huge_pages;
  options.base_weights = base_weights;
  options.partial = partial;
  options.pinned = pinned;
  options.alone_below = alone_below;
  return std::make_unique<Executor>(json, path, options);
}

std::vector<std::string> isas() {
  int count = 0;
  const Kernels* const* kernels = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; i++) names.emplace_back(kernels[i]->name);
  return names;
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    const py::object type = py::module_::import("gristmill.runtime.errors").attr("GristmillError");
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The C++ executor of compiled programs.";
  py::register_local_exception_translator(translate);
  py::class_<Executor>(module, "Executor")
      .def(py::init(&make), py::arg("program_json"), py::arg("weights_path"), py::kw_only(),
           py::arg("threads"), py::arg("max_len"), py::arg("max_slots"), py::arg("isa") = "auto",
           py::arg("huge_pages") = false, py::arg("pinned") = false,
           py::arg("alone_below") = Options{}.alone_below, py::arg("base_weights") = "",
           py::arg("partial") = false)
      .def("forward", &forward, py::arg("tokens"), py::arg("positions"), py::arg("slots"), py::arg("rows"),
           py::arg("adapters") = py::none(), py::kw_only(), py::arg("after") = std::vector<int64_t>{},
           py::arg("band") = std::vector<int64_t>{}, py::arg("between") = py::none())
      .def("forward_hidden", &forward_hidden, py::arg("tokens"), py::arg("positions"), py::arg("slots"),
           py::arg("rows"), py::arg("adapters") = py::none(), py::kw_only(),
           py::arg("after") = std::vector<int64_t>{}, py::arg("band") = std::vector<int64_t>{},
           py::arg("between") = py::none())
      .def_property_readonly("arena", [](const py::object& self) {
        const auto& executor = self.cast<const Executor&>();
        return py::array_t<uint8_t>({executor.program().arena_bytes}, {1},
                                    reinterpret_cast<uint8_t*>(executor.arena()), self);
      })
      .def("add_adapter", &add_adapter, py::arg("pairs"))
      .def("remove_adapter", &Executor::remove_adapter, py::arg("adapter"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("adapter_bytes", &Executor::adapter_bytes)
      .def("copy_slot", &Executor::copy_slot, py::arg("src"), py::arg("dst"), py::arg("length"),
           py::arg("start") = 0, py::call_guard<py::gil_scoped_release>())
      .def("profile", &Executor::profile, py::arg("enable"), py::call_guard<py::gil_scoped_release>())
      .def("profile_results",
           [](Executor& self) {
             std::vector<InstructionTime> results;
             {
               const py::gil_scoped_release release;
               results = self.profile_results();
             }
             std::vector<std::tuple<std::string, int64_t, int64_t>> tuples;
             for (auto& r : results) tuples.emplace_back(std::move(r.label), r.nanoseconds, r.bytes);
             return tuples;
           })
      .def("stall", &Executor::stall, py::arg("nanoseconds"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("shared_phases", &Executor::shared_phases)
      .def_property_readonly("threads", &Executor::threads)
      .def_property_readonly("max_tokens", [](const Executor& self) { return self.program().max_tokens; })
      .def_property_readonly("max_slots", &Executor::max_slots)
      .def_property_readonly("max_len", &Executor::max_len)
      .def_property_readonly("vocabulary", [](const Executor& self) { return self.program().vocabulary; })
      .def_property_readonly("hidden_width", &Executor::hidden_width)
      .def_property_readonly("isa", &Executor::isa)
      .def_property_readonly("arena_bytes", [](const Executor& self) { return self.program().arena_bytes; })
      .def_property_readonly("kv_bytes", &Executor::kv_bytes)
      .def_property_readonly("weight_bytes", &Executor::weight_bytes)
      .def_property_readonly("weight_bytes_per_token", &Executor::weight_bytes_per_token);
  module.def("isas", &isas, "Instruction sets this CPU can run, best first.");
  module.def("default_threads", &default_threads, "Physical cores that this process may run on.");
  module.def("read_bandwidth", &read_bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("seconds"),
             py::call_guard<py::gil_scoped_release>(),
             "GB/s that all threads together read of anonymous memory.");
  module.def("arithmetic_peak", &arithmetic_peak, py::arg("isa"), py::arg("integer"), py::arg("threads"),
             py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
             "1e9 operations per second of independent multiply-adds in registers.");
}
