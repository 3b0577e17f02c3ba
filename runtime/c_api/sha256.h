// SHA-256 (FIPS 180-4), for files of an artifact.
#pragma once
#include <string>
#include <string_view>

namespace gristmill {

// As 64 hexadecimal digits.
std::string sha256(std::string_view data);

}  // namespace gristmill
