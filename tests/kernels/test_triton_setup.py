"""The two ways in which Triton kernels are tested here do what they say."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from compile_sm90 import compile_launches
from triton_device import INTERPRETED, ahead_of_time
from triton_example import shares


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a device")
def test_the_interpreter_runs_kernels_on_the_cpu() -> None:
    x, out = torch.rand(5, 48), torch.full((5, 48), torch.nan)
    shares(x, out)
    torch.testing.assert_close(out, x / x.sum(1, keepdim=True), rtol=1e-6, atol=0.0)


@ahead_of_time
def test_launches_compile_for_sm_90_as_they_would_run() -> None:
    small, again, spilling = compile_launches("triton_example")
    assert (small.launch, again.launch, spilling.launch) == ("small", "again", "spilling")
    assert small.kernel == "shares_kernel" and small.grid == (5,) and small.warps == 1
    assert ".target sm_90" in small.ptx and 0 < small.registers < 64
    assert (again.registers, again.ptx) == (small.registers, small.ptx)
    assert small.fits()
    assert spilling.spill_bytes > 0 and not spilling.fits()
