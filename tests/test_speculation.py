"""Proposed tokens change the steps and not the text: prompt lookup, drafts, and how many are worth it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import FakeExecutor, fake_session, tiny_artifact

import gristmill
from gristmill.runtime.decoding.lookup import Lookup
from gristmill.runtime.decoding.pace import Acceptance, Pace, expected_tokens
from gristmill.runtime.errors import GristmillError


class Parrot(FakeExecutor):
    """Likes the token that stood seven positions before, most of the time."""

    def forward(self, tokens: Any, positions: Any, slots: Any, rows: Any) -> np.ndarray:
        out = super().forward(tokens, positions, slots, rows)
        for i, row in enumerate(rows):
            at = positions[row] + 1
            if at >= 7 and at % 11:
                out[i, self.cache[slots[row], at - 7]] += 50
        return out


def parrot() -> gristmill.Session:
    session = fake_session(max_len=400, max_tokens=32)
    session.executor = Parrot(max_len=400, max_tokens=32)
    return session


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.1}])
def test_lookup_changes_the_steps_and_not_the_text(options: dict[str, Any]) -> None:
    plain, quick = parrot(), parrot()
    expected = plain.generate("abcdefg abcdefg", max_new_tokens=200, lookup=False, **options)
    found = quick.generate("abcdefg abcdefg", max_new_tokens=200, **options)
    assert found.token_ids == expected.token_ids and found.text == expected.text
    statistics = quick.statistics
    assert 0 < statistics.accepted <= statistics.drafted
    assert plain.statistics.drafted == 0 and statistics.steps < plain.statistics.steps


def test_lookup_ends_where_the_text_ends() -> None:
    whole = parrot().generate("abcdefg abcdefg", max_new_tokens=60, lookup=False)
    for count in range(1, 30):
        assert parrot().generate("abcdefg abcdefg", max_new_tokens=count).token_ids == whole.token_ids[:count]
    stop = whole.text[20:23]
    assert (
        parrot().generate("abcdefg abcdefg", max_new_tokens=60, stop=stop).text == whole.text.split(stop)[0]
    )


def test_lookup_proposes_what_followed() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 2, 3, 4]
    lookup = Lookup(tokens)
    assert lookup.propose(3) == [5, 9, 2] and lookup.propose(1) == [5] and lookup.propose(0) == []
    tokens += [5, 8, 2, 3, 4]
    assert lookup.propose(2) == [5, 8], "the latest occurrence"
    tokens += [77]
    assert lookup.propose(4) == []


def test_proposals_that_are_mostly_wrong_become_rare() -> None:
    acceptance, pace = Acceptance(), Pace()
    lengths = []
    for _ in range(600):
        lengths.append(acceptance.length(pace, 7))
        if lengths[-1]:
            acceptance.learn(lengths[-1], 0)
    assert lengths[0] > 1 and sum(lengths[100:]) < 12 and acceptance.share < 0.05
    for _ in range(3):
        acceptance.learn(3, 3)
    assert acceptance.length(pace, 7) > 1


def test_the_length_of_proposals_follows_what_rows_cost() -> None:
    assert expected_tokens(2, 0.5) == 1.75
    pace = Pace()
    assert pace.worth(0.9, 7) == 7 and pace.worth(0.01, 7) == 0 and pace.worth(0.9, 2) == 2
    for rows, seconds in ((1, 1.0), (2, 1.05), (3, 1.1), (4, 1.15), (6, 3.0), (8, 3.2)):
        for _ in range(30):
            pace.note(rows, seconds)
    assert pace.worth(0.8, 7) == 3 and pace.worth(0.02, 7) == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 3}])
@pytest.mark.parametrize("same", [True, False])
def test_a_draft_changes_the_steps_and_not_the_text(options: dict[str, Any], same: bool) -> None:
    prompts = ["abcdefg", "x" * 50, "", "something else"]
    expected = parrot().generate(prompts, max_new_tokens=60, lookup=False, **options)
    session, draft = parrot(), parrot()
    if not same:
        draft = fake_session(max_len=400, max_tokens=7)
    session.draft_with(draft)
    for _ in range(2):  # the second time over prefixes that are there already
        found = session.generate(prompts, max_new_tokens=60, lookup=False, **options)
        assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    statistics = session.statistics
    assert statistics.drafted and (statistics.accepted == statistics.drafted) == same
    one = parrot()
    one.draft_with(parrot())
    one.generate("abcdefg", max_new_tokens=60, lookup=False)
    assert one.statistics.steps < 20, "up to seven proposals, all right"


def test_drafts_that_cannot_be(tmp_path: Path) -> None:
    session = fake_session(max_len=40)
    with pytest.raises(GristmillError, match="tokens are not the model's"):
        session.draft_with(fake_session(vocabulary=300, tokenizer=False))
    with pytest.raises(GristmillError, match="max_len 30 and 3 slots, expected 40"):
        session.draft_with(fake_session(max_len=30))
    artifact = tiny_artifact(tmp_path / "a")
    prompt = [5, 6, 7]
    plain = gristmill.load(artifact).generate(prompt, max_new_tokens=20, lookup=False)
    drafted = gristmill.load(artifact, draft=artifact)
    assert drafted.generate(prompt, max_new_tokens=20, lookup=False).token_ids == plain.token_ids
    assert drafted.statistics.accepted > 0
    with pytest.raises(GristmillError, match="nothing.grist"):
        gristmill.load(artifact, draft=tmp_path / "nothing.grist")


def test_a_draft_that_fails_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    session, draft = fake_session(max_len=200), fake_session(max_len=200)
    session.draft_with(draft)
    monkeypatch.setattr(draft.executor, "forward", None)
    with pytest.warns(RuntimeWarning, match="the draft is given up"):
        found = session.generate("abc", max_new_tokens=9, lookup=False)
    assert found.token_ids == fake_session(max_len=200).generate("abc", max_new_tokens=9).token_ids
