// A small strict JSON reader: limits on depth, size and nodes; duplicate keys refused; strings stay bytes.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gristmill {

struct Json {
  enum class Kind : uint8_t { null, boolean, number, string, array, object };

  Kind kind = Kind::null;
  bool boolean = false;
  bool is_integer = false;  // written without fraction or exponent, and fits int64
  double number = 0;
  int64_t integer = 0;
  std::string string;
  std::vector<Json> items;        // of an array; values of an object
  std::vector<std::string> keys;  // of an object, in the file's order

  const Json* find(std::string_view key) const;
  const char* kind_name() const;
};

// `what` names the text in errors. Throws Error.
Json parse_json(std::string_view text, const std::string& what);

}  // namespace gristmill
