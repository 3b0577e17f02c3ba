"""The launches of attention that are compiled for sm_90 where minutes do not matter."""

from __future__ import annotations

from triton_attention_launches import more_launches as launches

__all__ = ["launches"]
