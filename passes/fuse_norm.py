"""Norms that models spell out become one op: RMS norms, and layer norms without a bias."""

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


def _centered(x: Any, weight: Any, eps: Any) -> Any:
    mean = aten.mean.dim(x, [-1], True)
    variance = aten.mean.dim(aten.pow.Tensor_Scalar(aten.sub.Tensor(x, mean), 2), [-1], True)
    scale = aten.rsqrt.default(aten.add.Tensor(variance, eps))
    return aten.mul.Tensor(weight, aten.mul.Tensor(aten.sub.Tensor(x, mean), scale))


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


def _replace_centered(traced: Traced, out: fx.Node, found: dict[str, Any]) -> fx.Node:
    return call(
        traced, out, ours.layer_norm.default, (found["x"], found["weight"], None, None, float(found["eps"]))
    )


CENTERED = Rule(patterns=(_centered,), check=_check, replace=_replace_centered)
RULE = Rule(patterns=(_weight_first, _weight_last, _plain), check=_check, replace=_replace)


def run(traced: Traced, report: Report) -> None:
    CENTERED.apply(traced, report)
    RULE.apply(traced, report)
    traced.clean()
