// The directory that a compile wrote, as runtime/artifact.py reads it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace gristmill {

struct ArtifactFiles {
  std::string program;       // program.json
  std::string weights_path;  // weights.safetensors
  std::vector<int32_t> end_ids;
};

// Everything but the weights' data is held to the manifest, whose own hash is checked first. Throws Error.
ArtifactFiles open_artifact(const std::string& directory);

}  // namespace gristmill
