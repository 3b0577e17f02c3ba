#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "error.h"

namespace gristmill {
namespace {

constexpr int kMostDepth = 32;
constexpr size_t kMostBytes = size_t{32} << 20;
constexpr size_t kMostNodes = size_t{1} << 20;

class Parser {
 public:
  Parser(std::string_view text, const std::string& what) : text_(text), what_(what) {}

  Json document() {
    if (text_.size() > kMostBytes)
      fail(what_, ": ", text_.size(), " bytes of JSON, at most ", kMostBytes, " are read");
    Json value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) refuse("expected the end");
    return value;
  }

 private:
  [[noreturn]] void refuse(const char* why) const {
    const std::string got = at_ < text_.size() ? quote(text_.substr(at_, 1)) : "the end";
    fail(what_, ": not valid JSON at byte ", at_, ": ", why, ", got ", got);
  }
  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      at_++;
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool accept(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    at_++;
    return true;
  }
  bool digit() const { return peek() >= '0' && peek() <= '9'; }

  Json parse_value(int depth) {
    if (depth > kMostDepth) refuse("nested too deeply");
    if (++nodes_ > kMostNodes) refuse("too many values");
    skip_space();
    switch (peek()) {
      case '{': return parse_object(depth);
      case '[': return parse_array(depth);
      case '"': return parse_text();
      case 't': return parse_word("true", Json::Kind::boolean, true);
      case 'f': return parse_word("false", Json::Kind::boolean, false);
      case 'n': return parse_word("null", Json::Kind::null, false);
      default: return parse_number();
    }
  }

  Json parse_word(std::string_view word, Json::Kind kind, bool boolean) {
    if (text_.substr(at_, word.size()) != word) refuse("expected a value");
    at_ += word.size();
    Json value;
    value.kind = kind;
    value.boolean = boolean;
    return value;
  }

  Json parse_text() {
    Json value;
    value.kind = Json::Kind::string;
    value.string = parse_string();
    return value;
  }

  Json parse_array(int depth) {
    Json value;
    value.kind = Json::Kind::array;
    at_++;
    skip_space();
    if (accept(']')) return value;
    do {
      value.items.push_back(parse_value(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept(']')) refuse("expected ',' or ']'");
    return value;
  }

  Json parse_object(int depth) {
    Json value;
    value.kind = Json::Kind::object;
    at_++;
    skip_space();
    if (accept('}')) return value;
    do {
      skip_space();
      if (peek() != '"') refuse("expected a key");
      value.keys.push_back(parse_string());
      skip_space();
      if (!accept(':')) refuse("expected ':'");
      value.items.push_back(parse_value(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept('}')) refuse("expected ',' or '}'");
    refuse_duplicates(value.keys);
    return value;
  }

  void refuse_duplicates(const std::vector<std::string>& keys) const {
    std::vector<std::string_view> sorted(keys.begin(), keys.end());
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) fail(what_, ": key ", quote(*twice), " appears twice in one object");
  }

  Json parse_number() {
    const size_t begin = at_;
    accept('-');
    if (!digit()) refuse("expected a value");
    if (!accept('0')) skip_digits();
    bool integer = true;
    if (accept('.')) {
      integer = false;
      skip_digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      integer = false;
      at_++;
      if (!accept('+')) accept('-');
      skip_digits();
    }
    return make_number(text_.substr(begin, at_ - begin), integer);
  }

  void skip_digits() {
    if (!digit()) refuse("expected a digit");
    while (digit()) at_++;
  }

  Json make_number(std::string_view digits, bool integer) const {
    Json value;
    value.kind = Json::Kind::number;
    const char* end = digits.data() + digits.size();
    const auto real = std::from_chars(digits.data(), end, value.number);
    if (real.ec != std::errc() || real.ptr != end || !std::isfinite(value.number))
      refuse("a number out of range");
    if (integer) value.is_integer = std::from_chars(digits.data(), end, value.integer).ec == std::errc();
    return value;
  }

  std::string parse_string() {
    std::string value;
    at_++;
    while (true) {
      if (at_ >= text_.size()) refuse("a string without an end");
      const char c = text_[at_];
      if (static_cast<unsigned char>(c) < 0x20) refuse("a control character in a string");
      at_++;
      if (c == '"') return value;
      if (c == '\\') {
        parse_escape(value);
      } else {
        value += c;
      }
    }
  }

  void parse_escape(std::string& value) {
    static constexpr std::string_view kLetters = "\"\\/bfnrt", kMeaning = "\"\\/\b\f\n\r\t";
    const char c = peek();
    const size_t known = kLetters.find(c);
    if (c != '\0' && known != std::string_view::npos) {
      at_++;
      value += kMeaning[known];
      return;
    }
    if (!accept('u')) refuse("an unknown escape");
    append_utf8(value, parse_code_point());
  }

  uint32_t parse_code_point() {
    const uint32_t high = parse_hex4();
    if (high >= 0xdc00 && high < 0xe000) refuse("half of a surrogate pair");
    if (high < 0xd800 || high >= 0xdc00) return high;
    if (!accept('\\') || !accept('u')) refuse("half of a surrogate pair");
    const uint32_t low = parse_hex4();
    if (low < 0xdc00 || low >= 0xe000) refuse("half of a surrogate pair");
    return 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
  }

  uint32_t parse_hex4() {
    uint32_t value = 0;
    if (text_.size() - at_ < 4) refuse("expected four hexadecimal digits");
    const char* begin = text_.data() + at_;
    const auto result = std::from_chars(begin, begin + 4, value, 16);
    if (result.ec != std::errc() || result.ptr != begin + 4) refuse("expected four hexadecimal digits");
    at_ += 4;
    return value;
  }

  static void append_utf8(std::string& out, uint32_t code) {
    const auto put = [&out](uint32_t byte) { out += static_cast<char>(byte); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
      put(0xc0 | code >> 6);
    } else if (code < 0x10000) {
      put(0xe0 | code >> 12);
      put(0x80 | (code >> 6 & 0x3f));
    } else {
      put(0xf0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3f));
      put(0x80 | (code >> 6 & 0x3f));
    }
    put(0x80 | (code & 0x3f));
  }

  std::string_view text_;
  const std::string& what_;
  size_t at_ = 0;
  size_t nodes_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  for (size_t i = 0; i < keys.size(); i++)
    if (keys[i] == key) return &items[i];
  return nullptr;
}

const char* Json::kind_name() const {
  static const char* const kNames[] = {"null", "a boolean", "a number", "a string", "an array", "an object"};
  return kNames[static_cast<int>(kind)];
}

Json parse_json(std::string_view text, const std::string& what) { return Parser(text, what).document(); }

}  // namespace gristmill
