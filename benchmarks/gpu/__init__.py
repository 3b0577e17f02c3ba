"""The parts of bench_gpu.py: what is measured, what it is held against, and what paper says of it."""
