"""The `gristmill` command. Results go to stdout (as JSON with --json), everything else to stderr.

Exit codes: 0 done, 1 an error that one line on stderr explains, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gristmill import __version__
from gristmill.cli_compile import compile_command
from gristmill.cli_export import export_command
from gristmill.cli_options import (
    ARTIFACT,
    DEVICE,
    HUGEPAGES,
    JSON,
    MAX_LEN,
    PIN,
    TENSOR_PARALLEL,
    THREADS,
)
from gristmill.cli_output import Rows, echo_json, note, show_profile, show_table
from gristmill.cli_plan import plan_command
from gristmill.cli_report import report_command
from gristmill.cli_run import run_command as run
from gristmill.cli_serve import serve_command
from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

TRACEBACK_VARIABLE = "GRISTMILL_TRACEBACK"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gristmill")
@click.option(
    "--traceback", is_flag=True, help=f"Show where an error came from (or set {TRACEBACK_VARIABLE}=1)."
)
def cli(traceback: bool) -> None:
    """Compile decoder language models to small artifacts, and run them.

    \b
    gristmill compile examples/py7m -o py7m.grist
    gristmill run py7m.grist --prompt "def main():"
    gristmill bench py7m.grist
    gristmill report examples/py7m -o report
    """
    if traceback:
        os.environ[TRACEBACK_VARIABLE] = "1"


cli.add_command(compile_command)
cli.add_command(export_command)
cli.add_command(report_command)
cli.add_command(plan_command)
cli.add_command(run)
cli.add_command(serve_command)


@cli.command(no_args_is_help=True)
@ARTIFACT
@click.option("--program", is_flag=True, help="Print the program, one line per instruction.")
@click.option("--matrices", is_flag=True, help="Print every weight matrix: format, method, error, time.")
@click.option("--check-machine", is_flag=True, help="Say what this machine lacks to run it; exit code 1.")
@click.option("--device", default="cpu", show_default=True, help="With --check-machine: cpu or cuda.")
@JSON
def inspect(
    artifact: str, program: bool, matrices: bool, check_machine: bool, device: str, as_json: bool
) -> int:
    """Show what an artifact is: model, formats, sizes, memory, measured accuracy.

    \b
    gristmill inspect py7m.grist
    gristmill inspect py7m.grist --program
    gristmill inspect py7m.grist --matrices
    gristmill inspect py7m.grist --check-machine --device cuda
    """
    from gristmill.runtime.report import (
        artifact_rows,
        artifact_summary,
        evaluation_rows,
        listing,
        matrix_lines,
        quantization_rows,
        read_program,
    )

    opened, listed = read_program(artifact)
    if check_machine:
        return _show_machine(opened, listed, device, as_json)
    summary = artifact_summary(opened, listed)
    if as_json:
        echo_json({**summary, "program": listing(listed)} if program else summary)
    elif program:
        click.echo(listing(listed))
    elif matrices:
        click.echo("\n".join(matrix_lines(summary)))
    else:
        show_table(artifact_rows(summary), stderr=False)
        rows = quantization_rows(summary)
        if rows:
            click.echo()
            show_table(rows, stderr=False)
        if summary["evaluation"] is not None:
            click.echo()
            show_table(evaluation_rows(summary["evaluation"]), stderr=False)
    return 0


def _show_machine(artifact: Any, program: Any, device: str, as_json: bool) -> int:
    """The exit code."""
    from gristmill.runtime.check_machine import check_machine, facts

    found = check_machine(artifact, program, device)
    result = facts(found)
    if as_json:
        echo_json(result)
    else:
        rows = [(r.what, f"{r.verdict}: {r.needed} needed, {r.found} here") for r in found]
        rows += [("do", r.remedy) for r in found if r.remedy]
        show_table(rows, stderr=False)
    return 0 if result["ok"] else 1


@cli.command(no_args_is_help=True)
@ARTIFACT
@click.option("--selftest", is_flag=True, help="Also compute the stored self-test and compare.")
@DEVICE
@THREADS
@JSON
def verify(artifact: str, selftest: bool, device: str, threads: int | None, as_json: bool) -> None:
    """Check every byte of an artifact against its manifest.

    \b
    gristmill verify py7m.grist --selftest
    """
    from gristmill.runtime.artifact import open_artifact
    from gristmill.runtime.selftest import check
    from gristmill.runtime.session import load

    opened = open_artifact(artifact)
    opened.verify()
    session = load(
        artifact, device, threads=threads, max_slots=1
    )  # the executor holds program and weights against each other
    result: dict[str, Any] = {"ok": True, "content_id": opened.content_id, "files": len(opened.files)}
    if selftest:
        result["selftest"] = check(session, device)
    if as_json:
        echo_json(result)
        return
    click.echo(
        f"{artifact}: {len(opened.files)} files agree with the manifest, content {opened.content_id[:16]}"
    )
    if selftest:
        found = result["selftest"]
        click.echo(
            f"self-test: {found['tokens']} tokens, logits differ by {found['largest_difference']:.2g} at most"
        )


@cli.command("eval", no_args_is_help=True)
@ARTIFACT
@click.option("--text", type=click.Path(), help="File of text whose perplexity to measure.")
@click.option(
    "--window", type=int, help="Tokens per window, each predicted from its own beginning; default: max_len."
)
@click.option("--max-tokens", type=int, help="Score only the first N tokens of the file.")
@click.option(
    "--last-word",
    type=click.Path(),
    help='File of lines {"text": ...}: how often the last word is predicted from what is before it.',
)
@MAX_LEN
@DEVICE
@THREADS
@TENSOR_PARALLEL
@JSON
def eval_command(
    artifact: str, text: str | None, window: int | None, max_tokens: int | None, last_word: str | None,
    max_len: int | None, device: str, threads: int | None, tensor_parallel: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure perplexity on a text, or how often the last word of a passage is predicted.

    \b
    gristmill eval py7m.grist --text held_out.txt
    gristmill eval story.grist --last-word lambada.jsonl
    """
    from gristmill.runtime.evaluation import read_text, score_text
    from gristmill.runtime.session import load

    if (text is None) == (last_word is None):
        raise click.UsageError("give either --text or --last-word")
    how: dict[str, Any] = {"threads": threads, "max_len": max_len, "tensor_parallel": tensor_parallel}
    if last_word is not None:
        if window is not None or max_tokens is not None:
            raise click.UsageError("--window and --max-tokens are for --text")
        _show_last_words(load(artifact, device, **how), last_word, as_json)
        return
    assert text is not None
    session = load(artifact, device, max_slots=1, **how)
    score = score_text(session, read_text(text), window, max_tokens)
    if as_json:
        echo_json({"nll": score.nll, "ppl": score.ppl, "tokens": score.tokens, "window": score.window})
    else:
        click.echo(f"nll {score.nll:.5f}  ppl {score.ppl:.4f}  tokens {score.tokens}  window {score.window}")


def _show_last_words(session: Session, path: str, as_json: bool) -> None:
    from gristmill.runtime.last_word import score_last_words

    score = score_last_words(session, path)
    if as_json:
        echo_json(asdict(score))
    else:
        click.echo(
            f"accuracy {score.accuracy:.2%} (95 %: {score.low:.2%} to {score.high:.2%})  "
            f"hits {score.hits} of {score.passages}  tokens {score.tokens}  {score.tok_s:.0f} tok/s"
        )


@cli.command(no_args_is_help=True)
@ARTIFACT
@click.option("--prompt", type=int, default=256, show_default=True, help="Tokens of the timed prefill.")
@click.option("--tokens", type=int, default=64, show_default=True, help="Tokens decoded in each round.")
@click.option(
    "--context", type=int, default=0, show_default=True, help="Tokens that stand before the decoded ones."
)
@click.option(
    "--rounds", type=int, default=3, show_default=True, help="Rounds of bandwidth probe, prefill and decode."
)
@click.option("--profile", is_flag=True, help="Also time every kind of instruction, beside its roof.")
@DEVICE
@THREADS
@TENSOR_PARALLEL
@HUGEPAGES
@PIN
@JSON
def bench(artifact: str, as_json: bool, **options: Any) -> None:
    """Measure speed, beside what this machine's memory can deliver.

    \b
    gristmill bench py7m.grist --threads 2 --context 1024 --profile
    """
    from gristmill.runtime.bench import BenchOptions
    from gristmill.runtime.bench import bench as measure

    result = measure(artifact, BenchOptions(**options))
    if as_json:
        echo_json(result)
        return
    rows: Rows = [
        ("decode", f"{result['decode_tok_s']:.1f} tok/s after {result['context']} tokens"),
        ("prefill", f"{result['prefill_tok_s']:.1f} tok/s of {result['prompt']} tokens"),
        ("read", f"{result['read_gb_s']:.2f} GB/s of weights and cache"),
        ("memory delivers", f"{result['stream_gb_s']:.2f} GB/s; share {result['bandwidth_share']:.1%}"),
        ("load", f"{result['load_s'] * 1000:.1f} ms"),
        ("threads", str(result["threads"])) if result["device"] == "cpu" else ("device", result["device"]),
    ]
    if result["tensor_parallel"] > 1:
        rows.append(("processes", f"{result['tensor_parallel']}, which share the threads"))
        rows.append(("communication", _exchanged(result["communication_s"], result["decode_tok_s"])))
    show_table(rows, stderr=False)
    if options["profile"]:
        show_profile(result["profile"], "decode")
        show_profile(result["profile"], "prefill")


def _exchanged(seconds: float, tok_s: float) -> str:
    return f"{seconds * 1e3:.2f} ms of a token, {seconds * tok_s:.1%}; see --profile"


@cli.command(no_args_is_help=True)
@ARTIFACT
@click.option("--max-rows", type=int, help="The largest batch to tune for; default: any.")
@click.option("--device", type=click.Choice(["cuda"]), default="cuda", help="What to tune; cuda alone.")
@JSON
def tune(artifact: str, max_rows: int | None, device: str, as_json: bool) -> None:
    """Time the ways to cut an artifact's products on this GPU, and keep the fastest.

    They are kept in the user's cache directory (XDG_CACHE_HOME) for this kind of GPU, and used from then on.
    A run that is interrupted goes on where it was.

    \b
    gristmill tune llama.grist --max-rows 64
    """
    from gristmill.runtime.session import load

    if max_rows is not None and max_rows < 1:
        raise GristmillError(f"max_rows is {max_rows}, expected 1 or more")
    session = load(artifact, device, max_slots=1)
    found = {}
    for product, config in session.tune(max_rows):
        found[product] = config
        note(f"{product}: {config}")
    if as_json:
        echo_json({"products": found})
    else:
        click.echo(f"{len(found)} products tuned")


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script: runs the command and turns every outcome into an exit code."""
    sys.exit(run_command(arguments))


def run_command(arguments: list[str] | None = None) -> int:
    """The exit code of `gristmill ARGUMENTS`; errors are one line on stderr."""
    warnings.showwarning = _show_warning
    try:
        result = cli.main(arguments, prog_name="gristmill", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        note("interrupted")
        return 130
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except Exception as error:  # the last resort: a person sees one line, and how to see more
        return _report(error)


def _report(error: Exception) -> int:
    if os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0"):
        traceback.print_exception(error)
        return 1
    if isinstance(error, GristmillError):
        text = str(error)
    elif isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        text = f"{name}{error.strerror or error}"
    elif isinstance(error, MemoryError):
        text = "not enough memory; load with a smaller max_len or max_slots"
    else:
        text = f"{type(error).__name__}: {error} (a defect of gristmill; --traceback shows where)"
    click.echo("error: " + " ".join(text.split()), err=True)
    return 1


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """One line, without the place in the code that it comes from."""
    note(f"warning: {message}")


def _forget_stdout() -> None:
    """The reader of stdout is gone: what is still buffered goes nowhere, and exit must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
