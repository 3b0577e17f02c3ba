"""What follows a linear or a norm moves into it: activation, scale, softcap, residual add."""

from __future__ import annotations

from typing import Any

from torch import fx

from .fuse_glu import activation_name
from .graph import Traced, arguments, aten, is_op, only_user, ours, shape, swap, with_arguments
from .rule import Report, Rule

TAKES_RESIDUAL = (ours.linear.default, ours.rms_norm.default, ours.layer_norm.default, ours.embedding.default)


def _softcap(x: Any, cap: Any, cap2: Any) -> Any:
    return aten.mul.Tensor(aten.tanh.default(aten.div.Tensor(x, cap)), cap2)


def _check_softcap(traced: Traced, found: dict[str, Any]) -> str | None:
    x = found["x"]
    if found["cap"] != found["cap2"] or not isinstance(found["cap"], int | float):
        return "tanh is not scaled by the number that it was divided by"
    if not _plain_linear(x):
        return "not the only use of a linear"
    return None


SOFTCAP = Rule(
    patterns=(_softcap,),
    check=_check_softcap,
    replace=lambda traced, out, found: with_arguments(traced, found["x"], out, softcap=float(found["cap"])),
)


def run(traced: Traced, report: Report) -> None:
    SOFTCAP.apply(traced, report)
    for node in list(traced.graph.nodes):
        if node.op == "call_function":
            new = _activation(traced, node) or _scale(traced, node) or _residual(traced, node, report)
            if new is not None:
                swap(node, new)
                report.hits += 1
    traced.clean()


def _plain_linear(node: Any) -> bool:
    """A linear whose result is used once and has nothing after its activation yet."""
    if not is_op(node, ours.linear.default) or not only_user(node):
        return False
    a = arguments(node)
    return a["residual"] is None and a["softcap"] == 0.0


def _activation(traced: Traced, node: fx.Node) -> fx.Node | None:
    name = activation_name(node)
    if name is None or not _plain_linear(node.args[0]):
        return None
    a = arguments(node.args[0])  # type: ignore[arg-type]
    if a["activation"] != "none" or a["scale"] != 1.0 or a["glu"]:
        return None
    return with_arguments(traced, node.args[0], node, activation=name)  # type: ignore[arg-type]


def _scale(traced: Traced, node: fx.Node) -> fx.Node | None:
    if not is_op(node, aten.mul.Tensor, aten.div.Tensor) or not isinstance(node.args[1], int | float):
        return None
    x, factor = node.args[0], float(node.args[1])
    factor = factor if is_op(node, aten.mul.Tensor) else 1.0 / factor
    lookup = is_op(x, ours.embedding.default) and only_user(x) and arguments(x)["residual"] is None  # type: ignore[arg-type]
    if not (lookup or _plain_linear(x)):
        return None
    return with_arguments(traced, x, node, scale=arguments(x)["scale"] * factor)  # type: ignore[arg-type]


def _residual(traced: Traced, node: fx.Node, report: Report) -> fx.Node | None:
    """add(a, b): the later of the two takes the other as its residual."""
    if (
        not is_op(node, aten.add.Tensor)
        or len(node.args) != 2
        or not all(isinstance(a, fx.Node) for a in node.args)
    ):
        return None
    if node.kwargs or shape(node.args[0]) != shape(node.args[1]):  # type: ignore[arg-type]
        return None
    order = {n: i for i, n in enumerate(traced.graph.nodes)}
    for x, other in sorted((node.args, node.args[::-1]), key=lambda pair: -order[pair[0]]):
        if is_op(x, *TAKES_RESIDUAL) and only_user(x) and arguments(x)["residual"] is None:  # type: ignore[arg-type]
            return with_arguments(traced, x, node, residual=other)  # type: ignore[arg-type]
    report.miss(node, "neither side is a linear or norm used only here")
    return None
