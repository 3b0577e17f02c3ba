"""`gristmill export`: an artifact in the formats of other programs."""

from __future__ import annotations

from typing import Any

import click

from gristmill.cli_output import echo_json, note, progress_bar

TARGETS = ("gptq", "awq", "compressed-tensors", "gguf", "onnx", "pt2", "torchscript")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_1", "q4_0")
OWN_OPTIONS = {
    "checkpoint_format": "gptq", "type": "gguf", "plain": "onnx", "kv": "onnx", "activations": "onnx",
    "max_len": "onnx", "device": "pt2",
}  # fmt: skip  # option → the only target that has it


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
    help="gguf: type of the linears.  [default: the smallest that holds each exactly]",
)  # fmt: skip
@click.option("--plain", is_flag=True, help="onnx: standard operators alone, for any runtime; slower.")
@click.option("--kv", type=click.Choice(["f32"]), help="onnx: the KV cache, where the artifact's cannot be.")
@click.option(
    "--activations",
    type=click.Choice(["int8", "f32", "f16"]),
    help="onnx: what integer weights are multiplied by; f16: products and attention, for CUDA.  [default: as "
    "compiled]",
)
@click.option("--max-len", type=int, help="onnx: positions of a sequence.  [default: as compiled]")
@click.option("--device", help="pt2: what to compile for; cpu alone so far.  [default: cpu]")
@click.option("--force", is_flag=True, help="Replace an export that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def export_command(artifact: str, out: str, to: str, as_json: bool, **options: Any) -> None:
    """Write ARTIFACT for other programs, rounding nothing again but where a GGUF type asks for it.

    gptq, awq and compressed-tensors are Hugging Face directories that transformers or vLLM load; gguf is a
    file for llama.cpp; onnx is a directory for ONNX Runtime, ONNX Runtime GenAI and `--device onnx:cpu`;
    pt2 is a directory with an AOTInductor package (decode and prefill, compiled here for processors and a
    torch like these; needs g++ and minutes) for libtorch programs and `--device pt2:cpu`; torchscript is
    legacy: a directory for libtorch programs that still need it, and for `--device torchscript`.

    \b
    gristmill export model.grist --to gptq -o model-gptq
    gristmill export model.grist --to compressed-tensors -o model-w4a16
    gristmill export model.grist --to gguf -o model.gguf
    gristmill export model.grist --to gguf --type q4_0 -o model-q4_0.gguf
    gristmill export model.grist --to onnx -o model-onnx
    gristmill export model.grist --to pt2 -o model-pt2
    """
    import gristmill

    for name, target in OWN_OPTIONS.items():
        if to != target and options.pop(name) not in (None, False):
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
