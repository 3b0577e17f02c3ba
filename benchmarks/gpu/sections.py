"""What is measured, a function for each section, in the order in which it is wanted most."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from random_artifact import RandomModel

from gpu import numerics, paper
from gpu.adapter import Decoder, Ids, Launches, LongAttention, launches_by_kind, random_ids
from gpu.bench import BENCHMARKS, Bench, options_of
from gpu.results import ATTENTION, BATCH, FASTER, FIRST, PEER, SHARE, TOKENS
from gpu.roofs import Run
from gristmill.kernels.triton.handover import VARIABLE as HANDOVER
from gristmill.kernels.triton.overlap import VARIABLE as OVERLAP
from gristmill.kernels.triton.overlap import options
from gristmill.report.attained import REACHED
from gristmill.report.peers.peer_process import Peer
from gristmill.runtime.profile import Forward, work

FIRST_TOKEN_FORMATS = ("bf16", "int4")
BATCH_FORMAT = "int4"
PEER_FORMAT = "bf16"
LONG_CACHES = ("f16", "int8", "fp8", "int4")
PEER_RESERVE = 45.0  # seconds that the section needs beside the peer's compilation


def check_numbers(bench: Bench) -> None:
    """Every format, a layer of the shape's own widths, against transformers in f32."""
    sizes = bench.sizes
    config = {**bench.config, "num_hidden_layers": 1, "vocab_size": sizes.check_vocabulary}
    model = RandomModel("one-layer", {**config, "bos_token_id": 0, "eos_token_id": 1})
    with tempfile.TemporaryDirectory() as folder:
        for name in bench.formats:
            found = numerics.errors(
                model, options_of(name), Path(folder), sizes.check_prompt, sizes.check_steps, bench.device
            )  # fmt: skip
            rows_of = f"{sizes.check_prompt} rows", "one row"
            for rows, error, limit in zip(rows_of, found, numerics.limits(name)):
                bench.results.add(
                    "numerics", name, f"error of {rows} against f32", error, "of the largest logit",
                    f"at most {limit:g}", passed=error <= limit,
                )  # fmt: skip


def measure_format(bench: Bench, name: str) -> None:
    """Decoding and what belongs to it: the batch, the first token, the time of every kind of instruction."""
    decoder = opened(bench, name)
    decode(bench, decoder, name)
    profile(bench, decoder, name)
    if name == BATCH_FORMAT:
        batch(bench, decoder, name)
    if name in FIRST_TOKEN_FORMATS:
        first_token(bench, decoder, name)


def opened(bench: Bench, name: str) -> Decoder:
    """The format's artifact on the device, with room for a batch where one is measured."""
    path, sizes = bench.artifact(name), bench.sizes
    begin = time.perf_counter()
    slots = sizes.batch if name == BATCH_FORMAT else 1
    rows = sizes.prompt if name in FIRST_TOKEN_FORMATS else sizes.chunk
    decoder = Decoder(path, bench.device, sizes.prompt + sizes.context + 1, slots, rows)
    bench.results.add(name, name, "load, kernels and graphs", time.perf_counter() - begin, "s")
    return decoder


def wall_seconds(run: Run, repeats: int) -> float:
    """Of one run that waits for its results, by the host's clock."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def decode(bench: Bench, decoder: Decoder, name: str) -> None:
    """One sequence: replayed, launched, and stepped as a session does, with the roof in every round."""
    sizes, add = bench.sizes, bench.results.add
    decoder.hold(1, sizes.context)
    check_graph(bench, decoder, name, 1)
    size = paper.bytes_per_token(decoder.program, sizes.context)
    rounds = []
    for _ in range(sizes.rounds):
        roof = bench.roof.sample()
        replayed = bench.clock.seconds(decoder.replay, sizes.replays)
        launched = bench.clock.seconds(decoder.launch, sizes.launches)
        stepped = wall_seconds(decoder.step, sizes.launches)
        rounds.append((roof, replayed, launched, stepped))
    roof, replayed, launched, stepped = (median(column) for column in zip(*rounds))
    share = median(size / seconds / roof for roof, seconds, _, _ in rounds)
    how = "from a graph" if decoder.has_graph else "launched: no graph here"
    add(name, name, TOKENS, 1 / replayed, "tok/s", how)
    add(name, name, SHARE, share, "", f"{size / 1e6:.0f} MB a token, roof {roof / 1e9:.0f} GB/s")
    add(name, name, "decode, bytes read", size / replayed / 1e9, "GB/s")
    add(name, name, "decode, one token", 1e6 * replayed, "us", f"floor {1e6 * size / roof:.0f} us")
    add(name, name, "decode, launched eagerly", 1 / launched, "tok/s")
    add(name, name, "decode, graph times eager", launched / replayed, "")
    add(name, name, "decode, with ids in and logits out", 1 / stepped, "tok/s", "host's clock")
    predicted(bench, decoder, name)


def predicted(bench: Bench, decoder: Decoder, name: str) -> None:
    """Beside what was measured: what paper said, with the kernels that each kind of instruction launches."""
    by_kind = launches_by_kind(decoder.steps())
    operations = sum(launches.operations for launches in by_kind.values())
    note = f"{operations} of torch's" if operations else ""
    count = sum(launches.count for launches in by_kind.values())
    bench.results.add(name, name, "kernels per token", count, "", note)
    device = bench.paper_device
    counts = {kind: launches.count for kind, launches in by_kind.items()}
    costs = paper.costs(decoder.program, bench.sizes.context, counts)
    p = paper.predict(name, costs, device)
    note = f"{p.share:.0%} of {REACHED:.0%} of the data sheet of {device.name}"
    bench.results.add(name, name, "decode, predicted on paper", 1 / p.seconds, "tok/s", note)
    if bench.clock.on_gpu:
        occupancy(bench, by_kind, name)


def occupancy(bench: Bench, by_kind: dict[str, Launches], name: str) -> None:
    """Of the kernels that ran, the last of each name and kind, from what the driver says of them."""
    device = bench.paper_device
    for kind, launches in by_kind.items():
        for kernel, grid, loaded in {name: (name, *rest) for name, *rest in launches.kernels}.values():
            k = paper.Compiled(
                kind, kernel, grid, loaded.metadata.num_warps, loaded.metadata.shared, loaded.n_regs,
                4 * loaded.n_spills,
            )  # fmt: skip
            note = f"{k.registers} registers, {k.shared_bytes} B shared, {k.spill_bytes} B spilled"
            note += f", {k.waves(device):.1f} waves"
            bench.results.add("occupancy", name, f"{kind}: {kernel}", k.occupancy(device), "", note)


def check_graph(bench: Bench, decoder: Decoder, name: str, rows: int) -> None:
    """Replayed and launched steps have the same logits bit for bit, and these are numbers."""
    found = []
    for run in (decoder.replay, decoder.launch):
        decoder.forget()
        run()
        found.append(decoder.logits())
    differing = int((found[0] != found[1]).sum())  # NaN differs from itself
    same = differing == 0 and bool(found[0].isfinite().all())
    what = "graph equals eager bit for bit" if decoder.has_graph else "twice launched, equal bit for bit"
    bench.results.add(name, name, f"{what}, {rows} rows", differing, "logits differ", passed=same)


def batch(bench: Bench, decoder: Decoder, name: str) -> None:
    """Tokens per second of all sequences, as a multiple of one sequence's in the same rounds."""
    sizes = bench.sizes
    decoder.hold(sizes.batch, sizes.context)
    check_graph(bench, decoder, name, sizes.batch)
    rounds = []
    for _ in range(sizes.rounds):
        decoder.use(1)
        alone = bench.clock.seconds(decoder.replay, sizes.replays)
        decoder.use(sizes.batch)
        rounds.append((alone, bench.clock.seconds(decoder.replay, sizes.replays)))
    together = median(b for _, b in rounds)
    bench.results.add(name, name, f"batch of {sizes.batch}", sizes.batch / together, "tok/s")
    times = median(sizes.batch * a / b for a, b in rounds)
    bench.results.add(name, name, BATCH, times, "", f"{1e6 * together:.0f} us a step")


def first_token(bench: Bench, decoder: Decoder, name: str) -> None:
    """A prompt in one forward and in chunks, until its logits are on the host."""
    sizes, add = bench.sizes, bench.results.add
    ids = random_ids(sizes.prompt, decoder.executor.vocabulary)
    needed, roof = paper.operations(decoder.program, sizes.prompt), bench.matmul
    for chunk in (sizes.prompt, sizes.chunk):
        seconds, how = prompt_seconds(bench, decoder, name, ids, chunk)
        share, note = needed / seconds / roof, f"{sizes.prompt / seconds:.0f} tok/s, {how}"
        add(name, name, f"first token, {prompt_label(bench, chunk)}", 1e3 * seconds, "ms", note)
        measure = FIRST if chunk == sizes.prompt else f"{FIRST}, forwards of {chunk}"
        add(name, name, measure, share, "", f"{needed / seconds / 1e12:.0f} TFLOP/s")


def prompt_label(bench: Bench, chunk: int) -> str:
    return f"{bench.sizes.prompt} tokens in forwards of {chunk}"


def prompt_seconds(bench: Bench, decoder: Decoder, name: str, ids: Ids, chunk: int) -> tuple[float, str]:
    """Of a prompt as a session runs it, and how that is: on a GPU from graphs, beside which it is launched;
    both have the same logits."""
    with decoder.launching():
        launched, expected = timed_prompt(bench, decoder, ids, chunk)
    if not bench.clock.on_gpu:
        return launched, "launched: no graph here"
    decoder.take_in(ids, chunk)  # the second one captures
    replayed, found = timed_prompt(bench, decoder, ids, chunk)
    where, add, differing = prompt_label(bench, chunk), bench.results.add, int((found != expected).sum())
    passed = decoder.has_prompt_graph(chunk) and differing == 0 and bool(np.isfinite(found).all())
    add(name, name, f"graph equals eager, {where}", differing, "logits differ", passed=passed)
    add(name, name, f"first token launched eagerly, {where}", 1e3 * launched, "ms")
    return replayed, "from graphs"


def timed_prompt(bench: Bench, decoder: Decoder, ids: Ids, chunk: int) -> tuple[float, NDArray[np.float32]]:
    """Seconds of one, after another to warm up, and its logits."""
    logits = decoder.take_in(ids, chunk)
    run = partial(decoder.take_in, ids, chunk)
    return median(wall_seconds(run, 1) for _ in range(bench.sizes.prompts)), logits


def profile(bench: Bench, decoder: Decoder, name: str) -> None:
    """Microseconds of every kind of instruction of a decoded row, one after the other on the device."""
    sizes, roof = bench.sizes, bench.roof.sample()
    decoder.use(1)
    steps = decoder.steps()
    rounds = [bench.clock.each([step.run for step in steps]) for _ in range(max(1, sizes.rounds // 2))]
    times = [median(column) for column in zip(*rounds)]
    kinds: dict[str, tuple[int, float, int]] = {}
    for step, seconds in zip(steps, times):
        count, total, size = kinds.get(step.kind, (0, 0.0, 0))
        if step.instruction is not None:
            size += work(decoder.program, step.instruction, Forward(1, sizes.context))[0]
        kinds[step.kind] = (count + 1, total + seconds, size)
    whole = sum(times)
    for kind, (count, total, size) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        note = f"{count} times, {total / whole:.1%} of all, {size / total / roof:.0%} of the roof"
        bench.results.add("profile", name, kind, 1e6 * total, "us", note)
    bench.results.add("profile", name, "sum", 1e6 * whole, "us", "with the time of an event for each")


def attention(bench: Bench, names: tuple[str, ...] = LONG_CACHES) -> None:
    """Attention of one row at a long context, for each type of cache in every round."""
    sizes, config = bench.sizes, bench.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim", config["hidden_size"] // heads)
    made, runs = {}, {}
    for name in names:
        made[name] = LongAttention.make(
            name, heads, kv_heads, dim, sizes.long_context, sizes.long_layers, bench.device
        )
        runs[name] = bench.clock.graphed(made[name].launcher(made[name].tilings(bench.processors)[0]))
    rounds = []
    for _ in range(sizes.rounds):
        roof = bench.roof.sample()
        times = {n: bench.clock.seconds(r, sizes.replays) / sizes.long_layers for n, r in runs.items()}
        rounds.append((roof, times))
    for name, layer in made.items():
        seconds = median(times[name] for _, times in rounds)
        share = median(layer.bytes / times[name] / roof for roof, times in rounds)
        where = f"{layer.bytes / 1e6:.0f} MB a layer"
        kind, add = f"{name} KV", bench.results.add
        add("attention", kind, f"attention at {sizes.long_context}", 1e6 * seconds, "us", where)
        add("attention", kind, ATTENTION, share, "")
        if name != "f16":
            faster = median(times["f16"] / times[name] for _, times in rounds)
            add("attention", kind, FASTER, faster, "")
    for name, layer in made.items():
        other_tilings(bench, f"{name} KV", layer)


def other_tilings(bench: Bench, kind: str, layer: LongAttention) -> None:
    """All tilings of a long context in turns, and how far off the last one, of shared tiles."""
    found = layer.tilings(bench.processors)
    if len(found) == 1:
        return
    runs, results = [bench.clock.graphed(layer.launcher(tiles)) for tiles in found], []
    for run in runs:
        run()
        results.append(layer.out.double())
    rounds = [
        [bench.clock.seconds(run, bench.sizes.replays) for run in runs]
        for _ in range(max(1, bench.sizes.rounds // 2))
    ]
    for tiles, result, *seconds in zip(found, results, *rounds):
        off = float((result - results[-1]).abs().max() / results[-1].abs().max())
        shape = f"tiles of {tiles.columns}, {tiles.warps} warps, {tiles.splits} splits"
        if tiles.parts:
            shape = f"by warps, {shape}, {tiles.resident} programs, {tiles.ahead} ahead"
        bench.results.add(
            "attention", kind, shape, 1e6 * median(seconds) / bench.sizes.long_layers, "us",
            f"{off:.1e} of the largest number off", passed=off < 0.02,
        )  # fmt: skip


def torch_compile(bench: Bench) -> None:
    """transformers' model under torch.compile and ours, in turns."""
    sizes = bench.sizes
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(bench.config))
        command = [
            sys.executable, str(BENCHMARKS / "torch_compile_peer.py"), str(config), "--device",
            bench.device.type, "--context", str(sizes.context), "--tokens", str(sizes.peer_tokens),
            *sizes.peer_options,
        ]  # fmt: skip
        if shutil.which("timeout"):
            command = ["timeout", str(max(1, int(bench.left - PEER_RESERVE))), *command]
        peer = Peer(command)
    try:
        version, seconds = peer.about["version"], peer.about["seconds"]
        bench.results.add("peer", PEER_FORMAT, "compilation", seconds, "s", version)
        decoder = opened(bench, PEER_FORMAT)
        decoder.hold(1, sizes.context)
        rounds = []
        for _ in range(max(1, sizes.rounds // 2)):
            theirs = peer.measure(0, sizes.context, sizes.peer_tokens)["decode_tok_s"]
            replayed = bench.clock.seconds(decoder.replay, sizes.replays)
            rounds.append((theirs, 1 / replayed, 1 / wall_seconds(decoder.step, sizes.launches)))
    finally:
        peer.close()
    theirs, ours, stepped = (median(column) for column in zip(*rounds))
    bench.results.add("peer", PEER_FORMAT, "decode by torch.compile", theirs, "tok/s", version)
    times = median(b / a for a, b, _ in rounds)
    bench.results.add("peer", PEER_FORMAT, PEER, times, "", f"ours {ours:.1f} tok/s in the same rounds")
    times, note = median(c / a for a, _, c in rounds), f"ours {stepped:.1f} tok/s by the host's clock"
    bench.results.add("peer", PEER_FORMAT, f"{PEER}, with ids in and logits out", times, "", note)


VARIANTS = {
    f"without handover ({HANDOVER}=0)": {HANDOVER: "0"},
    f"overlapped ({OVERLAP}=1)": {OVERLAP: "1"},
}


def variants(bench: Bench, name: str = "int4") -> None:
    """Decoding with what can be switched, in turns with the default."""
    sizes = bench.sizes
    decoders = {"": opened(bench, name)}
    for variant, switched in VARIANTS.items():
        before = {variable: os.environ.get(variable) for variable in switched}
        os.environ.update(switched)
        options.cache_clear()
        try:
            decoders[variant] = opened(bench, name)
        finally:
            for variable, value in before.items():
                os.environ.pop(variable) if value is None else os.environ.update({variable: value})
            options.cache_clear()
    for decoder in decoders.values():
        decoder.hold(1, sizes.context)
    rounds = []
    for _ in range(sizes.rounds):
        seconds = {v: bench.clock.seconds(d.replay, sizes.replays) for v, d in decoders.items()}
        rounds.append(seconds)
    for variant in VARIANTS:
        found = 1 / median(seconds[variant] for seconds in rounds)
        bench.results.add("variants", name, f"decode, {variant}", found, "tok/s")
        times = median(seconds[""] / seconds[variant] for seconds in rounds)
        bench.results.add("variants", name, f"decode, {variant}, times the default", times, "")


# name -> what it does, seconds that it takes at least on an H200
SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "numerics": (check_numbers, 30),
    "int4": (lambda bench: measure_format(bench, "int4"), 40),
    "bf16": (lambda bench: measure_format(bench, "bf16"), 30),
    "int8": (lambda bench: measure_format(bench, "int8"), 20),
    "fp8": (lambda bench: measure_format(bench, "fp8"), 20),
    "attention": (attention, 45),
    "variants": (variants, 40),
    "peer": (torch_compile, 120),
}
