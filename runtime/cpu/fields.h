// Reads the fields of one JSON object; what is missing, of the wrong kind, out of range or unknown is refused
// by name.
#pragma once
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "error.h"
#include "json.h"

namespace gristmill {

class Fields {
 public:
  Fields(const Json& object, std::string where)
      : object_(object), where_(std::move(where)), used_(object.keys.size(), false) {
    if (object.kind != Json::Kind::object) fail(where_, ": got ", object.kind_name(), ", expected an object");
  }

  // A field that is absent or null.
  const Json* optional(std::string_view name) {
    for (size_t i = 0; i < used_.size(); i++) {
      if (object_.keys[i] != name) continue;
      used_[i] = true;
      return object_.items[i].kind == Json::Kind::null ? nullptr : &object_.items[i];
    }
    return nullptr;
  }
  const Json& required(std::string_view name) {
    const Json* field = optional(name);
    if (!field) fail(where_, ": field ", quote(name), " is missing");
    return *field;
  }
  void done() const {
    for (size_t i = 0; i < used_.size(); i++)
      if (!used_[i]) fail(where_, ": unknown field ", quote(object_.keys[i]));
  }

  int64_t integer(std::string_view name, int64_t low, int64_t high) {
    return as_integer(required(name), name, low, high);
  }
  int64_t integer(std::string_view name, int64_t low, int64_t high, int64_t absent) {
    const Json* field = optional(name);
    return field ? as_integer(*field, name, low, high) : absent;
  }
  float real(std::string_view name) { return as_real(required(name), name); }
  float real(std::string_view name, float absent) {
    const Json* field = optional(name);
    return field ? as_real(*field, name) : absent;
  }
  bool flag(std::string_view name, bool absent) {
    const Json* field = optional(name);
    if (!field) return absent;
    if (field->kind != Json::Kind::boolean) refuse(name, *field, "a boolean");
    return field->boolean;
  }
  const std::string& text(std::string_view name) { return as_text(required(name), name); }
  const std::vector<Json>& array(std::string_view name) { return as_array(required(name), name); }

  template <typename T>
  T choice(std::string_view name, std::initializer_list<std::pair<const char*, T>> known) {
    const std::string& got = text(name);
    std::string all;
    for (const auto& [word, value] : known) {
      if (got == word) return value;
      all += std::string(all.empty() ? "" : ", ") + word;
    }
    fail(where_, ": field ", quote(name), " is ", quote(got), ", expected one of: ", all);
  }
  bool has(std::string_view name) const {
    const Json* field = object_.find(name);
    return field && field->kind != Json::Kind::null;
  }

  int64_t as_integer(const Json& value, std::string_view name, int64_t low, int64_t high) const {
    if (!value.is_integer) refuse(name, value, "an integer");
    if (value.integer < low || value.integer > high)
      fail(where_, ": field ", quote(name), " is ", value.integer, ", expected ", low, " to ", high);
    return value.integer;
  }
  float as_real(const Json& value, std::string_view name) const {
    if (value.kind != Json::Kind::number) refuse(name, value, "a number");
    if (std::fabs(value.number) > static_cast<double>(std::numeric_limits<float>::max()))
      fail(where_, ": field ", quote(name), " does not fit a float");
    return static_cast<float>(value.number);
  }
  const std::string& as_text(const Json& value, std::string_view name) const {
    if (value.kind != Json::Kind::string) refuse(name, value, "a string");
    return value.string;
  }
  const std::vector<Json>& as_array(const Json& value, std::string_view name) const {
    if (value.kind != Json::Kind::array) refuse(name, value, "an array");
    return value.items;
  }
  const std::string& where() const { return where_; }

 private:
  [[noreturn]] void refuse(std::string_view name, const Json& got, const char* expected) const {
    fail(where_, ": field ", quote(name), " is ", got.kind_name(), ", expected ", expected);
  }
  const Json& object_;
  std::string where_;
  std::vector<bool> used_;
};

}  // namespace gristmill
