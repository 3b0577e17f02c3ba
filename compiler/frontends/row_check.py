"""Whether rows are independent outside attention, asked of the graph itself.

The graph runs over some rows, and over a choice of the same rows in another order, attention aside. Every
value must be the same choice of the other run's; the first one that is not is named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.ops import REFERENCES
from ...passes.graph import EXAMPLE_ROWS, Traced, evaluate, ours, place
from ...passes.lift_positions import is_rows
from ...runtime.errors import GristmillError
from ..interpret import steps

ROWS = EXAMPLE_ROWS
CHOICE = torch.tensor([7, 2, 11, 5, 0, 9, 3, 12])
TOLERANCE = 1e-4  # of the largest value: sums over fewer rows may run in another order


def check_rows(traced: Traced, name: str, vocabulary: int) -> None:
    """Raises GristmillError that names the first op by which a row depends on others, or on their number."""
    whole = _inputs(traced, vocabulary)
    chosen = {key: value[:, CHOICE] for key, value in whole.items()}
    runs: list[dict[fx.Node, Any]] = [{}, {}]
    with torch.inference_mode():
        for node, finished in steps(traced):
            weights = {s: traced.weights[s.name].load() for s in node.all_input_nodes if traced.weight(s)}
            for env, inputs in zip(runs, (whole, chosen), strict=True):
                env[node] = _run(node, env, inputs, weights)
            if not _agree(traced, node, *(env[node] for env in runs)):
                raise GristmillError(
                    f"{name}: rows depend on each other at {place(node)}; outside of attention "
                    "(gristmill.attention, or scaled_dot_product_attention with a causal mask) a row of the "
                    "result may depend on its own token and position alone"
                )
            for env in runs:
                for source in finished:
                    env.pop(source, None)


def _inputs(traced: Traced, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    limit = min(traced.max_position or ROWS, ROWS)
    tokens = torch.randint(0, min(vocabulary, 64), (1, ROWS), generator=generator)
    return {"tokens": tokens, "positions": (torch.arange(ROWS) % limit)[None]}


def _run(node: fx.Node, env: dict[fx.Node, Any], inputs: dict[str, Tensor], weights: Any) -> Any:
    def value(source: fx.Node) -> Any:
        if source.op != "placeholder":
            return env[source]
        return weights[source] if source in weights else inputs[source.name]

    if node.target is ours.attention_heads.default:
        return _apart(node, value)
    return evaluate(REFERENCES.get(node.target, node.target), node.args, node.kwargs, value)


def _apart(node: fx.Node, value: Any) -> Tensor:
    """In place of attention [1, T, H, V]: something of the row itself."""
    q, v = value(node.args[0]), value(node.args[2])
    heads = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return heads.transpose(1, 2).contiguous()


def _agree(traced: Traced, node: fx.Node, whole: Any, chosen: Any) -> bool:
    meta = node.meta.get("val")
    if isinstance(meta, (int, float, torch.SymInt)) or not isinstance(whole, Tensor):
        return True  # sizes; lists are looked at when something is taken from them
    expected = whole
    for dim, extent in enumerate(getattr(meta, "shape", ())):
        if is_rows(extent, traced):
            expected = expected.index_select(dim, CHOICE)
        elif isinstance(extent, torch.SymInt):
            return True  # rows in some other arrangement: what becomes of them is looked at
    if expected.shape != chosen.shape:
        return False
    if not expected.dtype.is_floating_point:
        return torch.equal(expected, chosen)
    scale = float(expected.abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0.0
    return torch.allclose(expected, chosen, rtol=0, atol=TOLERANCE * max(scale, 1e-30), equal_nan=True)
