#include "artifact.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>

#include "error.h"
#include "json.h"
#include "sha256.h"

namespace gristmill {
namespace {

constexpr int64_t kFormat = 1;
constexpr uint64_t kMostManifestBytes = 16000000, kMostHeaderBytes = 100000000;
const char* const kKind = "gristmill artifact";
const char* const kManifest = "manifest.json";
const char* const kAgain = "; compile the model again or copy the artifact anew";

uint64_t file_bytes(const std::string& path) {
  struct stat about {};
  if (stat(path.c_str(), &about) || !S_ISREG(about.st_mode)) fail(path, " is missing", kAgain);
  return static_cast<uint64_t>(about.st_size);
}

std::string read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::string data{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  if (!stream.is_open() || stream.bad()) fail(path, " cannot be read: ", std::strerror(errno));
  return data;
}

const Json& field(const Json& object, const char* name, Json::Kind kind, const std::string& path) {
  const Json* found = object.kind == Json::Kind::object ? object.find(name) : nullptr;
  if (!found || found->kind != kind) fail(path, ": ", name, " is missing or of another type than expected", kAgain);
  return *found;
}

// sha256 of the manifest with its own hash, which stands there once, as zeros.
void check_own_hash(std::string data, const std::string& path) {
  const std::string before = "\"manifest_sha256\": \"";
  const size_t at = data.find(before);
  if (at != std::string::npos && at + before.size() + 64 < data.size() &&
      data.find(before, at + 1) == std::string::npos) {
    const std::string own = data.substr(at + before.size(), 64);
    data.replace(at + before.size(), 64, 64, '0');
    if (sha256(data) == own) return;
  }
  fail(path, " was changed after it was written", kAgain);
}

Json read_manifest(const std::string& directory) {
  struct stat about {};
  if (stat(directory.c_str(), &about)) fail(directory, " is missing; expected an artifact directory");
  if (!S_ISDIR(about.st_mode)) fail(directory, " is a file; expected an artifact directory");
  const std::string path = directory + "/" + kManifest;
  if (stat(path.c_str(), &about) || !S_ISREG(about.st_mode))
    fail(directory, " has no ", kManifest, ": not a gristmill artifact; write one with `gristmill compile`");
  if (static_cast<uint64_t>(about.st_size) > kMostManifestBytes)
    fail(path, " is larger than ", kMostManifestBytes, " bytes: not a gristmill manifest");
  const std::string data = read_file(path);
  Json manifest = parse_json(data, path);
  const Json* kind = manifest.kind == Json::Kind::object ? manifest.find("kind") : nullptr;
  if (!kind || kind->string != kKind)
    fail(path, " is not the manifest of a gristmill artifact; write one with `gristmill compile`");
  const Json& format = field(manifest, "format", Json::Kind::number, path);
  if (!format.is_integer || format.integer < 1) fail(path, ": format is no version number", kAgain);
  if (format.integer > kFormat)
    fail(path, " has format ", format.integer, ", this library reads up to ", kFormat, "; install a newer one");
  check_own_hash(data, path);
  return manifest;
}

// Whether a file lies in the directory itself.
bool is_plain(const std::string& name) {
  return !name.empty() && name.size() < 200 && name[0] != '.' && name.find('/') == std::string::npos;
}

struct Files {
  std::string directory;
  const Json& table;
  std::string manifest_path;

  bool has(const char* name) const { return table.find(name) != nullptr; }
  std::string path(const std::string& name) const { return directory + "/" + name; }

  uint64_t listed_bytes(const std::string& name, const Json& entry) const {
    const Json& size = field(entry, "size", Json::Kind::number, manifest_path + ": " + name);
    if (!size.is_integer || size.integer < 0) fail(manifest_path, ": no size for ", quote(name), kAgain);
    return static_cast<uint64_t>(size.integer);
  }

  void check(const std::string& name, const Json& entry) const {
    if (!is_plain(name)) fail(manifest_path, " names the file ", quote(name), "; only names inside it are read");
    const uint64_t size = file_bytes(path(name)), listed = listed_bytes(name, entry);
    if (size != listed) fail(path(name), " has ", size, " bytes, ", kManifest, " says ", listed, kAgain);
  }

  std::string read(const char* name) const {
    const Json* entry = table.find(name);
    if (!entry) fail(manifest_path, " lists no ", name, kAgain);
    std::string data = read_file(path(name));
    if (sha256(data) != field(*entry, "sha256", Json::Kind::string, manifest_path).string)
      fail(path(name), " was changed after it was written", kAgain);
    return data;
  }
};

// The first bytes of the weights file: the length of its header, and the header.
std::string weights_header(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::string data(8, '\0');
  if (!stream.read(data.data(), 8)) fail(path, " is too short for a header", kAgain);
  uint64_t length = 0;
  for (size_t i = 8; i-- > 0;) length = length << 8 | static_cast<unsigned char>(data[i]);
  if (length > std::min(file_bytes(path) - 8, kMostHeaderBytes)) fail(path, ": its header is longer than the file", kAgain);
  data.resize(8 + length);
  if (!stream.read(data.data() + 8, static_cast<std::streamsize>(length))) fail(path, " cannot be read", kAgain);
  return data;
}

std::vector<int32_t> end_ids(const std::string& text, const std::string& path) {
  const Json config = parse_json(text, path);
  const Json* found = config.kind == Json::Kind::object ? config.find("eos_token_id") : nullptr;
  std::vector<int32_t> ids;
  const auto add = [&](const Json& id) {
    if (id.is_integer && id.integer >= 0 && id.integer <= std::numeric_limits<int32_t>::max())
      ids.push_back(static_cast<int32_t>(id.integer));
  };
  if (!found) return ids;
  if (found->kind == Json::Kind::array) {
    for (const Json& id : found->items) add(id);
  } else {
    add(*found);
  }
  return ids;
}

}  // namespace

ArtifactFiles open_artifact(const std::string& directory) {
  const Json manifest = read_manifest(directory);
  const std::string path = directory + "/" + kManifest;
  const Files files{directory, field(manifest, "files", Json::Kind::object, path), path};
  for (size_t i = 0; i < files.table.keys.size(); i++) files.check(files.table.keys[i], files.table.items[i]);
  ArtifactFiles opened;
  opened.program = files.read("program.json");
  if (!files.has("weights.safetensors")) fail(path, " lists no weights.safetensors", kAgain);
  opened.weights_path = files.path("weights.safetensors");
  if (sha256(weights_header(opened.weights_path)) !=
      field(manifest, "weights_header_sha256", Json::Kind::string, path).string)
    fail(opened.weights_path, " has another header than ", kManifest, " says", kAgain);
  const char* const generation = "generation_config.json";
  if (files.has(generation)) opened.end_ids = end_ids(files.read(generation), files.path(generation));
  return opened;
}

}  // namespace gristmill
