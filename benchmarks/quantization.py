"""What each method of quantizing costs in accuracy, measured on the artifacts themselves.

Every artifact is compiled with embedding and head in f16 and f32 activations, so that the linears' weights
are all that differs from the float model, and held to that model on unseen text by the gate: mean nll, KL
divergence with its 95 % interval over blocks of the text, and the share of rounding's loss that a method
recovers. Rows go to a CSV as they are measured; a run that was ended goes on where it stopped.

    python benchmarks/quantization.py examples/py7m --text held_out.txt --groups 64,128 --bits 4,3,2
"""

from __future__ import annotations

import csv
import itertools
import json
import tempfile
from datetime import date
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
from bandwidth import cpu_model

import gristmill

HERE = Path(__file__).parent
METHODS = ("rtn", "rtn+search", "gptq", "awq", "awq+gptq")
COLUMNS = (
    "model", "weights", "group", "symmetric", "method", "bits_per_weight", "nll_increase", "kl", "kl_low",
    "kl_high", "tokens", "compile_s",
)  # fmt: skip
Row = dict[str, Any]


def measure(model: Path, options: dict[str, Any]) -> Row:
    """One compile with its gate."""
    with tempfile.TemporaryDirectory() as folder:
        result = gristmill.compile(model, Path(folder) / "artifact", **options)
        bits = json.loads((result.path / "manifest.json").read_text())["bits_per_weight"]
    evaluation = result.summary["evaluation"]
    kl = evaluation["kl"]
    return {
        "bits_per_weight": bits, "nll_increase": evaluation["nll"] - evaluation["reference_nll"],
        "kl": kl["estimate"], "kl_low": kl["low"], "kl_high": kl["high"], "tokens": evaluation["tokens"],
        "compile_s": result.summary["compile_s"],
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """A line per setting: nll and KL of each method, and the share of rounding's KL that it takes away."""
    lines = ["model, weights | " + " | ".join(METHODS), "|".join(["---"] * (1 + len(METHODS)))]
    setting = itemgetter("model", "weights", "group", "symmetric")
    for key, group in itertools.groupby(sorted(rows, key=setting, reverse=True), setting):
        found = {row["method"]: row for row in group}
        plain = found.get("rtn")
        cells = [_cell(found.get(method), plain) for method in METHODS]
        model, weights, size, symmetric = key
        name = f"{model} {weights} g{size}{'' if symmetric in (True, 'True') else ' asymmetric'}"
        lines.append(" | ".join([name, *cells]))
    return "\n".join(lines)


def _cell(row: Row | None, plain: Row | None) -> str:
    if row is None:
        return "-"
    nll, kl = float(row["nll_increase"]), float(row["kl"])
    text = f"{nll:+.4f}, {kl:.5f}"
    if plain is not None and row is not plain:
        shares = (1 - nll / float(plain["nll_increase"]), 1 - kl / float(plain["kl"]))
        text += f" ({100 * shares[0]:.0f} %, {100 * shares[1]:.0f} %)"
    return text


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--text", required=True, type=click.Path(exists=True), help="Unseen text to measure on.")
@click.option("--calibration", type=click.Path(exists=True), help="Default: Python's own library.")
@click.option("--bits", default="4,3,2", show_default=True)
@click.option("--groups", default="64,128", show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--asymmetric", is_flag=True)
@click.option("--tokens", default=20000, show_default=True, help="Tokens of the text to measure on.")
@click.option("--samples", default=64, show_default=True)
@click.option("--sample-length", default=512, show_default=True)
@click.option("--name", help="Of the model; default: its directory's.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results")
def main(
    model: Path, text: str, calibration: str | None, bits: str, groups: str, methods: str, asymmetric: bool,
    tokens: int, samples: int, sample_length: int, name: str | None, results: Path,
) -> None:  # fmt: skip
    title = name or model.name
    path = results / f"{date.today()}-quantization-{title}{'-asymmetric' if asymmetric else ''}.csv"
    rows = read_rows(path)
    for group, width, method in itertools.product(groups.split(","), bits.split(","), methods.split(",")):
        row = {
            "model": title, "weights": f"int{width}", "group": group, "symmetric": str(not asymmetric),
            "method": method,
        }  # fmt: skip
        if any(all(done[k] == v for k, v in row.items()) for done in rows):
            continue
        options: dict[str, Any] = {
            "weights": row["weights"], "group_size": int(group) if group != "row" else group,
            "asymmetric": asymmetric, "method": method, "embedding": "f16", "head": "f16", "kv": "f16",
            "activations": "f32", "text": text, "gate_tokens": tokens,
        }  # fmt: skip
        if method != "rtn":
            options |= {"calibration": calibration, "samples": samples, "sample_length": sample_length}
        rows.append(row | measure(model, options))
        write_rows(
            path,
            rows,
            f"{date.today()}, {cpu_model()}, held-out text {Path(text).name}, calibration "
            f"{Path(calibration).name if calibration else 'the default'}, {samples} x {sample_length}",
        )
        print(_cell(rows[-1], None), row, flush=True)
    print(table(rows))


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def write_rows(path: Path, rows: list[Row], about: str) -> None:
    with path.open("w", newline="") as file:
        file.write(f"# {about}\n# gristmill {gristmill.__version__}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
