"""Local rewrites as rules: patterns to find, a check that says no with a reason, a replacement.

A pattern is a function over ATen ops, as the exporter leaves them; its parameters are what it captures, nodes
or literals alike. torch.fx's matcher does the matching; an inner node that anything else uses makes no match.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

from .graph import Traced, place, swap

Pattern = Callable[..., Any]


@dataclass
class Report:
    """What a pass did: rewrites, the near misses with their reasons, and what else is worth knowing."""

    hits: int = 0
    misses: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def miss(self, node: fx.Node, reason: str) -> None:
        self.misses.append((place(node), reason))


@dataclass(frozen=True)
class Rule:
    """``check(traced, found)``: why not, or None; ``replace(traced, out, found)``: what replaces ``out``."""

    patterns: tuple[Pattern, ...]
    replace: Callable[[Traced, fx.Node, dict[str, Any]], fx.Node]
    check: Callable[[Traced, dict[str, Any]], str | None] = lambda traced, found: None

    def apply(self, traced: Traced, report: Report) -> None:
        for pattern in self.patterns:
            self._apply_pattern(traced, pattern, report)

    def _apply_pattern(self, traced: Traced, pattern: Pattern, report: Report) -> None:
        wanted = fx.symbolic_trace(pattern).graph
        matcher = SubgraphMatcher(
            wanted, match_output=False, match_placeholder=False, remove_overlapping_matches=True
        )
        anchor = next(n for n in wanted.nodes if n.op == "output").args[0]
        replaced: dict[fx.Node, fx.Node] = {}
        for match in matcher.match(traced.graph):
            out = match.nodes_map[anchor]
            captured = ((str(n.target), v) for n, v in match.nodes_map.items() if n.op == "placeholder")
            # an earlier rewrite may have replaced what this match captured
            found = {k: replaced.get(v, v) if isinstance(v, fx.Node) else v for k, v in captured}
            reason = self.check(traced, found)
            if reason is not None:
                report.miss(out, reason)
                continue
            new = self.replace(traced, out, found)
            replaced[out] = new
            swap(out, new)
            report.hits += 1
        traced.graph.eliminate_dead_code()
