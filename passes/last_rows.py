"""Only the rows whose logits are asked for reach the last norm and the head."""

from __future__ import annotations

from torch import fx

from .graph import Traced, arguments, call, is_op, only_user, ours
from .rule import Report

ROW_WISE = (ours.rms_norm.default, ours.layer_norm.default, ours.linear.default)


def run(traced: Traced, report: Report) -> None:
    output = next(n for n in reversed(traced.graph.nodes) if n.op == "output")
    first = _first_of_tail(output.args[0][0])
    if first is None:
        report.miss(output, "the logits do not come from a linear")
        return
    x = first.args[0]
    rows = call(traced, first, ours.gather_rows.default, (x, traced.input("rows")))
    rows.meta["val"] = x.meta["val"]  # type: ignore[union-attr]
    first.replace_input_with(x, rows)  # type: ignore[arg-type]
    report.hits += 1
    traced.clean()


def _first_of_tail(node: fx.Node) -> fx.Node | None:
    """The earliest op of the chain norm → head at the end of the graph; it stops at the residual stream."""
    first = None
    while is_op(node, *ROW_WISE) and only_user(node) and arguments(node)["residual"] is None:
        if first is not None and is_op(node, ours.linear.default):
            break
        first, node = node, node.args[0]  # type: ignore[assignment]
    return first
