"""What a device does and Triton's interpreter does not."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def fetch_lines(addresses):
    """Has the L2 cache fetch the lines at these addresses, i64; nobody waits for them."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l", [addresses], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
