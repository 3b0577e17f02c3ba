"""PEFT adapters merged into a traced model's weights, each when it is read: nothing here holds a weight.

    LoRA   W + scale B A                          DoRA   diag(m / |W + scale B A|) (W + scale B A)

in float32, |.| the norm of every row. What is merged is a float weight from then on: where the checkpoint
holds it quantized, it is rounded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.graph import Lazy, Traced, aten, is_op, ours
from ..runtime.adapters.peft import Pair, PeftAdapter, find_name, read_adapter, refuse_not_finite
from ..runtime.adapters.tensors import Stored

TURNED = (aten.addmm.default, aten.mm.default)  # GPT-2's Conv1D keeps [inputs, outputs]
TABLES = (aten.embedding.default, ours.embedding.default)
Change = Callable[[Tensor], Tensor]


def read_adapters(paths: Iterable[str]) -> list[PeftAdapter]:
    """The adapters to merge. Raises GristmillError for one that cannot be read, or is named twice."""
    adapters = [read_adapter(path) for path in paths]
    folders = [adapter.path.resolve() for adapter in adapters]
    for adapter, folder in zip(adapters, folders, strict=True):
        if folders.count(folder) > 1:
            raise adapter.error("given twice; expected each adapter once (what they add is summed)")
    return adapters


def merge(traced: Traced, adapters: Iterable[PeftAdapter]) -> None:
    """Makes every weight that an adapter changes read as the merged one; several add up, in their order.

    Raises GristmillError for tensors that fit no weight of the model, and for weights that cannot be changed
    without changing another as well.
    """
    known: dict[str, list[fx.Node]] = {}
    for node in traced.graph.find_nodes(op="placeholder"):
        lazy = traced.weight(node)
        if lazy is not None and lazy.origin == "checkpoint":
            known.setdefault(lazy.names[0], []).append(node)
    taken: dict[str, tuple[PeftAdapter, bool]] = {}  # changed parameter -> who changed it first, and how
    for adapter in adapters:
        for name, change, alone in _changes(traced, known, adapter):
            first, first_alone = taken.setdefault(name, (adapter, alone))
            if first is not adapter and (alone or first_alone):
                raise adapter.error(
                    f"{name} is changed by {first.path} too, and one of them does not add to it (DoRA, or a "
                    "whole parameter); merge one of the two"
                )
            _apply(traced.weights[known[name][0].name], change)


def record(adapters: Iterable[PeftAdapter]) -> list[dict[str, Any]]:
    """For the manifest: what was merged."""
    return [
        {
            "name": adapter.name,
            "base_model": adapter.base,
            "modules": len(adapter.pairs),
            "parameters": sorted(adapter.replaced),
            "sha256": adapter.hashes(),
        }
        for adapter in adapters
    ]


# the checkpoint's name, what becomes of the weight, whether nothing else may change it
Found = tuple[str, Change, bool]


def _changes(traced: Traced, known: dict[str, list[fx.Node]], adapter: PeftAdapter) -> list[Found]:
    found: list[Found] = []
    for parameter, stored in adapter.replaced.items():
        name = _weight_name(known, adapter, parameter)
        lazy = traced.weights[known[name][0].name]
        _check_shape(adapter, name, lazy, stored)
        values = torch.from_numpy(stored.floats())
        if len(known[name]) == 1 and len(known[name][0].users) > 1 and torch.equal(lazy.load(), values):
            continue  # a tied weight, which PEFT saves as it is beside an adapter of the embedding
        _only(traced, known, adapter, name)
        found.append((name, _Replace(stored), True))
    for module, pair in adapter.pairs.items():
        name = _weight_name(known, adapter, f"{module}.weight")
        node = _only(traced, known, adapter, name)
        if any(is_op(user, *TABLES) for user in node.users) != pair.embedding:
            kind = "an embedding" if pair.embedding else "a linear"
            raise adapter.error(f"its tensors of {module} are those of {kind}, which {module} is not")
        turned = pair.embedding or any(is_op(user, *TURNED) for user in node.users)
        _check_shapes(adapter, pair, traced.weights[node.name].shape, turned)
        found.append((name, _Merge(adapter, pair, turned), pair.magnitude is not None))
        if pair.bias is not None:
            bias = _weight_name(known, adapter, f"{module}.bias")
            _check_shape(adapter, bias, traced.weights[known[bias][0].name], pair.bias)
            found.append((bias, _Add(pair.bias, pair.scale), False))
    return found


class _Merge:
    """W -> W + scale B A in the stored orientation; turned: W is [K, N]."""

    def __init__(self, adapter: PeftAdapter, pair: Pair, turned: bool) -> None:
        self.adapter, self.pair, self.turned = adapter, pair, turned

    def __call__(self, w: Tensor) -> Tensor:
        pair = self.pair
        a, b = (torch.from_numpy(stored.floats()) for stored in (pair.a, pair.b))
        for matrix in (a, b):
            refuse_not_finite(self.adapter, pair.module, matrix.numpy())
        w = w.t() if self.turned else w
        merged = w + (b @ a) * pair.scale
        if pair.magnitude is not None:
            m = torch.from_numpy(pair.magnitude.floats()).reshape(-1)
            merged = (m / torch.linalg.norm(merged, dim=1))[:, None] * merged
        return merged.t().contiguous() if self.turned else merged


class _Add:
    """b -> b + scale * what the adapter brings."""

    def __init__(self, stored: Stored, scale: float) -> None:
        self.stored, self.scale = stored, scale

    def __call__(self, b: Tensor) -> Tensor:
        return b + self.scale * torch.from_numpy(self.stored.floats())


class _Replace:
    """The parameter that the adapter brings."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def __call__(self, _: Tensor) -> Tensor:
        return torch.from_numpy(self.stored.floats())


def _apply(lazy: Lazy, change: Change) -> None:
    before = lazy.load
    lazy.load, lazy.quantized = lambda: change(before()), None


def _weight_name(known: dict[str, list[fx.Node]], adapter: PeftAdapter, name: str) -> str:
    """What the checkpoint calls a parameter that the adapter names."""
    found = find_name(name, known)
    if found is None:
        kinds = sorted({k.removesuffix(".weight").rpartition(".")[2] for k in known if k.endswith(".weight")})
        raise adapter.error(
            f"the model has no {name}, or not as a weight of its own; its modules are {', '.join(kinds)}"
        )
    return found


def _only(traced: Traced, known: dict[str, list[fx.Node]], adapter: PeftAdapter, name: str) -> fx.Node:
    """The placeholder of a weight that one place uses."""
    nodes = known[name]
    if len(nodes) > 1 or len(nodes[0].users) > 1:
        raise adapter.error(
            f"{name} is used at several places of the model (tied embedding and head, say), and the adapter "
            'changes one of them; untie the model ("tie_word_embeddings": false, the tensor stored twice)'
        )
    return nodes[0]


def _check_shapes(adapter: PeftAdapter, pair: Pair, shape: tuple[int, ...], turned: bool) -> None:
    n, k = reversed(shape) if turned else shape
    kind = "lora_embedding_" if pair.embedding else "lora_"
    if pair.a.shape[1] != k:
        raise adapter.wrong_shape(pair.module, f"{kind}A", pair.a.shape, f"[{pair.rank}, {k}]")
    if pair.b.shape[0] != n:
        raise adapter.wrong_shape(pair.module, f"{kind}B", pair.b.shape, f"[{n}, {pair.rank}]")
    if pair.magnitude is None:
        return
    if pair.embedding:
        raise adapter.error(f"{pair.module}: DoRA of an embedding is not supported; merge it with PEFT")
    if n not in pair.magnitude.shape or len(pair.magnitude.bits.reshape(-1)) != n:
        raise adapter.wrong_shape(pair.module, "lora_magnitude_vector", pair.magnitude.shape, f"[{n}]")


def _check_shape(adapter: PeftAdapter, name: str, lazy: Lazy, stored: Stored) -> None:
    if stored.shape != lazy.shape:
        raise adapter.wrong_shape(name, "the whole parameter", stored.shape, str(list(lazy.shape)))
