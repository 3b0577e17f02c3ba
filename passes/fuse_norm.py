"""RMS norms, spelled out by models, become one op. (Layer norms are one already.)"""

from __future__ import annotations

from typing import Any

from torch import fx

from .graph import Traced, aten, call, ours, shape, width
from .rule import Report, Rule


def _normed(x: Any, eps: Any) -> Any:
    mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
    return aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, eps)))


def _weight_first(x: Any, weight: Any, eps: Any) -> Any:
    return aten.mul.Tensor(weight, _normed(x, eps))


def _weight_last(x: Any, weight: Any, eps: Any) -> Any:
    return aten.mul.Tensor(_normed(x, eps), weight)


def _plain(x: Any, eps: Any) -> Any:
    return _normed(x, eps)


def _check(traced: Traced, found: dict[str, Any]) -> str | None:
    weight = traced.weight(found.get("weight"))
    if "weight" in found and (weight is None or weight.shape != (width(found["x"]),)):
        return "the weight is not a constant vector of the row's width"
    return None


def _replace(traced: Traced, out: fx.Node, found: dict[str, Any]) -> fx.Node:
    assert shape(out) == shape(found["x"])
    return call(
        traced, out, ours.rms_norm.default, (found["x"], found.get("weight"), None, float(found["eps"]))
    )


RULE = Rule(patterns=(_weight_first, _weight_last, _plain), check=_check, replace=_replace)


def run(traced: Traced, report: Report) -> None:
    RULE.apply(traced, report)
    traced.clean()
