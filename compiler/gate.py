"""The accuracy gate: the artifact itself is run on held text and compared with the float model.

Nothing is simulated: a Session executes the artifact's files, quantized activations and cache included.
What is compared are the distributions over the next token: perplexity of the text under both, the
Kullback-Leibler divergence KL(float || artifact), how often the most likely token is the same, and where
greedy continuations part.

A limit is a promise to whoever uses the artifact, so the upper bound of the 95 % interval decides: a build
passes when it is at or below the limit. Between the bounds the text is too short to tell, and that fails as
well, saying how many tokens would do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.compiler import statistics
from gristmill.compiler.statistics import Comparison, Interval
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.evaluation import text_windows, window_logits
from gristmill.runtime.session import Session

DEFAULT_TOKENS = 1024
WINDOW = 256  # tokens, the prefix (BOS) included
GREEDY_PROMPT, GREEDY_TOKENS = 32, 64

Array = NDArray[Any]
# Given windows of token ids, yields the float model's logits [len(window), vocabulary] f32 of each, in order.
Reference = Callable[[list[list[int]]], Iterator[Array]]


@dataclass(frozen=True)
class HeldText:
    """The text that the gate reads: a name without directories, and the token ids without special tokens."""

    name: str
    sha256: str
    ids: list[int]
    prefix: list[int]  # what the tokenizer puts before every text (BOS, mostly)

    @staticmethod
    def of(name: str, text: str, tokenizer: Any, tokens: int) -> HeldText:
        """The first `tokens` tokens of a text."""
        ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
        return HeldText(name, hashlib.sha256(text.encode()).hexdigest(), ids, tokenizer.prefix_ids)


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation by the artifact, judged by the float model reading the same tokens.

    first_difference: index among the new tokens where the float model would have gone on differently, None if
    nowhere. There, in nats: top2_margin between its first and second choice, preference for its own over the
    artifact's token.
    """

    prompt_tokens: int
    tokens: int
    first_difference: int | None
    top2_margin: float | None = None
    preference: float | None = None

    def __str__(self) -> str:
        if self.first_difference is None:
            return f"all {self.tokens} tokens are the float model's choice"
        place = f"token {self.first_difference + 1} of {self.tokens}"
        return f"{place} is the first that differs, by {self.preference:.3g} nats of the float model"


@dataclass(frozen=True)
class Evaluation:
    """What the gate measured. nll and kl are nats per token, ppl_increase is relative (0.01: one percent)."""

    text: str
    text_sha256: str
    tokens: int
    window: int
    reference_nll: float
    reference_ppl: float
    nll: float
    ppl: float
    ppl_increase: Interval
    kl: Interval
    kl_p99: float
    kl_max: float
    top1_agreement: float
    greedy: Greedy
    blocks: int
    block_tokens: int = statistics.BLOCK_TOKENS
    resamples: int = statistics.RESAMPLES
    confidence: float = statistics.CONFIDENCE
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For evaluation.json: nothing here depends on the machine's name, paths, load or clock."""
        return {"format": 1, **asdict(self), "versions": dict(self.versions)}

    def lines(self) -> list[str]:
        """The figures for people, one fact a line."""
        ppl, kl = self.ppl_increase, self.kl
        return [
            f"text        {self.text}, {self.tokens} tokens in windows of {self.window}",
            f"perplexity  {self.ppl:.4f}, float {self.reference_ppl:.4f}: "
            f"{100 * ppl.estimate:+.3g} % ({100 * ppl.low:+.3g} to {100 * ppl.high:+.3g} %)",
            f"KL          mean {kl.estimate:.3g} nats ({kl.low:.3g} to {kl.high:.3g}), "
            f"99th percentile {self.kl_p99:.3g}, largest {self.kl_max:.3g}",
            f"top token   the same in {100 * self.top1_agreement:.2f} %",
            f"greedy      {self.greedy}",
        ]


@dataclass(frozen=True)
class Limits:
    """What a build must keep: ppl_increase relative (0.01: one percent), mean kl in nats; None: no limit."""

    ppl_increase: float | None = None
    kl: float | None = None


def default_text(kind: str) -> str:
    """The held text `prose` or `code` that comes with gristmill."""
    return files("gristmill.compiler").joinpath("data", f"gate_{kind}.txt").read_text("utf-8")


def suiting_text(tokenizer: Any) -> tuple[str, str]:
    """Name and text of the default that this tokenizer, being made for such text, packs more densely."""
    texts = {f"gate_{kind}.txt": default_text(kind) for kind in ("prose", "code")}
    name = max(texts, key=lambda name: len(texts[name]) / len(tokenizer.encode(texts[name])))
    return name, texts[name]


def run_gate(
    session: Session,
    reference: Reference,
    text: HeldText,
    *,
    window: int = WINDOW,
    command: str = "",
    versions: Mapping[str, str] | None = None,
) -> Evaluation:
    """Compare the session's artifact with the float model on a text.

    reference is called once, with the text's windows and the greedy continuation as the last one; of all
    logits no more than one window's are held at a time. Raises GristmillError for a text that is too short.
    """
    window = min(window, session.max_len)
    windows = text_windows(text.ids, text.prefix, window)
    if not windows:
        raise GristmillError("the gate's text is too short: it has no token that another one stands before")
    prompt, continuation = _continue(session, windows[0])
    expected = reference([*windows, prompt + continuation[:-1]])
    counted = max(len(text.prefix), 1) - 1  # rows of logits before the first counted token
    scores = [_score_window(session, ids, next(expected))[counted:] for ids in windows]
    greedy = _judge(next(expected)[len(prompt) - 1 :], continuation, len(prompt))
    return _summary(text, window, scores, greedy, command, versions or {})


def enforce(evaluation: Evaluation, limits: Limits) -> list[str]:
    """A line for each limit that is kept; raises GristmillError for one breached or undecided."""
    checks = (
        ("perplexity increase", "--max-ppl-increase", evaluation.ppl_increase, limits.ppl_increase, _percent),
        ("mean KL divergence", "--max-kl", evaluation.kl, limits.kl, lambda x: f"{x:.3g} nats"),
    )
    asked = [check for check in checks if check[3] is not None]
    if asked and evaluation.blocks < statistics.FEWEST_BLOCKS:
        needed = statistics.FEWEST_BLOCKS * statistics.BLOCK_TOKENS
        raise GristmillError(
            f"{evaluation.tokens} tokens are too few to decide on a limit: "
            f"give at least {needed} (--gate-tokens, --text)"
        )
    return [_decide(evaluation.tokens, *check) for check in asked]


def _decide(
    tokens: int, what: str, option: str, found: Interval, limit: float | None, show: Callable[[float], str]
) -> str:
    """The upper bound decides; see the module's docstring."""
    assert limit is not None
    got = f"{what} {show(found.estimate)}, at most {show(found.high)} at 95 % confidence"
    if found.high <= limit:
        return f"{got}: within {option} {show(limit)} (the upper bound decides)"
    if found.low > limit:
        raise GristmillError(
            f"{got}, at least {show(found.low)}: breaches {option} {show(limit)}; use a finer format"
        )
    needed = statistics.tokens_to_decide(found, limit, tokens)
    if needed is None:
        raise GristmillError(f"{got}: the estimate is beyond {option} {show(limit)}; use a finer format")
    raise GristmillError(
        f"{got}: {tokens} tokens cannot promise {option} {show(limit)} (the upper bound decides); "
        f"about {_round_up(needed)} tokens would: --gate-tokens {_round_up(needed)} with a long enough --text"
    )


def _continue(session: Session, ids: list[int]) -> tuple[list[int], list[int]]:
    """A prompt from the text's beginning, and the artifact's greedy continuation."""
    prompt = ids[: min(GREEDY_PROMPT, session.max_len - 1)]
    generation = session.generate(prompt, max_new_tokens=GREEDY_TOKENS, temperature=0.0, ignore_eos=True)
    return prompt, generation.token_ids


def _judge(logits: Array, continuation: list[int], prompt_tokens: int) -> Greedy:
    """logits [len(continuation), V] of the float model, each row before the token it is compared with."""
    chosen = np.array(continuation)
    differs = np.flatnonzero(logits.argmax(1) != chosen)
    if not len(differs):
        return Greedy(prompt_tokens, len(chosen), None)
    at = int(differs[0])
    row = logits[at].astype(np.float64)
    second, first = np.partition(row, -2)[-2:]
    return Greedy(prompt_tokens, len(chosen), at, float(first - second), float(first - row[chosen[at]]))


def score_window(pieces: Iterable[tuple[int, Array]], ids: list[int], expected: Array) -> Array:
    """The `token_scores` [len(ids) - 1, COLUMNS] of one window.

    pieces: (first row, logits [rows, V] f32) of the artifact that cover the window, as `window_logits` has
    them; expected: the float model's logits [len(ids) or one less, V]. Raises GristmillError where the widths
    differ.
    """
    scores = np.empty((len(ids) - 1, statistics.COLUMNS))
    for start, logits in pieces:
        if expected.shape[1:] != logits.shape[1:]:
            raise GristmillError(
                f"the float model gave logits of {expected.shape[1]} tokens, the artifact of "
                f"{logits.shape[1]}: they are not the same model"
            )
        targets = np.array(ids[start + 1 : start + 1 + len(logits)])
        rows = slice(start, start + len(targets))
        scores[rows] = statistics.token_scores(expected[rows], logits[: len(targets)], targets)
    return scores


def _score_window(session: Session, ids: list[int], expected: Array) -> Array:
    assert len(expected) == len(ids), f"{len(expected)} rows of the float model for {len(ids)} tokens"
    with session.slot() as slot:
        return score_window(window_logits(session, ids, slot), ids, expected)


def _summary(
    text: HeldText,
    window: int,
    scores: Sequence[Array],
    greedy: Greedy,
    command: str,
    versions: Mapping[str, str],
) -> Evaluation:
    found = Comparison.of(scores)
    return Evaluation(
        text=text.name,
        text_sha256=text.sha256,
        tokens=found.tokens,
        window=window,
        reference_nll=found.reference_nll,
        reference_ppl=found.reference_ppl,
        nll=found.nll,
        ppl=found.ppl,
        ppl_increase=found.ppl_increase,
        kl=found.kl,
        kl_p99=found.kl_p99,
        kl_max=found.kl_max,
        top1_agreement=found.top1_agreement,
        greedy=greedy,
        blocks=found.blocks,
        command=command,
        versions=versions,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _round_up(tokens: int) -> int:
    """Two significant digits are all that such an estimate is worth."""
    unit = int(10 ** max(0, len(str(tokens)) - 2))
    return -(-tokens // unit) * unit
