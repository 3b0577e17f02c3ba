"""Beam searches of a Session beside those of transformers.generate; run it for many prompts:

tests/beam_compare.py MODEL TEXT [PROMPTS]: a Hugging Face directory, and a text file whose pieces are
prompts.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gristmill
from gristmill.runtime.decoding.generate_beams import generate_beams
from gristmill.runtime.session import Session


@dataclass(frozen=True)
class Case:
    """What both are asked for."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: Any = False
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0


@dataclass(frozen=True)
class Found:
    """One prompt with one case. margin: by how much the scores of the first texts that differ do;
    score_error: the largest difference between scores of the same text; both relative above 1."""

    prompt: str
    case: Case
    got: list[list[int]]
    want: list[list[int]]
    margin: float
    score_error: float

    @property
    def equal(self) -> bool:
        return self.got == self.want


def compare(
    directory: Path, session: Session, prompts: list[str], cases: list[Case], max_new_tokens: int
) -> Iterator[Found]:
    """Every prompt with every case, searched by transformers in f32 and by the session."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert set(np.atleast_1d(model.generation_config.eos_token_id)) == session.eos_ids
    for prompt in prompts:
        ids = session._prompt_ids(prompt)
        for case in cases:
            want, want_scores = reference(model, ids, case, max_new_tokens)
            beams = generate_beams(session, ids, max_new_tokens=max_new_tokens, **asdict(case))
            got, scores = [b.token_ids for b in beams], [b.score for b in beams]
            differences = [abs(a - b) / max(1, abs(b)) for a, b in zip(scores, want_scores, strict=True)]
            parted = [g != w for g, w in zip(got, want, strict=True)]
            margin = differences[parted.index(True)] if any(parted) else 0.0
            same = [d for d, apart in zip(differences, parted, strict=True) if not apart]
            yield Found(prompt, case, got, want, margin, max(same, default=0.0))


def reference(
    model: Any, ids: list[int], case: Case, max_new_tokens: int
) -> tuple[list[list[int]], list[float]]:
    """transformers' new tokens, without the padding after the ending one, and its scores."""
    given = asdict(case)
    given["no_repeat_ngram_size"] = given.pop("no_repeat_ngram")
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=max_new_tokens,
            do_sample=False, return_dict_in_generate=True, output_scores=True, **given,
        )  # fmt: skip
    ending = set(np.atleast_1d(model.generation_config.eos_token_id).tolist())
    new = [cut(sequence[len(ids) :], ending) for sequence in out.sequences.tolist()]
    return new, out.sequences_scores.tolist()


def cut(tokens: list[int], ending: set[int]) -> list[int]:
    ends = [i + 1 for i, token in enumerate(tokens) if token in ending]
    return tokens[: ends[0]] if ends else tokens


def all_cases() -> list[Case]:
    """2, 4 and 8 beams, all returned, with every option."""
    options: list[dict[str, Any]] = [
        {}, {"length_penalty": 0.0}, {"length_penalty": 2.0, "early_stopping": "never"},
        {"early_stopping": True, "repetition_penalty": 1.2},
        {"no_repeat_ngram": 3, "repetition_penalty": 1.1, "min_new_tokens": 10},
    ]  # fmt: skip
    return [Case(n, num_return_sequences=n, **given) for n in (2, 4, 8) for given in options]


def pieces(text: str, count: int) -> list[str]:
    """`count` pieces of 20 to 140 characters, spread over the text."""
    starts = np.linspace(0, len(text) - 200, count).astype(int)
    return [text[start : start + 20 + 120 * i // count] for i, start in enumerate(starts)]


def main(model: str, text: str, count: str = "50") -> None:
    prompts = pieces(Path(text).read_text("utf-8"), int(count))
    with tempfile.TemporaryDirectory() as folder:
        gristmill.compile(Path(model), Path(folder) / "f32", weights="f32", gate=False)
        session = gristmill.load(Path(folder) / "f32")
        searches, parted, error = 0, list[Found](), 0.0
        for found in compare(Path(model), session, prompts, all_cases(), max_new_tokens=24):
            searches, error = searches + 1, max(error, found.score_error)
            if not found.equal:
                parted.append(found)
                sys.stdout.write(f"parted by {found.margin:.1e}: {found.prompt!r} {found.case}\n")
                sys.stdout.flush()
    sys.stdout.write(
        f"{searches} searches, {len(parted)} parted, scores of equal texts differ by {error:.1e} at most\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
