"""Which checkpoint tensor a model's parameter is read from.

transformers knows older spellings of parameter names and adds or drops the base model's prefix while loading;
the same rules are applied here to names alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..runtime.errors import GristmillError

NO_EXPERTS = "mixture-of-experts models are not supported; see the README for the families that compile"


def parameter_sources(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Parameter (or buffer) name → checkpoint name, for every parameter that the checkpoint has."""
    known = set(model.state_dict(keep_vars=True))
    sources: dict[str, str] = {}
    renamings = _renamings(model)
    for name in stored:
        found = _find(name, known, renamings, model.base_model_prefix)
        if found is not None:
            sources.setdefault(found, name)
    return sources


def require(sources: dict[str, str], names: tuple[str, ...]) -> str:
    """The checkpoint name of a parameter given all its (tied) names.

    Raises GristmillError when there is none.
    """
    for name in names:
        if name in sources:
            return sources[name]
    if ".experts." in names[0]:
        raise GristmillError(NO_EXPERTS)
    raise GristmillError(
        f"the checkpoint has no tensor {names[0]!r}; is a shard missing? download the model again"
    )


def _renamings(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]


def _find(name: str, known: set[str], renamings: list[Any], prefix: str) -> str | None:
    renamed = name
    for renaming in renamings:
        renamed = renaming.rename_source_key(renamed)[0]
    for candidate in (renamed, name):
        for spelled in (candidate, f"{prefix}.{candidate}", candidate.removeprefix(f"{prefix}.")):
            if spelled in known:
                return spelled
    return None
