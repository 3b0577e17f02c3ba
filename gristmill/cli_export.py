"""`gristmill export`: an artifact as a quantized Hugging Face directory, or as a GGUF file."""

from __future__ import annotations

from typing import Any

import click

from gristmill.cli_output import echo_json, note, progress_bar

TARGETS = ("gptq", "awq", "compressed-tensors", "gguf")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_1", "q4_0")
OWN_OPTIONS = {"checkpoint_format": "gptq", "type": "gguf"}  # option → the only target that has it


@click.command("export", no_args_is_help=True)
@click.argument("artifact", type=click.Path())
@click.option("--to", required=True, type=click.Choice(TARGETS), help="The format to write.")
@click.option("-o", "--out", required=True, type=click.Path(), help="Directory (gguf: file) to write.")
@click.option(
    "--checkpoint-format",
    type=click.Choice(["gptq", "gptq_v2"]),
    help="Version of gptq.  [default: gptq, which stores zero points minus one, unless one is 0]",
)
@click.option(
    "--type", type=click.Choice(GGUF_TYPES),
    help="Type of the linears in a GGUF.  [default: the smallest that holds each exactly]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an export that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def export_command(artifact: str, out: str, to: str, as_json: bool, **options: Any) -> None:
    """Write ARTIFACT for other programs: as a Hugging Face directory that transformers or vLLM load, rounding
    nothing again, or as a GGUF file for llama.cpp.

    \b
    gristmill export model.grist --to gptq -o model-gptq
    gristmill export model.grist --to compressed-tensors -o model-w4a16
    gristmill export model.grist --to gguf -o model.gguf
    gristmill export model.grist --to gguf --type q4_0 -o model-q4_0.gguf
    """
    import gristmill

    for name, target in OWN_OPTIONS.items():
        if to != target and options.pop(name) is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} is for --to {target}, got --to {to}")
    notes: list[str] = []
    if to == "gguf":
        options["note"] = notes.append
    with progress_bar() as progress:
        path = gristmill.export_checkpoint(artifact, out, to, progress=progress, **options)
    if as_json:
        echo_json({"path": str(path), "format": to, **({"notes": notes} if notes else {})})
        return
    for line in notes:
        note(line)
    note(f"{path} holds {artifact} as {to}")
