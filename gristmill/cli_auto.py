"""`gristmill compile --auto`: a sweep decides what becomes the artifact, and why is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gristmill.cli_output import echo_json, note
from gristmill.runtime.errors import GristmillError

TAKEN = (  # options of compile that say something here
    "model", "out", "auto", "max_ppl_increase", "min_tok_s", "max_size", "sweep", "text", "gate_tokens",
    "device", "samples", "force", "as_json",
)  # fmt: skip


def compile_auto(
    model: str, out: str, as_json: bool, min_tok_s: float | None, max_size: str | None, sweep: str | None,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Runs the sweep, writes the artifact and says why it is this one."""
    _refuse_others()
    from gristmill.compiler.options import parse_percent
    from gristmill.quant.request import parse_size
    from gristmill.report.auto import compile_auto as choose
    from gristmill.report.recommend import Promise
    from gristmill.report.sweep import SWEEP_GRACE_S
    from gristmill.report.watch import watching
    from gristmill.runtime.ending import ended_by_signals

    if min_tok_s is not None and min_tok_s <= 0:
        raise GristmillError(f"min_tok_s is {min_tok_s}, expected a speed above 0")
    size = None if max_size is None else parse_size(max_size)
    promise = Promise(parse_percent(options["max_ppl_increase"]), min_tok_s, size)
    folder = Path(sweep) if sweep else Path(out).parent / f"{Path(out).name}.report"
    given = {"text": Path(options["text"])} if options["text"] else {}
    if options["gate_tokens"] is not None:
        given["tokens"] = options["gate_tokens"]
    try:
        with ended_by_signals(SWEEP_GRACE_S), watching(note) as watcher:
            chosen = choose(
                model, out, promise, folder, force=options["force"], watcher=watcher,
                devices=(options["device"],), samples=options["samples"], **given,
            )  # fmt: skip
    except KeyboardInterrupt:
        note("what was measured is kept; the same command goes on from there")
        raise
    if as_json:
        echo_json({"path": str(chosen.path), "point": chosen.point.id, "reasons": list(chosen.reasons)})
        return
    click.echo("\n".join(chosen.reasons))
    note(f"{chosen.path}; the sweep's measurements and artifacts are in {folder}")


def _refuse_others() -> None:
    """Raises UsageError for options of one configuration, and where nothing is promised."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if given and name not in TAKEN:
            raise click.UsageError(
                f"{parameter.opts[0]} does not go with --auto, which chooses the configuration"
            )
    if context.params["max_ppl_increase"] is None:
        raise click.UsageError("--auto needs --max-ppl-increase, such as 1%: what may be lost")
