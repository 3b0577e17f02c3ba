"""Sampling in Triton, in Triton's interpreter or on a device, against the CPU's own choices."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")


from chosen import choose
from triton_device import DEVICE, generator, on_device  # noqa: F401  (the fixture is for all)

from gristmill.kernels.triton.sampling import Options, allocate_workspace, sample
from gristmill.runtime.decoding.options import GenerationOptions

NONE = np.empty(0, np.int64)
MIXES = [  # temperature, top_k, top_p
    (0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (1.0, 0, 0.9), (1.3, 50, 0.8), (1e-6, 0, 0.5), (1.0, 1, 1.0),
    (2.0, 0, 0.0), (1.0, 10**6, 0.3), (1.0, 2047, 0.99),
]  # fmt: skip


def options_of(mixes, seed=3, position=0):
    temperature, top_k, top_p = map(list, zip(*mixes))
    rows = len(mixes)
    return Options(
        torch.tensor(temperature), torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p),
        torch.full((rows,), seed), torch.arange(rows), torch.arange(rows, dtype=torch.int32) + position,
        torch.ones(rows),
    )  # fmt: skip


def sampled(logits, options, **rest):
    tokens = torch.full((len(logits),), -7, dtype=torch.int32)
    sample(logits, options, allocate_workspace(len(logits), logits.shape[1], DEVICE), tokens, **rest)
    return tokens.tolist()


def chosen(logits, mixes, seed=3, position=0):
    return [
        choose(row, GenerationOptions(temperature=t, top_k=k, top_p=p), NONE, seed, r, r + position)
        for r, (row, (t, k, p)) in enumerate(zip(logits.cpu().numpy(), mixes))
    ]  # fmt: skip


@pytest.mark.parametrize("vocabulary", [1, 40, 2100])
def test_tokens_are_those_that_the_cpu_draws(vocabulary):
    torch.manual_seed(vocabulary)
    logits = torch.randn(len(MIXES), vocabulary) * 3
    assert sampled(logits, options_of(MIXES, 3, 100_000)) == chosen(logits, MIXES, 3, 100_000)


def test_equals_are_kept_as_the_cpu_keeps_them():
    logits = torch.randn(1, 3000, generator=generator(0)).round().repeat(len(MIXES), 1)
    assert sampled(logits, options_of(MIXES, 2**63 - 1)) == chosen(logits, MIXES, 2**63 - 1)


def test_a_seed_is_unsigned():
    logits = torch.zeros(1, 500)
    options = options_of([(1.0, 0, 1.0)], -1)  # the bits of 2^64 - 1
    assert sampled(logits, options) == chosen(logits, [(1.0, 0, 1.0)], 2**64 - 1)


def test_greedy_takes_the_lowest_of_equals_in_two_launches():
    logits = torch.zeros(2, 2500)
    logits[0, [2100, 2400]], logits[1, [7, 2400]] = 1.5, 0.5
    options = options_of([(0.0, 0, 1.0)] * 2)
    assert sampled(logits, options, greedy=True) == [2100, 7]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_told(bad):
    logits = torch.randn(3, 2100, generator=generator(0))
    logits[1, 2060] = bad
    tokens = sampled(logits, options_of([(0.0, 0, 1.0), (0.0, 0, 1.0), (1.0, 3, 0.9)]))
    assert tokens[1] == -1 and min(tokens[0], tokens[2]) >= 0


def test_seen_tokens_are_penalized_and_the_chosen_one_is_seen():
    logits = torch.tensor([[2.0, 1.9, -1.0], [-1.0, -1.1, -3.0]])
    seen = torch.tensor([[1, 0, 0], [1, 0, 0]], dtype=torch.int8)
    options = options_of([(0.0, 0, 1.0)] * 2)
    options.penalty[:] = 1.5
    assert sampled(logits, options, seen=seen) == [1, 1]
    assert seen.tolist() == [[1, 1, 0], [1, 1, 0]]
