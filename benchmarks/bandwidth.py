"""How fast this machine reads memory: the roof of decoding.

python benchmarks/bandwidth.py --threads 2
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from gristmill.runtime.cpu import _native


def cpu_model() -> str:
    """The processor's name, as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return os.uname().machine


def read_gb_s(threads: int, seconds: float = 1.0, megabytes: int = 512) -> float:
    """10^9 bytes per second of read-only passes over memory that no cache holds."""
    return float(_native.read_bandwidth(megabytes << 20, threads, seconds))


@click.command(help=__doc__)
@click.option("--threads", default=_native.default_threads(), show_default=True)
@click.option("--seconds", default=2.0, show_default=True)
@click.option("--megabytes", default=512, show_default=True)
def main(threads: int, seconds: float, megabytes: int) -> None:
    for count in range(1, threads + 1):
        print(f"{cpu_model()}, {count} threads: {read_gb_s(count, seconds, megabytes):.1f} GB/s")


if __name__ == "__main__":
    main()
