"""What an artifact says of itself, as data and as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.runtime.artifact import EVALUATION, PROGRAM, Artifact, open_artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.footprint import kv_bytes, refuse_malformed
from gristmill.runtime.program import Program

Rows = list[tuple[str, str]]


def read_program(path: str | Path) -> tuple[Artifact, Program]:
    """Opens the artifact at `path` without running anything."""
    artifact = open_artifact(path)
    program = Program.from_json(artifact.json(PROGRAM))
    refuse_malformed(program)
    return artifact, program


def listing(program: Program) -> str:
    """The program, one line per instruction; it may not have been checked by an executor."""
    try:
        return program.listing()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise GristmillError(f"program.json is malformed ({error}); compile the model again") from error


def artifact_summary(artifact: Artifact, program: Program) -> dict[str, Any]:
    """The manifest and what follows from the program, as JSON."""
    limits = program.limits
    return {
        **{key: value for key, value in artifact.manifest.items() if key != "manifest_sha256"},
        "path": str(artifact.path),
        "size_bytes": sum(entry.size for entry in artifact.files.values()),
        "instructions": len(program.instructions),
        "vocabulary": program.vocabulary,
        "kv_bytes": kv_bytes(program, limits.max_len, limits.max_slots),
        "arena_bytes": program.arena_bytes,
        "evaluation": artifact.json(EVALUATION) if EVALUATION in artifact.files else None,
    }


def artifact_rows(summary: dict[str, Any]) -> Rows:
    """The summary of `inspect` as a table."""
    rows: Rows = [("artifact", summary["path"]), ("content", summary["content_id"])]
    for key in ("source", "adapters", "quantization", "limits", "tools"):
        if key in summary:
            rows.append((key, _flat(summary[key])))
    if isinstance(summary.get("bits_per_weight"), (int, float)):
        rows.append(("bits per weight", f"{summary['bits_per_weight']:.3f}"))
    rows.append(("size", size_text(summary["size_bytes"])))
    rows.append(("program", f"{summary['instructions']} instructions, vocabulary {summary['vocabulary']}"))
    rows.append(
        (
            "memory beside it",
            f"KV cache {size_text(summary['kv_bytes'])}, arena {size_text(summary['arena_bytes'])}",
        )
    )
    rows += [(name, size_text(entry["size"])) for name, entry in summary["files"].items()]
    return rows


def evaluation_rows(evaluation: dict[str, Any]) -> Rows:
    """What the gate measured, as a table; a record of another shape is listed as it stands."""
    e = evaluation
    try:
        growth, kl = e["ppl_increase"], e["kl"]
        return [
            ("measured on", f"{e['text']}, {e['tokens']} tokens in windows of {e['window']}"),
            (
                "perplexity",
                f"{e['ppl']:.4f}, float {e['reference_ppl']:.4f}: {growth['estimate']:+.2%} "
                f"({growth['low']:+.2%} to {growth['high']:+.2%})",
            ),
            ("KL divergence", f"{kl['estimate']:.3g} nats ({kl['low']:.3g} to {kl['high']:.3g})"),
            ("top token", f"the same in {e['top1_agreement']:.2%}"),
            ("measure again", str(e["command"])),
        ]
    except (KeyError, TypeError, ValueError):
        return [(str(key).replace("_", " "), _flat(value)) for key, value in e.items()]


def quantization_rows(summary: dict[str, Any]) -> Rows:
    """The accuracy section: matrices of one kind (q_proj, down_proj ...) and format in a row each.

    Errors are squared errors of the output relative to the output, their mean over the matrices: of rounding
    to nearest, and of what the method made of it.
    """
    kinds: dict[tuple[str, str, str], list[_MatrixFact]] = {}
    for fact in _matrix_facts(summary):
        kinds.setdefault((fact.name.rpartition(".")[2], fact.scheme, fact.method), []).append(fact)
    rows: Rows = []
    for (kind, scheme, method), facts in kinds.items():
        many = f"{len(facts)} x " if len(facts) > 1 else ""
        rows.append((kind, f"{many}{scheme}, {method}{_error_text(facts)}"))
    return rows + _tuning_rows(summary)


def _tuning_rows(summary: dict[str, Any]) -> Rows:
    tuning = _dict(_dict(summary.get("quantization")).get("tuning"))
    before, after = _number(tuning.get("kl_before")), _number(tuning.get("kl_after"))
    if not tuning.get("kept") or before is None or after is None:
        return []
    return [("scales", f"tuned together: KL on held-out samples {before:.3g} -> {after:.3g} nats")]


def matrix_lines(summary: dict[str, Any]) -> list[str]:
    """A line per weight matrix."""
    facts = _matrix_facts(summary)
    width = max((len(f.name) for f in facts), default=0)
    return [f"{f.name:<{width}}  {f.scheme:<12} {f.method}{_error_text([f])}" for f in facts]


@dataclass(frozen=True)
class _MatrixFact:
    name: str
    scheme: str
    method: str
    before: float | None
    after: float | None
    seconds: float | None


def _matrix_facts(summary: dict[str, Any]) -> list[_MatrixFact]:
    """Every matrix of the manifest's record; what another version wrote oddly is left out."""
    quantization = _dict(summary.get("quantization"))
    records, seconds = _dict(quantization.get("matrices")), _dict(summary.get("calibration_seconds"))
    found = []
    for name, scheme in _dict(quantization.get("schemes")).items():
        record = _dict(records.get(name))
        found.append(
            _MatrixFact(
                str(name), str(scheme), str(record.get("method", "rtn")), _number(record.get("error_rtn")),
                _number(record.get("error")), _number(seconds.get(name)),
            )
        )  # fmt: skip
    return found


def _error_text(facts: list[_MatrixFact]) -> str:
    pairs = [(f.before, f.after) for f in facts if f.before is not None and f.after is not None]
    if not pairs:
        return ""
    before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    seconds = sum(f.seconds or 0 for f in facts)
    return f": output error {before:.2e} rounded, {after:.2e} now, {seconds:.1f} s"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def size_text(size_bytes: int | float) -> str:
    """Bytes with a readable unit."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def memory_text(memory: dict[str, int]) -> str:
    """Session.memory in one line."""
    weights, kv, arena = (size_text(memory[key]) for key in ("weight_bytes", "kv_bytes", "arena_bytes"))
    return f"memory: weights {weights} mapped, KV cache {kv}, buffers {arena}"


def _flat(value: Any) -> str:
    """A value on one line; of a nested one only what is short."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items() if not isinstance(item, dict))
    if isinstance(value, list):
        return " ".join(_flat(item) for item in value[:4]) + (" ..." if len(value) > 4 else "")
    return str(value)
