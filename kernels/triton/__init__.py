"""Triton kernels: functions that launch on preallocated torch tensors of one CUDA device."""
