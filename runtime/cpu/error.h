// Errors that are a user's to mend: one line with what was got, what was expected, what to do.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace gristmill {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws an Error whose text is all parts in a row.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

// A name from a file as printable ASCII in quotes, cut to a length that fits one line.
inline std::string quote(std::string_view name) {
  constexpr size_t kMost = 80;
  static const char* const kHex = "0123456789abcdef";
  std::string text = "'";
  for (const char c : name.substr(0, kMost)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      text += c;
    } else {
      text += "\\x";
      text += kHex[byte >> 4];
      text += kHex[byte & 15];
    }
  }
  return text + (name.size() > kMost ? "...'" : "'");
}

}  // namespace gristmill
