"""Number formats, packing and quantization methods."""
