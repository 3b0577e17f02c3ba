// weights.safetensors as one read-only mapping or copy, shared by all who open the same file.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "json.h"
#include "region.h"

namespace gristmill {

struct Tensor {
  std::string dtype;
  std::vector<int64_t> shape;
  const char* data = nullptr;
  uint64_t bytes = 0;
};

class Weights {
 public:
  // Maps the file, or hands out the mapping that someone in this process already has of it. huge_pages: a
  // copy in memory instead, since a file's pages are small. Throws Error.
  static std::shared_ptr<const Weights> open(const std::string& path, bool huge_pages = false);

  Weights(int descriptor, uint64_t bytes, const std::string& path, bool huge_pages);  // use open()
  ~Weights();
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  // The tensor's data, after its dtype and shape were found to be the given ones, 64-byte aligned and
  // followed by 64 mapped bytes.
  const char* need(const std::string& name, std::string_view dtype, const std::vector<int64_t>& shape) const;
  const Tensor* find(const std::string& name) const;
  uint64_t bytes() const { return bytes_; }

 private:
  void map(int descriptor);
  void copy(int descriptor);
  void unmap();
  void read_header();
  void read_tensor(const std::string& name, const Json& entry, uint64_t data_begin);
  void refuse_holes(uint64_t data_begin) const;

  std::string path_;
  Region copy_;  // empty: data_ is a mapping of the file
  char* data_ = nullptr;
  uint64_t bytes_ = 0;
  std::unordered_map<std::string, Tensor> tensors_;
};

}  // namespace gristmill
