#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "error.h"
#include "fork.h"

namespace gristmill {
namespace {

constexpr uint64_t kMostHeader = uint64_t{32} << 20;
constexpr uint64_t kAlignment = 64;  // of tensor data, and the bytes that must follow it

struct Descriptor {
  explicit Descriptor(int value) : value(value) {}
  ~Descriptor() {
    if (value >= 0) close(value);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int value;
};

uint64_t dtype_bits(const std::string& dtype) {
  static const std::map<std::string, uint64_t> kBits = {
      {"F64", 64}, {"F32", 32}, {"F16", 16}, {"BF16", 16},   {"I64", 64},
      {"I32", 32}, {"I16", 16}, {"I8", 8},   {"U8", 8},      {"BOOL", 8},
      {"U16", 16}, {"U32", 32}, {"U64", 64}, {"F8_E4M3", 8}, {"F8_E5M2", 8}};
  const auto found = kBits.find(dtype);
  return found == kBits.end() ? 0 : found->second;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size() && i < 8; i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

bool natural(const Json& value) { return value.is_integer && value.integer >= 0; }

// device, inode, size, mtime, whether it is a copy in huge pages
using Key = std::tuple<uint64_t, uint64_t, int64_t, int64_t, int64_t, bool>;

std::map<Key, std::weak_ptr<const Weights>>& open_files() {
  static auto* const files = new std::map<Key, std::weak_ptr<const Weights>>;
  return *files;
}

std::shared_ptr<const Weights> find_open(const Key& key) {
  const std::lock_guard<std::mutex> lock(fork_mutex());
  auto& files = open_files();
  for (auto file = files.begin(); file != files.end();)
    file = file->second.expired() ? files.erase(file) : std::next(file);
  const auto found = files.find(key);
  return found == files.end() ? nullptr : found->second.lock();
}

}  // namespace

std::shared_ptr<const Weights> Weights::open(const std::string& path, bool huge_pages) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.value < 0) fail(quote(path), ": cannot be opened: ", std::strerror(errno));
  struct stat status{};
  if (fstat(file.value, &status) != 0) fail(quote(path), ": ", std::strerror(errno));
  if (!S_ISREG(status.st_mode)) fail(quote(path), ": not a regular file");
  const Key key{status.st_dev,          status.st_ino,           status.st_size,
                status.st_mtim.tv_sec, status.st_mtim.tv_nsec, huge_pages};
  if (auto shared = find_open(key)) return shared;
  const auto bytes = static_cast<uint64_t>(status.st_size);
  auto weights = std::make_shared<const Weights>(file.value, bytes, path, huge_pages);
  const std::lock_guard<std::mutex> lock(fork_mutex());
  open_files()[key] = weights;
  return weights;
}

Weights::Weights(int descriptor, uint64_t bytes, const std::string& path, bool huge_pages)
    : path_(quote(path)), bytes_(bytes) {
  if (bytes < 16) fail(path_, ": ", bytes, " bytes are too few for a safetensors file");
  if (huge_pages) copy(descriptor);
  else map(descriptor);
  try {
    read_header();
  } catch (...) {
    unmap();
    throw;
  }
}

Weights::~Weights() { unmap(); }

void Weights::unmap() {
  if (!copy_.data()) munmap(data_, bytes_);
}

void Weights::copy(int descriptor) {
  constexpr uint64_t kPiece = uint64_t{64} << 20;
  copy_ = Region(bytes_, "the copy of the weights", true);
  data_ = copy_.data();
  for (uint64_t at = 0; at < bytes_;) {
    const size_t wanted = static_cast<size_t>(std::min(kPiece, bytes_ - at));
    const ssize_t got = pread(descriptor, data_ + at, wanted, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path_, ": cannot be read: ", std::strerror(errno));
    if (got == 0) fail(path_, ": ended at byte ", at, " of ", bytes_, " while it was read");
    at += static_cast<uint64_t>(got);
  }
}

void Weights::map(int descriptor) {
  void* at = mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, descriptor, 0);
  if (at == MAP_FAILED) fail(path_, ": cannot be mapped: ", std::strerror(errno));
  data_ = static_cast<char*>(at);
}

void Weights::read_header() {
  uint64_t length = 0;
  for (int i = 7; i >= 0; i--) length = length << 8 | static_cast<unsigned char>(data_[i]);
  if (length > kMostHeader || length > bytes_ - 8)
    fail(path_, ": the header says ", length, " bytes, the file has ", bytes_, " and at most ", kMostHeader,
         " are read");
  const Json header = parse_json({data_ + 8, length}, path_ + " header");
  if (header.kind != Json::Kind::object)
    fail(path_, ": the header is ", header.kind_name(), ", expected an object");
  for (size_t i = 0; i < header.keys.size(); i++)
    if (header.keys[i] != "__metadata__") read_tensor(header.keys[i], header.items[i], 8 + length);
  refuse_holes(8 + length);
}

void Weights::read_tensor(const std::string& name, const Json& entry, uint64_t data_begin) {
  const Json* dtype = entry.find("dtype");
  const Json* shape = entry.find("shape");
  const Json* offsets = entry.find("data_offsets");
  const auto refuse = [&](const char* why) { fail(path_, ": tensor ", quote(name), ": ", why); };
  if (!dtype || !shape || !offsets || entry.keys.size() != 3)
    refuse("expected exactly dtype, shape and data_offsets");
  if (dtype->kind != Json::Kind::string || shape->kind != Json::Kind::array) refuse("malformed entry");
  if (offsets->kind != Json::Kind::array || offsets->items.size() != 2) refuse("malformed entry");
  Tensor tensor;
  tensor.dtype = dtype->string;
  __extension__ unsigned __int128 bits = dtype_bits(dtype->string);
  if (bits == 0) refuse("unknown dtype");
  if (shape->items.size() > 8) refuse("more than 8 dimensions");
  for (const Json& size : shape->items) {
    if (!natural(size)) refuse("a dimension is not a natural number");
    tensor.shape.push_back(size.integer);
    bits *= static_cast<uint64_t>(size.integer);
    if (bits >> 64) refuse("larger than any file");
  }
  if (!natural(offsets->items[0]) || !natural(offsets->items[1]))
    refuse("data_offsets are not natural numbers");
  const auto begin = static_cast<uint64_t>(offsets->items[0].integer),
             end = static_cast<uint64_t>(offsets->items[1].integer);
  if (begin > end || end > bytes_ - data_begin) refuse("its data lies outside the file (a truncated file?)");
  if (end - begin != static_cast<uint64_t>(bits / 8)) refuse("data_offsets disagree with dtype and shape");
  tensor.data = data_ + data_begin + begin;
  tensor.bytes = end - begin;
  tensors_.emplace(name, std::move(tensor));
}

void Weights::refuse_holes(uint64_t data_begin) const {
  std::vector<std::pair<const char*, uint64_t>> spans;
  for (const auto& [name, tensor] : tensors_) spans.emplace_back(tensor.data, tensor.bytes);
  std::sort(spans.begin(), spans.end());
  const char* at = data_ + data_begin;
  for (const auto& [begin, bytes] : spans) {
    if (begin != at) fail(path_, ": tensors overlap or leave a hole at byte ", at - data_);
    at = begin + bytes;
  }
  if (at != data_ + bytes_) fail(path_, ": the tensors end at byte ", at - data_, ", the file at ", bytes_);
}

const Tensor* Weights::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const char* Weights::need(const std::string& name, std::string_view dtype,
                          const std::vector<int64_t>& shape) const {
  const Tensor* tensor = find(name);
  if (!tensor) fail(path_, ": tensor ", quote(name), " is missing");
  if (tensor->dtype != dtype || tensor->shape != shape)
    fail(path_, ": tensor ", quote(name), " is ", quote(tensor->dtype), " ", shape_text(tensor->shape),
         ", expected ", dtype, " ", shape_text(shape));
  const auto offset = static_cast<uint64_t>(tensor->data - data_);
  if (offset % kAlignment)
    fail(path_, ": tensor ", quote(name), " begins at byte ", offset, ", expected a multiple of ",
         kAlignment);
  if (bytes_ - offset - tensor->bytes < kAlignment)
    fail(path_, ": tensor ", quote(name), " is not followed by ", kAlignment, " bytes");
  return tensor->data;
}

}  // namespace gristmill
