"""What an artifact says of itself, as data and as rows of a table."""

from __future__ import annotations

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
    for key in ("source", "quantization", "limits", "tools"):
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
