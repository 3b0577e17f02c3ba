"""What each foreign format can express, and how its config.json says so.

A target checks every layer before anything is written. Weights are never rounded again: what does not fit is
refused with the reason. A scale may be negative here (symmetric int4 uses it to reach -8 on the side that
needs it); all three formats multiply by a signed scale.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from gristmill.export.weights import Layer
from gristmill.quant.formats import awq, compressed_tensors, gptq
from gristmill.runtime.errors import GristmillError

Array = NDArray[Any]
BITS = {"gptq": gptq.BITS, "awq": (awq.BITS,), "compressed-tensors": (4, 8)}
ORDERED = ("gptq", "compressed-tensors")  # what has a column order
Parts = tuple[Array, Array, Array, Array]  # q, scale, zero, g_idx: see Contents.layer


@dataclass(frozen=True)
class Facts:
    """What is known of a layer without its weights: `has_zero_0`: some group's zero point is 0."""

    layer: Layer
    scale_dtype: str
    has_zero_0: bool

    @property
    def bits(self) -> int:
        return self.layer.scheme.numbers.bits

    @property
    def group(self) -> int:
        """Columns per scale, -1 for the row, as these formats write it."""
        return self.layer.segment.group or -1


@dataclass(frozen=True)
class Plan:
    """settings: quantization_config. tensors: the tensors of a layer by suffix."""

    settings: dict[str, Any]
    tensors: Callable[[Facts, Parts], dict[str, Array]]


Planner = Callable[[Sequence[Facts], Sequence[str]], Plan]  # layers, names of linears that stay floats


def plan_gptq(layers: Sequence[Facts], floats: Sequence[str], checkpoint_format: str | None = None) -> Plan:
    """checkpoint_format None: v1, which every server reads, unless a zero point is 0."""
    for facts in layers:
        _refuse(facts, "gptq", BITS["gptq"])
        segment = facts.layer.segment
        if segment.n % 32 or segment.k % 32:
            _fail(facts, "gptq", f"shape [{segment.n}, {segment.k}], which 32 does not divide")
    zero_0 = next((facts for facts in layers if facts.has_zero_0), None)
    chosen = checkpoint_format or ("gptq_v2" if zero_0 else "gptq")
    if chosen == "gptq" and zero_0:
        _fail(zero_0, "gptq (v1)", "a zero point of 0, stored as -1, which readers understand differently; "
              "use gptq_v2")  # fmt: skip
    (bits, group), _ = Counter((f.bits, f.group) for f in layers).most_common(1)[0]
    others = [f for f in layers if (f.bits, f.group) != (bits, group)]
    dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in floats} | {
        f"+:^{re.escape(f.layer.name)}$": {"bits": f.bits, "group_size": f.group} for f in others
    }
    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": chosen,
        "sym": all(f.layer.segment.symmetric for f in layers), "pack_dtype": "int32", "lm_head": False,
        "desc_act": any(f.layer.order for f in layers), **({"dynamic": dynamic} if dynamic else {}),
    }  # fmt: skip
    return Plan(settings, partial(_gptq_tensors, chosen))


def _gptq_tensors(checkpoint_format: str, facts: Facts, parts: Parts) -> dict[str, Array]:
    return gptq.write_weight(gptq.GptqConfig(facts.bits, facts.group, checkpoint_format), *parts)


def plan_awq(layers: Sequence[Facts], floats: Sequence[str]) -> Plan:
    """AutoAWQ's gemm: 4 bits, one group size that divides every layer."""
    for facts in layers:
        _refuse(facts, "awq", BITS["awq"], one_group=layers[0].group)
        segment = facts.layer.segment
        if facts.group < 0 or segment.k % facts.group or segment.n % 8:
            what = f"groups of {facts.group}" if facts.group > 0 else "one scale per row"
            _fail(
                facts, "awq", f"shape [{segment.n}, {segment.k}] with {what}; expected groups that divide it"
            )
        if facts.layer.order or facts.layer.transposed:
            _fail(facts, "awq", "a column order" if facts.layer.order else "a Conv1D in transformers")
    settings = {
        "quant_method": "awq", "version": "gemm", "bits": awq.BITS, "group_size": layers[0].group,
        "zero_point": True, "modules_to_not_convert": list(floats) or None,
    }  # fmt: skip
    return Plan(settings, lambda facts, parts: awq.write_weight(*parts[:3]))


def plan_compressed(layers: Sequence[Facts], floats: Sequence[str]) -> Plan:
    """compressed-tensors pack-quantized: a config group for each way of quantizing."""
    ways: dict[tuple[int, int, bool, bool], list[str]] = {}
    for facts in layers:
        _refuse(facts, "compressed-tensors", BITS["compressed-tensors"], any_scale=True)
        segment = facts.layer.segment
        if facts.group > 0 and segment.k % facts.group:
            _fail(
                facts,
                "compressed-tensors",
                f"{segment.k} columns, which groups of {facts.group} do not divide",
            )
        if facts.layer.transposed:
            _fail(facts, "compressed-tensors", "a Conv1D in transformers")
        way = (facts.bits, facts.group, segment.symmetric, facts.layer.order is not None)
        ways.setdefault(way, []).append(facts.layer.name)
    groups = {
        f"group_{i}": _config_group(way, ["Linear"] if len(ways) == 1 else names)
        for i, (way, names) in enumerate(ways.items())
    }
    settings = {
        "quant_method": "compressed-tensors", "format": compressed_tensors.PACKED,
        "quantization_status": "compressed", "config_groups": groups, "ignore": [*floats],
        "kv_cache_scheme": None,
    }  # fmt: skip
    return Plan(settings, _compressed_tensors)


def _config_group(way: tuple[int, int, bool, bool], targets: list[str]) -> dict[str, Any]:
    bits, group, symmetric, ordered = way
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "observer": "minmax",
        "strategy": "group" if group > 0 else "channel", "group_size": group if group > 0 else None,
        "actorder": "group" if ordered else None,
    }  # fmt: skip
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _compressed_tensors(facts: Facts, parts: Parts) -> dict[str, Array]:
    q, scale, zero, g_idx = parts
    symmetric, ordered = facts.layer.segment.symmetric, facts.layer.order is not None
    return compressed_tensors.write_weight(
        facts.bits, q, scale, None if symmetric else zero, g_idx if ordered else None
    )


def _refuse(
    facts: Facts, target: str, bits: Sequence[int], any_scale: bool = False, one_group: int | None = None
) -> None:
    """What all formats ask for: integers of these bits, f16 scales unless any_scale, one group size."""
    if facts.bits not in bits or not facts.layer.scheme.numbers.integer:
        _fail(
            facts, target, f"format {facts.layer.segment.format}; expected {', '.join(map(str, bits))} bits"
        )
    if facts.scale_dtype != "float16" and not any_scale:
        _fail(facts, target, "scales beyond f16's range")
    if one_group is not None and facts.group != one_group:
        _fail(facts, target, f"groups of {facts.group} beside groups of {one_group}; it has one size for all")


def _fail(facts: Facts, target: str, reason: str) -> None:
    raise GristmillError(f"{facts.layer.name} cannot be written as {target}: it has {reason}")


PLANNERS: dict[str, Planner] = {
    "gptq": plan_gptq,
    "awq": plan_awq,
    "compressed-tensors": plan_compressed,
}
