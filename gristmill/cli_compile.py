"""`gristmill compile`: the options, and the summary at the end."""

from __future__ import annotations

from typing import Any

import click

from gristmill.cli_auto import compile_auto
from gristmill.cli_output import Rows, echo_json, note, progress_bar, show_table
from gristmill.compiler.options import METHOD_NAMES
from gristmill.quant.scheme import FORMATS

WEIGHTS = tuple(FORMATS)
KV_TYPES = ("f32", "f16", "int8", "fp8", "int4")


@click.command("compile", no_args_is_help=True)
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(), help="The artifact directory to write.")
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    help="Format of the linear layers.  [default: int4; as they are where the model is quantized already]",
)
@click.option(
    "--group-size", type=click.Choice(["32", "64", "128", "row"]),
    help="Columns that share a scale.  [default: 128; row with fp8]",
)  # fmt: skip
@click.option("--asymmetric", is_flag=True, help="A zero point per group: more exact, a little larger.")
@click.option(
    "--embedding",
    type=click.Choice(WEIGHTS),
    help="Format of the embedding.  [default: int8, or as float weights]",
)
@click.option(
    "--head",
    type=click.Choice(WEIGHTS),
    help="Format of the output layer.  [default: int8, or as float weights]",
)
@click.option(
    "--kv",
    type=click.Choice(KV_TYPES),
    help="Type of the KV cache.  [default: f16, f32 with f32 weights]",
)
@click.option("--kv-k", type=click.Choice(KV_TYPES), help="Type of its keys.  [default: as --kv]")
@click.option("--kv-v", type=click.Choice(KV_TYPES), help="Type of its values.  [default: as --kv]")
@click.option(
    "--kv-rotate", is_flag=True, help="Rotate queries and keys (Hadamard): for int4 keys with outliers."
)
@click.option(
    "--rotate", is_flag=True,
    help="Turn the residual stream by a Hadamard matrix: exact, and weights with outliers quantize better.",
)  # fmt: skip
@click.option("--max-len", type=int, help="Positions per sequence.  [default: the model's, 4096 at most]")
@click.option(
    "--max-slots", type=int, default=8, show_default=True, help="Sequences at once; load may change it."
)
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Rows of one forward.")
@click.option(
    "--text", type=click.Path(), help="File of held text for the accuracy gate.  [default: built in]"
)
@click.option("--gate-tokens", type=int, help="Tokens of it to measure.")
@click.option(
    "--max-ppl-increase", metavar="P%", help="Refuse the artifact if perplexity rises by more, such as 2%."
)
@click.option(
    "--max-kl", type=float, help="Refuse the artifact if the KL divergence (nats per token) is larger."
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where the gate runs the artifact.",
)  # fmt: skip
@click.option("--no-gate", is_flag=True, help="Do not measure the artifact against the float model.")
@click.option(
    "--method",
    type=click.Choice(METHOD_NAMES),
    default="rtn",
    show_default=True,
    help="How integers are chosen; all but rtn look at calibration text.",
)
@click.option(
    "--calibration", metavar="TEXT",
    help="Text file, JSONL file (text or messages) or hub data set.  [default: Python's own library]",
)  # fmt: skip
@click.option("--samples", type=int, default=64, show_default=True, help="Calibration samples.")
@click.option("--sample-length", type=int, default=512, show_default=True, help="Tokens of each.")
@click.option("--resume", is_flag=True, help="Go on with a calibration to the same place that was killed.")
@click.option(
    "--act-order/--no-act-order", default=True, help="GPTQ: the most active inputs first.  [default: on]"
)
@click.option(
    "--damping", type=float, default=0.01, show_default=True, help="GPTQ: share of H's diagonal added."
)
@click.option(
    "--asymmetric-error/--no-asymmetric-error", default=True,
    help="GPTQ: make up for the errors of earlier layers too (GPTAQ).  [default: on]",
)  # fmt: skip
@click.option(
    "--tune-epochs", type=int,
    help="Passes over the samples that tune all scales together.  [default: 2 for small models by GPTQ]",
)  # fmt: skip
@click.option("--bits", type=float, help="Average stored bits per weight; every linear gets its own width.")
@click.option("--size", metavar="SIZE", help="The same for the weights file, such as 400MB.")
@click.option(
    "--keep", multiple=True, metavar="FORMAT:PATTERN",
    help="Format of matrices by name or role: f16:head, int8:*.down_proj; may be given several times.",
)  # fmt: skip
@click.option(
    "--lora", multiple=True, type=click.Path(), metavar="DIR",
    help="PEFT adapter to merge before quantization; given several times, they add up.",
)  # fmt: skip
@click.option(
    "--activations", type=click.Choice(["int8", "f32"]), default="int8", show_default=True,
    help="What integer weights are multiplied by.",
)  # fmt: skip
@click.option("--explain", is_flag=True, help="Print what each graph pass did, and what it left and why.")
@click.option(
    "--check-passes", is_flag=True, help="Run the graph before and after each pass and compare (slow)."
)
@click.option(
    "--auto", is_flag=True,
    help="Measure a sweep of configurations and keep the fastest that keeps --max-ppl-increase.",
)  # fmt: skip
@click.option("--min-tok-s", type=float, help="With --auto: refuse slower ones (decoding one sequence).")
@click.option("--max-size", metavar="SIZE", help="With --auto: refuse larger ones, such as 400MB.")
@click.option(
    "--sweep", type=click.Path(), help="With --auto: where measurements are kept.  [default: OUT.report]"
)
@click.option(
    "--tokenizer", type=click.Path(), metavar="PATH",
    help="Of a TorchScript file: a directory or tokenizer.json; without one, add --no-gate.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an artifact that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def compile_command(
    model: str, out: str, as_json: bool, no_gate: bool, group_size: str | None, auto: bool,
    min_tok_s: float | None, max_size: str | None, sweep: str | None, **options: Any,
) -> None:  # fmt: skip
    """Compile MODEL, a Hugging Face directory, a GGUF or TorchScript file or a hub name, to an artifact.

    \b
    gristmill compile examples/py7m -o py7m.grist
    gristmill compile Qwen/Qwen3-0.6B -o qwen.grist --group-size 32 --asymmetric --kv int8
    gristmill compile model-q8_0.gguf -o model.grist
    gristmill compile decoder.pt -o decoder.grist --tokenizer tokenizer.json
    gristmill compile model/ -o model.grist --method awq+gptq --calibration corpus.txt
    gristmill compile model/ -o model.grist --method gptq --bits 3.5 --keep f16:head
    gristmill compile model/ -o model.grist --lora adapter/
    gristmill compile model/ -o model.grist --text held_out.txt --max-ppl-increase 2%
    gristmill compile model/ -o model.grist --auto --max-ppl-increase 1% --min-tok-s 30 --max-size 700MB
    """
    import gristmill
    from gristmill.runtime.ending import ended_by_signals

    if auto:
        compile_auto(model, out, as_json, min_tok_s, max_size, sweep, options)
        return
    for name, value in (("--min-tok-s", min_tok_s), ("--max-size", max_size), ("--sweep", sweep)):
        if value is not None:
            raise click.UsageError(f"{name} needs --auto")
    size = int(group_size) if group_size not in (None, "row") else group_size
    with ended_by_signals(), progress_bar() as progress:
        result = gristmill.compile(
            model, out, group_size=size, gate=not no_gate, progress=progress, note=note, **options
        )
    if as_json:
        echo_json({"path": str(result.path), **result.summary})
        return
    if options["explain"] and result.summary.get("ledger"):
        click.echo(result.summary["ledger"])
    if result.summary.get("budget"):
        click.echo(result.summary["budget"], err=True)
    show_table(summary_rows(str(result.path), result.summary), stderr=True)


def summary_rows(path: str, summary: dict[str, Any]) -> Rows:
    """The summary of a compile as a table."""
    from gristmill.runtime.report import size_text

    rows: Rows = [("artifact", path)]
    if "bits_per_weight" in summary:
        rows.append(("bits per weight", f"{summary['bits_per_weight']:.3f}"))
    if "size_bytes" in summary:
        rows.append(("size", size_text(summary["size_bytes"])))
    if "compile_s" in summary:
        rows.append(("compile", f"{summary['compile_s']:.1f} s"))
    if "peak_memory_bytes" in summary:
        rows.append(("peak memory", size_text(summary["peak_memory_bytes"])))
    if summary.get("checkpoint"):
        rows.append(("checkpoint", summary["checkpoint"]))
    for line in summary.get("gate", []):
        name, _, value = line.partition("  ")
        rows.append((name, value.strip()) if value else ("gate", line))
    return rows
