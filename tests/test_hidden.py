"""Hidden states beside the logits: of the C++ executor against the numpy interpreter, and of a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from interpreter import Reference
from programs import llama
from test_executor import (
    CASES,
    FLOAT_TOLERANCE,
    INTEGER_TOLERANCE,
    assert_close,
    edit,
    ints,
    make,
    tokens_for,
)
from tiny import fake_session

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import NO_HIDDEN_STATES, Program


@pytest.mark.parametrize("case", ["f32", "order_float", "bf16", "int4"])
def test_hidden_states_are_what_the_head_multiplies(case: str, tmp_path: Path) -> None:
    """Of the rows asked for, in their order, beside the same logits; an integer head rounds its own copy."""
    program = llama(CASES[case])
    tokens, count = tokens_for(program, 20), np.arange(20, dtype=np.int32)
    batch = (tokens, count, np.zeros_like(count), ints([19, 0, 7, 7]))
    executor = make(program, tmp_path)
    logits, hidden = executor.forward_hidden(*batch)
    assert hidden.shape == (4, executor.hidden_width) == (4, CASES[case].hidden)
    assert logits.tobytes() == make(program, tmp_path).forward(*batch).tobytes()
    tolerance = INTEGER_TOLERANCE if CASES[case].act_group else FLOAT_TOLERANCE
    assert_close(hidden, Reference(program).forward_hidden(*batch)[1], tolerance)
    assert executor.forward_hidden(*batch[:3], ints([]))[1].shape == (0, CASES[case].hidden)


def test_programs_without_hidden_states(tmp_path: Path) -> None:
    """Logits that something else writes, and a head that is not the last: its input may be gone by then."""
    change = (
        "i = j['instructions']; i[-1]['out'] = [len(j['values']), 0, 97]; "
        "j['values'].append({'rows': 'R', 'width': 97, 'offset': j['arena_bytes']}); "
        "j['arena_bytes'] += 12416; "
        "i.append({'op': 'pointwise', 'in': [i[-1]['out']], 'steps': [['neg', 0]], 'out': [-1, 0, 97]})"
    )
    for edited in (edit(change), edit("j['instructions'].append(j['instructions'][0])")):
        executor = make(edited, tmp_path)
        assert executor.hidden_width == 0 and Program.from_json(edited.json).hidden is None
        batch = ints([1]), ints([0]), ints([0]), ints([0])
        executor.forward(*batch)
        with pytest.raises(GristmillError, match=NO_HIDDEN_STATES):
            executor.forward_hidden(*batch)


def test_a_session_gives_them_as_it_gives_logits() -> None:
    session = fake_session()
    logits, states = session.forward_hidden([5, 6, 7], [0, 1, 2], [0, 0, 0])
    again = session.forward_hidden([6, 7], [1, 2], [0, 0], [1])
    np.testing.assert_array_equal(again[0], logits[2:])
    np.testing.assert_array_equal(again[1], states[2:])
    np.testing.assert_array_equal(session.forward([8], [3], [0]), session.forward_hidden([8], [3], [0])[0])
    with pytest.raises(GristmillError, match="gap"):
        session.forward_hidden([1], [7], [0])
    with pytest.raises(GristmillError, match="tokens: got float64"):
        session.forward_hidden([1.5], [0], [0])
    with session.slot() as slot:
        assert session.forward_hidden([1], [0], [slot])[1].shape == (1, states.shape[1])
