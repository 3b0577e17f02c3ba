"""Which ops may exist after which pass: a table, looked at after every pass.

A pass that promises to remove an op from the graph is listed with it; what is still there afterwards stays
illegal from then on. After the last pass only our ops, column slices and row-preserving views of ids may be
left.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .graph import Traced, aten, ours, place

GONE_AFTER: dict[str, tuple[Any, ...]] = {
    "canonicalize": (
        aten.linear.default, aten.addmm.default, aten.embedding.default, aten.layer_norm.default,
        aten.alias.default, aten.clone.default, aten.detach.default, aten._assert_tensor_metadata.default,
    ),
    "static_kv": (ours.attention_heads.default, ours.rope.default),
}  # fmt: skip
FINAL = (
    ours.embedding.default, ours.rms_norm.default, ours.layer_norm.default, ours.linear.default,
    ours.attention.default, ours.gather_rows.default, ours.pointwise.default, aten.slice.Tensor,
)  # fmt: skip


def illegal_nodes(traced: Traced, done: list[str], final: bool) -> list[fx.Node]:
    """The calls that may not exist any more once the passes in ``done`` have run."""
    gone = {target for name in done for target in GONE_AFTER.get(name, ())}
    calls = [n for n in traced.graph.nodes if n.op not in ("placeholder", "output")]
    return [
        n
        for n in calls
        if n.target in gone or (final and not (n.op == "call_function" and n.target in FINAL))
    ]


def describe(nodes: list[fx.Node]) -> str:
    """The first illegal op by name and place, and how many more there are."""
    more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return f"{place(nodes[0])}{more}"
