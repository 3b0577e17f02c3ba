"""transformers' own Llama, decoding through torch.compile with a static cache: what bench_gpu compares with.

A peer as report/peers has them: random bf16 weights made on the device, one prefill that is not compiled,
then steps of one token that are, by CUDA events on a GPU. Needs torch and transformers, nothing of gristmill.

    python benchmarks/torch_compile_peer.py config.json --mode max-autotune
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from gristmill.report.peers.peer_process import Engine, serve

WARM_UPS = 5  # compiled steps before those that count: tuning, then the recording of a graph


class Compiled:
    """A model of a config with a cache for ``room`` positions, all of which every step attends to."""

    def __init__(self, config: dict[str, Any], device: torch.device, room: int, **options: Any) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

        self.device, self.room = device, room
        made = AutoConfig.for_model(**config)
        with device:
            self.model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
        self.cache = StaticCache(config=self.model.config, max_cache_len=room)
        self.compiled = torch.compile(self.model.__call__, dynamic=False, **options)
        known = inspect.signature(self.model.forward).parameters
        self._takes_positions = "cache_position" in known  # of the cache, in some versions of transformers

    def forward(self, call: Callable[..., Any], ids: Tensor, start: int) -> Tensor:
        """Logits of the last of ids [1, n] at positions from ``start`` on."""
        positions = torch.arange(start, start + ids.shape[1], device=self.device)
        extra = {"cache_position": positions} if self._takes_positions else {}
        out = call(
            input_ids=ids, position_ids=positions[None], past_key_values=self.cache, use_cache=True,
            logits_to_keep=1, **extra,
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits

    def decode_tok_s(self, context: int, tokens: int) -> float:
        assert context + WARM_UPS + tokens <= self.room, f"the cache has {self.room} positions"
        self.cache.reset()
        self.forward(self.model, torch.ones(1, context, dtype=torch.long, device=self.device), 0)
        step = torch.ones(1, 1, dtype=torch.long, device=self.device)
        for at in range(context, context + WARM_UPS):
            logits = self.forward(self.compiled, step, at)
        assert bool(logits.isfinite().all()), "the compiled model's logits are not finite"
        begin = self._now()
        for at in range(context + WARM_UPS, context + WARM_UPS + tokens):
            self.forward(self.compiled, step, at)
        return tokens / self._since(begin)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, begin: Any) -> float:
        if self.device.type != "cuda":
            return time.perf_counter() - float(begin)
        end = self._now()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@click.command(help=__doc__)
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("--device", default="cuda", show_default=True)
@click.option("--mode", help="Of torch.compile, such as max-autotune.")
@click.option("--backend", default="inductor", show_default=True, help="eager: a dry run.")
@click.option("--context", default=128, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="That a measurement decodes.")
def main(config: Path, device: str, mode: str | None, backend: str, context: int, tokens: int) -> None:
    options = {"backend": backend, **({"mode": mode} if mode else {})}
    begin = time.perf_counter()
    with torch.no_grad():
        made = Compiled(
            json.loads(config.read_text()), torch.device(device), context + WARM_UPS + tokens, **options
        )
        made.decode_tok_s(context, tokens)
        version, seconds = f"torch {torch.__version__}, {mode or backend}", time.perf_counter() - begin

        def measure(prompt: int, context: int, tokens: int) -> dict[str, Any]:
            return {"decode_tok_s": made.decode_tok_s(context, tokens)}

        serve(Engine({"version": version, "seconds": seconds}, measure))


if __name__ == "__main__":
    main()
