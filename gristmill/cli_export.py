"""`gristmill export`: an artifact as a quantized Hugging Face directory."""

from __future__ import annotations

from typing import Any

import click

from gristmill.cli_output import echo_json, note, progress_bar

TARGETS = ("gptq", "awq", "compressed-tensors")


@click.command("export", no_args_is_help=True)
@click.argument("artifact", type=click.Path())
@click.option("--to", required=True, type=click.Choice(TARGETS), help="The format to write.")
@click.option("-o", "--out", required=True, type=click.Path(), help="The directory to write.")
@click.option(
    "--checkpoint-format",
    type=click.Choice(["gptq", "gptq_v2"]),
    help="Version of gptq.  [default: gptq, which stores zero points minus one, unless one is 0]",
)
@click.option("--force", is_flag=True, help="Replace an export that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def export_command(artifact: str, out: str, as_json: bool, **options: Any) -> None:
    """Write ARTIFACT as a Hugging Face directory that transformers or vLLM load, rounding nothing again.

    \b
    gristmill export model.grist --to gptq -o model-gptq
    gristmill export model.grist --to compressed-tensors -o model-w4a16
    """
    import gristmill

    with progress_bar() as progress:
        path = gristmill.export_checkpoint(artifact, out, progress=progress, **options)
    if as_json:
        echo_json({"path": str(path), "format": options["to"]})
    else:
        note(f"{path} holds {artifact} as {options['to']}")
