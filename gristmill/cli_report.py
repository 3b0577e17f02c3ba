"""`gristmill report`: what each choice costs and gains, on this machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gristmill.cli_options import JSON
from gristmill.cli_output import Rows, echo_json, note, show_table
from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from gristmill.report.schema import Report

FILES = ("report.html", "report.md", "report.json")


@click.command("report", no_args_is_help=True)
@click.argument("subjects", nargs=-1, metavar="MODEL|ARTIFACT...")
@click.option(
    "-o", "--out", required=True, type=click.Path(), help="The directory of report, artifacts and work."
)
@click.option("--weights", help="Formats to compile, such as f16,int8,int4,int3.  [default: see below]")
@click.option("--methods", help="How integers are chosen, such as rtn,gptq,awq+gptq.")
@click.option("--kv", help="Types of the cache, such as f16,int8; keys and values apart as int8/int4.")
@click.option("--devices", default="cpu", show_default=True, help="Where to measure: cpu, cuda or cpu,cuda.")
@click.option("--text", type=click.Path(), help="File of held text for accuracy.  [default: built in]")
@click.option("--tokens", type=int, default=2048, show_default=True, help="Tokens of it to measure.")
@click.option("--last-word", type=click.Path(), help='File of lines {"text": ...}: last-word accuracy.')
@click.option(
    "--reference", type=click.Path(),
    help="With artifacts: the one that others are compared with.  [default: the nearest to float]",
)  # fmt: skip
@click.option(
    "--peer", "peers", multiple=True, metavar="KIND:PATH",
    help="Another engine with the same model: llama.cpp:FILE.gguf, onnxruntime-genai:DIR, openvino:DIR, "
    "ctranslate2:DIR; may be given several times.",
)  # fmt: skip
@click.option(
    "--peer-python", "pythons", multiple=True, metavar="KIND=PYTHON", help="A Python that has that engine."
)
@click.option("--threads", type=int, help="Threads, of peers as well.  [default: one for each physical core]")
@click.option(
    "--tensor-parallel", type=int,
    help="Processes that share a model where speed and why are measured; CPU alone.  [default: 1]",
)  # fmt: skip
@click.option("--samples", type=int, default=64, show_default=True, help="Calibration samples.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Rounds of speed over all points.")
@click.option(
    "--ray", is_flag=False, flag_value="local", metavar="[ADDRESS]",
    help="Compile side by side as Ray tasks: on this machine, or at `auto` or HOST:PORT; --threads each.",
)  # fmt: skip
@click.option("--fresh", is_flag=True, help="Measure accuracy anew as well; artifacts are kept.")
@JSON
def report_command(
    subjects: tuple[str, ...], out: str, as_json: bool, weights: str | None, methods: str | None,
    kv: str | None, devices: str, peers: tuple[str, ...], pythons: tuple[str, ...], threads: int | None,
    **given: Any,
) -> None:  # fmt: skip
    """Measure accuracy, speed and why, and write report.html, report.md and report.json.

    MODEL (a Hugging Face directory or hub name) is compiled in every configuration that is missing; artifacts
    that are there may be given instead. Without --weights, --methods and --kv seven configurations are: f16,
    int8, int4 rounded, int4 and int3 by GPTQ, and f16 and int4 by GPTQ with an int8 cache; with any of them,
    all combinations (default weights f16,int8,int4,int3, methods rtn,gptq, kv f16).

    What is done is kept in the directory: run again, it goes on where it was killed, and compiles nothing
    that has not changed. Speed is measured by every run, one point after the other, --ray or not.

    \b
    gristmill report examples/py7m -o reports/py7m
    gristmill report model/ --weights f16,int4 --methods rtn,awq+gptq --kv f16,int8 --text held_out.txt -o r
    gristmill report f16.grist int4.grist -o r
    gristmill report model/ --ray=auto -o /shared/r
    gristmill report model/ --peer llama.cpp:q4_0.gguf --peer-python llama.cpp=peer/bin/python -o r
    """
    from gristmill.report.configurations import split
    from gristmill.report.page import write_report
    from gristmill.report.peer_measures import parse_peers
    from gristmill.report.plots import require_matplotlib
    from gristmill.report.subjects import default_threads
    from gristmill.report.sweep import RAY_GRACE_S, SWEEP_GRACE_S, run_sweep
    from gristmill.report.sweep_options import SweepOptions
    from gristmill.report.watch import watching
    from gristmill.runtime.ending import ended_by_signals

    require_matplotlib()
    for name in ("text", "last_word", "reference"):
        given[name] = Path(given[name]) if given[name] is not None else None
    options = SweepOptions.of(
        subjects, out, weights=split(weights), methods=split(methods), kv=split(kv), devices=split(devices),
        peers=parse_peers(peers, pythons, threads or default_threads()), threads=threads,
        command=_typed(), **given,
    )  # fmt: skip
    grace_s = SWEEP_GRACE_S if options.ray is None else RAY_GRACE_S
    try:
        with ended_by_signals(grace_s), watching(note) as watcher:
            report = run_sweep(options, watcher)
    except KeyboardInterrupt:
        note("what was measured is kept; the same command goes on from there")
        raise
    write_report(report, options.out)
    _show(report, options.out, as_json)
    if all(point.status == "failed" for point in report.points):
        raise GristmillError(f"no point could be measured; the first: {report.points[0].reason}")


def _typed() -> str:
    return shlex.join(["gristmill", *sys.argv[1:]])


def _show(report: Report, out: Path, as_json: bool) -> None:
    failed = [point for point in report.points if point.status == "failed"]
    if as_json:
        points = {
            p.id: {"status": p.status, "reason": p.reason, "artifact": p.artifact} for p in report.points
        }
        echo_json({"files": [str(out / name) for name in FILES], "seconds": report.seconds, "points": points})
        return
    rows: Rows = [(point.label, _figures(report, point)) for point in report.points]
    show_table(rows, stderr=False)
    for point in failed:
        note(f"{point.label} failed: {point.reason}")
    click.echo(f"{out / FILES[0]}")


def _figures(report: Report, point: Any) -> str:
    """One line for a point."""
    from gristmill.report.choose import decode_speed
    from gristmill.runtime.report import size_text

    if point.status == "failed":
        return "failed"
    speed = decode_speed(report, point)
    parts = [f"{speed:.4g} tok/s"] if speed else []
    parts += [size_text(point.memory.artifact_bytes)] if point.memory else []
    if point.accuracy:
        increase = point.accuracy.ppl_increase
        parts.append(
            f"perplexity {increase.estimate:+.2%} ({increase.low:+.2%} to {increase.high:+.2%}), "
            f"KL {point.accuracy.kl.estimate:.3g}"
        )
    return ", ".join(parts)
