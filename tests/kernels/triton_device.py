"""Where the kernels of the tests run: in Triton's interpreter on CPU tensors, or with TRITON_INTERPRET=0 on a
device. What a test hands to a kernel is made there, what it compares is brought back.
"""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

if INTERPRETED:
    import triton_interpreter  # noqa: F401  (puts it right)
