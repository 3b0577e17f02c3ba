"""What a step costs by its rows, measured as it goes, and how many tokens are worth proposing.

k proposals of which each is right with probability a, as long as those before it are, bring
(1 - a^(k + 1)) / (1 - a) tokens (Leviathan et al., arXiv 2211.17192, equation 1) for the time of k + 1 rows.
"""

from __future__ import annotations

LENGTHS = (1, 2, 3, 5, 7)  # of proposals; up to 4 rows and up to 8 are steps of the kernels' cost
PRIOR = 0.03  # that a row more is taken to cost before it was measured, as a share of one row alone
WEIGHT = 0.2  # of a new time in the running mean
LEARNT = 0.1  # of a new verdict on a proposal
FIRST_INTERVAL, MOST_INTERVAL = 4, 64  # tokens between proposals that are tried although not worth it


class Acceptance:
    """How often proposals are right. Where so few are that none is worth its time, one is tried now and then,
    more rarely each time."""

    def __init__(self) -> None:
        self.share = 0.6  # of a proposed token behind accepted ones, a running mean
        self._since, self._interval = 0, FIRST_INTERVAL

    def length(self, pace: Pace, most: int, each: float = 0.0) -> int:
        """How many tokens to propose, up to `most`; asked once for each token. each: seconds of making
        one."""
        worth = pace.worth(self.share, most, each)
        if worth or most < 1:
            return worth
        self._since += 1
        return int(self._since >= self._interval)

    def learn(self, proposed: int, accepted: int) -> None:
        """Of so many proposed tokens the first `accepted` ones were right."""
        for i in range(min(accepted + 1, proposed)):
            self.share += LEARNT * ((i < accepted) - self.share)
        self._since = 0
        self._interval = FIRST_INTERVAL if accepted else min(2 * self._interval, MOST_INTERVAL)


class Pace:
    """Seconds of steps by their number of rows."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def note(self, rows: int, seconds: float) -> None:
        before = self._seconds.get(rows)
        if before is None:
            self._seconds[rows] = seconds
        else:  # a step that something else delayed says little
            self._seconds[rows] = before + WEIGHT * (min(seconds, 2 * before) - before)

    def worth(self, acceptance: float, most: int, each: float = 0.0) -> int:
        """The number of proposals up to `most` that brings the most tokens per second; 0: none does. each:
        seconds that making one takes."""
        best, best_rate = 0, 1 / self._cost(1)
        for length in LENGTHS:
            rate = expected_tokens(length, acceptance) / (self._cost(length + 1) + length * each)
            if length <= most and rate > best_rate:
                best, best_rate = length, rate
        return best

    def _cost(self, rows: int) -> float:
        if rows in self._seconds:
            return self._seconds[rows]
        return self._seconds.get(1, 1.0) * (1 + PRIOR * (rows - 1))


def expected_tokens(proposals: int, acceptance: float) -> float:
    """Tokens that a step with so many proposals brings."""
    return float(sum(acceptance**i for i in range(proposals + 1)))
