"""Measure the CUDA target on one GPU against its targets; planned for nine minutes.

A Llama-3.1-8B of random packed weights is written for every format (random_artifact.py) while the first
sections run. Sections come in the order in which they are wanted most; each prints its rows as it measures
them and appends them to the CSV at once, so that a time-out or a crash loses the rest only. Roofs are
measured in the same rounds: the share of the read stream that decoding reaches is what counts. A table last
holds everything against the targets.

    make bench-gpu                                       all of it
    make bench-gpu ARGS="--sections int4,attention"      some of it
    make bench-gpu ARGS=--dry-run                        a tiny shape on the CPU, in Triton's interpreter
    make bench-gpu ARGS="--paper --compile"              what can be said without a GPU
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from make_model import SHAPES

if TYPE_CHECKING:
    from gpu.bench import Bench
    from gpu.paper import Cost

RESULTS = Path(__file__).resolve().parent / "results"
FORMATS = ("int4", "bf16", "int8", "fp8")
SECTIONS = ("numerics", *FORMATS, "attention", "variants", "peer")
BUDGET = 520.0  # seconds, so that all is over within nine minutes


def versions(device: str) -> list[str]:
    """What the results depend on, a line each."""
    import torch
    import transformers
    import triton

    import gristmill
    from gristmill.kernels.triton.overlap import VARIABLE, options

    lines = [
        f"{date.today()}, {device}, {platform.machine()}, {os.cpu_count()} processors",
        f"gristmill {gristmill.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"triton {triton.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
    ]
    if options()["OVERLAP"]:
        lines.append(f"with {VARIABLE}=1: kernels begin before those ahead have ended")
    if torch.cuda.is_available():
        lines.append(f"driver and clocks: {_smi('driver_version,clocks.max.sm,clocks.max.mem,power.limit')}")
    return lines


def _smi(fields: str) -> str:
    """What nvidia-smi says, or that it says nothing."""
    import subprocess

    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return said.strip() or "nvidia-smi does not say"


def run_sections(bench: Bench, names: list[str]) -> list[str]:
    """Runs them while there is time; those that failed. A lost device is left for a new process."""
    from gpu.sections import SECTIONS as KNOWN

    failed = []
    for at, name in enumerate(names):
        run, least = KNOWN[name]
        if bench.left < least:
            print(f"{name}: skipped, {bench.left:.0f} s are left and it takes {least:.0f}", flush=True)
            continue
        print(f"{name}: {bench.left:.0f} s left", flush=True)
        try:
            run(bench)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            said = (str(error).splitlines() or [""])[0][:200]
            bench.results.add(name, "", "section", 0, "", f"{type(error).__name__}: {said}", passed=False)
            failed.append(name)
            if _is_lost(bench):
                _start_anew(bench, names[at + 1 :])
    return failed


def _is_lost(bench: Bench) -> bool:
    """After an illegal access nothing runs on the device in this process any more."""
    import torch

    if not bench.clock.on_gpu:
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _start_anew(bench: Bench, names: list[str]) -> None:
    """This program again, in the place of this process, with what is left to do and the same file."""
    print("the device is lost to this process; a new one goes on", flush=True)
    given = sys.argv[1:]
    if bench.writer is not None:
        bench.writer.wait()  # it is this process's child, and what it writes is needed
    more = ["--sections", ",".join(names) or "none", "--budget", f"{max(0, bench.left):.0f}"]
    more += ["--append", str(bench.results.path)]
    os.execv(sys.executable, [sys.executable, __file__, *given, *more])


def costs_of(shape: str, config: dict[str, Any], formats: list[str], compiled: bool) -> dict[str, list[Cost]]:
    """By format, the costs of one decoded row. With ``compiled``, kernels as they are compiled for sm_90."""
    from gpu import paper
    from gpu.adapter import count_on_nothing
    from gpu.bench import Sizes, options_of
    from random_artifact import RandomModel

    kernels = paper.compile_for_paper(shape, formats) if compiled else []
    model, found = RandomModel(shape, config), {}
    for name in formats:
        program = model.program(options_of(name))
        counts = count_on_nothing(program, paper.DEVICES["h200"].processors)
        found[name] = paper.costs(program, Sizes().context, counts)
        if kernels:
            paper.show(paper.loops_table(name, program, kernels))
    if kernels:
        paper.show(paper.kernels_table(kernels, paper.DEVICES["h200"]))
    return found


def print_paper(
    shape: str, config: dict[str, Any], formats: list[str], specs: list[str], compiled: bool
) -> None:
    from gpu import paper

    costs = costs_of(shape, config, formats, compiled)
    devices = [paper.DEVICES[spec] for spec in specs]
    for name, listed in costs.items():
        paper.show(paper.costs_table(name, listed, devices[-1]))
    found = [(d, paper.predict(name, listed, d)) for d in devices for name, listed in costs.items()]
    paper.show(paper.predictions_table(found))


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="llama-3.1-8b", show_default=True)
@click.option("--formats", default=",".join(FORMATS), show_default=True)
@click.option("--sections", help=f"Some of {','.join(SECTIONS)}; default all of these formats.")
@click.option("--budget", default=BUDGET, show_default=True, help="Seconds for everything.")
@click.option("--work", "folder", type=click.Path(path_type=Path), default=Path("bench/gpu"),
              show_default=True,
              help="Where artifacts are written and kept, 35 GB for all formats of 8B; quickest in memory.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True,
              help="Where the CSV goes; of a dry run beside the artifacts.")
@click.option("--append", type=click.Path(path_type=Path, exists=True), help="Go on with this CSV.")
@click.option("--dry-run", is_flag=True, help="A tiny shape on the CPU, by Triton's interpreter.")
@click.option("--paper", is_flag=True, help="Bytes, floors and predicted shares alone; needs no GPU.")
@click.option("--compile", "compiled", is_flag=True, help="With --paper: compile the kernels for sm_90.")
@click.option("--spec", "specs", multiple=True, type=click.Choice(["h100", "h200"]), default=["h100", "h200"],
              show_default=True, help="With --paper: of which device.")
def main(
    shape: str, formats: str, sections: str | None, budget: float, folder: Path, results: Path,
    append: Path | None, dry_run: bool, paper: bool, compiled: bool, specs: tuple[str, ...],
) -> None:  # fmt: skip
    begin = time.monotonic()
    wanted = formats.split(",")
    names = sections.split(",") if sections else [n for n in SECTIONS if n not in FORMATS or n in wanted]
    names = [] if names == ["none"] else names
    _refuse_unknown("--formats", wanted, FORMATS)
    _refuse_unknown("--sections", names, SECTIONS)
    if paper:
        print_paper(shape, SHAPES[shape], wanted, list(specs), compiled)
        return
    if dry_run:
        results = folder if results == RESULTS else results
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing here has done yet
    bench = prepare(shape, wanted, begin + budget, folder, results, append, dry_run)
    try:
        bench.start_writing()
        failed = run_sections(bench, names)
    finally:
        bench.close()
    bench.results.table()
    print(f"{bench.results.path}, {time.monotonic() - begin:.0f} s")
    if failed or bench.results.failed_checks:
        raise SystemExit(1)


def _refuse_unknown(option: str, given: list[str], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise click.UsageError(f"{option} has {name!r}, expected some of {','.join(known)}")


def prepare(
    shape: str, formats: list[str], deadline: float, folder: Path, results: Path, append: Path | None,
    dry_run: bool,
) -> Bench:  # fmt: skip
    import torch
    from gpu.adapter import use_interpreter
    from gpu.bench import DRY_SHAPE, TINY, Bench, Sizes
    from gpu.results import Results
    from gpu.roofs import Clock

    from gristmill.runtime.cuda.device import open_device
    from gristmill.runtime.errors import GristmillError

    if dry_run:
        use_interpreter()
        device, name = torch.device("cpu"), "dry run on a CPU"
    else:
        try:
            device = open_device()
        except GristmillError as error:
            raise click.ClickException(f"{error}, or try --dry-run or --paper") from error
        name = torch.cuda.get_device_name(device)
    path = results / f"gpu-{date.today()}-{name.replace(' ', '-').lower()}.csv"
    made = Results(append or path, versions(name), name, append is not None, judged=not dry_run)
    config = DRY_SHAPE if dry_run else SHAPES[shape]
    return Bench(
        "dry-run" if dry_run else shape, config, folder, formats, TINY if dry_run else Sizes(), made,
        Clock(device), deadline,
    )  # fmt: skip


if __name__ == "__main__":
    main()
