"""One stem per op: declaration, reference, CPU and Triton kernels."""
