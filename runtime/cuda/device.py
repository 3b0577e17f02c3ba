"""Whether there is a GPU that will do, and whether a program fits into its memory."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from gristmill.kernels.triton.cache import layer_bytes
from gristmill.kernels.triton.linear import plan, workspace_bytes
from gristmill.kernels.triton.matrix import BITS, WORDS, merge, meta_matrix
from gristmill.runtime.cuda.buffers import LOGIT_ROWS
from gristmill.runtime.cuda.drawing import drawing_bytes
from gristmill.runtime.cuda.graphs import MOST_CACHED
from gristmill.runtime.cuda.residuals import added_in_place
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.footprint import kv_rows
from gristmill.runtime.program import LOGITS, Program, Segment

CAPABILITY = (8, 0)  # Ampere: the first with bf16 on tensor cores
FP8_CAPABILITY = (8, 9)  # Ada: the first that converts e4m3 numbers
RESERVE_BYTES = 512 << 20  # for kernels, cuBLAS and what attention keeps in between
MOST_CAPTURED = 256  # rows of a graph that is captured at load
GRAPH_NODE_BYTES = 16 << 10  # of a kernel in a graph: its parameters and the driver's own; not measured
DRAWING_LAUNCHES = 21  # of both ways to draw


def open_device(index: int | None = None) -> torch.device:
    """The current CUDA device, or that of a number. Raises GristmillError where there is none that can run
    the kernels."""
    if not torch.cuda.is_available():
        raise GristmillError(
            "device 'cuda': torch finds no CUDA device, expected an NVIDIA GPU, its driver and a torch built "
            "for CUDA; load with device 'cpu'"
        )
    if index is not None and index >= torch.cuda.device_count():
        raise GristmillError(
            f"device 'cuda': each rank of tensor_parallel needs a GPU of its own, {index + 1} or more, and "
            f"torch finds {torch.cuda.device_count()}; load with a smaller tensor_parallel, or on the CPU"
        )
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise GristmillError(
            f"device 'cuda' ({torch.cuda.get_device_name(device)}) has compute capability "
            f"{found[0]}.{found[1]}, expected {CAPABILITY[0]}.{CAPABILITY[1]} or more; load with device 'cpu'"
        )
    return device


def refuse_fp8(program: Program, device: torch.device) -> None:
    """Raises GristmillError where the program has weights or caches that the device cannot read."""
    caches = {dtype for cache in program.caches for dtype in (cache.k_dtype, cache.v_dtype)}
    weights = {segment.format for segments in program.weights.values() for segment in segments}
    what = [name for name, formats in (("weights", weights), ("a KV cache", caches)) if "fp8" in formats]
    if what and (found := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        raise GristmillError(
            f"device 'cuda' ({torch.cuda.get_device_name(device)}) has compute capability "
            f"{found[0]}.{found[1]}, and fp8 needs {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or more; this "
            f"artifact has {' and '.join(what)} in fp8: compile with int8, or load with device 'cpu'"
        )


def current(device: torch.device) -> AbstractContextManager[object]:
    """The device is current in the calling thread, whichever that is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def kv_bytes(program: Program, max_len: int, slots: int) -> int:
    """Bytes of the caches of ``slots`` slots."""
    return sum(
        layer_bytes(
            c.k_dtype, c.v_dtype, c.k_dim, c.v_dim, c.kv_heads, slots,
            kv_rows(c, max_len, program.limits.max_tokens),
        )
        for c in program.caches
    )  # fmt: skip


def captured_rows(max_slots: int, max_tokens: int) -> int:
    """Rows of the largest batch of one row per slot that is captured as a graph."""
    return min(max_tokens, MOST_CAPTURED, 1 << (max_slots - 1).bit_length())


def few_rows(max_slots: int, max_tokens: int) -> int:
    """Rows whose logits, and the draws from them, are computed at once: those of a graph, 64 at least."""
    return min(max_tokens, max(LOGIT_ROWS, captured_rows(max_slots, max_tokens)))


def graph_bytes(program: Program, max_slots: int) -> int:
    """What the driver keeps for all graphs, those of load and as many as may come later, by an estimate that
    is to be on the safe side."""
    graphs = captured_rows(max_slots, program.limits.max_tokens).bit_length() + 1 + MOST_CACHED
    kernels = 3 * len(program.instructions) + len(program.ropes) + DRAWING_LAUNCHES
    return graphs * kernels * GRAPH_NODE_BYTES


def buckets(max_tokens: int) -> list[int]:
    """Numbers of rows that are run: powers of two, and max_tokens."""
    powers = [1 << n for n in range(max_tokens.bit_length()) if 1 << n < max_tokens]
    return [*powers, max_tokens]


def product_bytes(program: Program, logit_rows: int) -> int:
    """What products keep in between: dequantized weights, partial sums and rounded activations of the largest
    one, by the plans of the table, and the room for activations that are rounded before; at most, for where
    those are and where sums go straight into the result, a product does without the one or the other.
    logit_rows: of which the logits are computed at once.
    """
    shapes = set()
    for i in program.instructions:
        if i.op == "linear" and i.weight is not None:
            segments = program.weights[i.weight]
            act_group = i.attribute("act_group")
            forms = tuple(_form(segment, act_group) for segment in segments)
            most = logit_rows if i.out.value == LOGITS else program.limits.max_tokens
            shapes.add((forms, most, i.attribute("glu"), act_group, "order" in i.vectors))
    size = rounded = 0
    for forms, most, glu, act_group, order in shapes:
        matrices = merge([meta_matrix(*form) for form in forms])
        for rows in buckets(most):
            planned = plan(matrices, rows, glu, act_group=act_group)
            size = max(size, workspace_bytes(matrices, planned, order, torch.float32))
            if all(config.dense for config in planned.configs):
                rounded = max(rounded, rows * matrices[0].k * planned.multiply.itemsize)
    return size + rounded


def _form(segment: Segment, act_group: int) -> tuple[str, int, int, int, bool]:
    """What a plan depends on. Raises GristmillError for what no compiler writes."""
    sizes = (segment.n, segment.k, segment.group)
    known = segment.format in (WORDS if act_group else BITS)
    if not known or any(type(size) is not int for size in sizes) or min(sizes[:2]) < 1 or segment.group < 0:
        beside = f" beside int8 activations in groups of {act_group}" if act_group else ""
        raise GristmillError(
            f"program.json: {segment.name} is {segment.format} {segment.n}x{segment.k} in groups of "
            f"{segment.group}{beside}, which no product takes; compile the model again"
        )
    return segment.format, segment.n, segment.k, segment.group, segment.symmetric


def needed_bytes(program: Program, max_len: int, max_slots: int, weight_bytes: int) -> int:
    """Bytes on the device that an executor takes: weights, caches, values, logits, draws, graphs, what
    products keep in between, and a reserve.

    One slot more than max_slots is counted, which takes the rows that fill up a bucket.
    """
    rows = few_rows(max_slots, program.limits.max_tokens)
    return (
        weight_bytes
        + added_in_place(program).arena_bytes
        + 4 * rows * program.vocabulary
        + drawing_bytes(rows, program.vocabulary, max_len, max_slots)
        + graph_bytes(program, max_slots)
        + product_bytes(program, rows)
        + kv_bytes(program, max_len, max_slots + 1)
        + RESERVE_BYTES
    )


def refuse_too_large(program: Program, max_len: int, max_slots: int, weight_bytes: int, free: int) -> None:
    """Raises GristmillError where an executor needs more than ``free`` bytes."""
    needed = needed_bytes(program, max_len, max_slots, weight_bytes)
    if needed <= free:
        return
    said = f"device 'cuda': needed {_gib(needed)} GiB with {max_slots} slots of {max_len}, free {_gib(free)}"

    def fits(length: int, slots: int) -> bool:
        return needed_bytes(program, length, slots, weight_bytes) <= free

    most = {
        "max_len": _most(max_len, lambda n: fits(n, max_slots)),
        "max_slots": _most(max_slots, lambda n: fits(max_len, n)),
    }
    fitting = [f"{name}={count}" for name, count in most.items() if count]
    if fitting:
        raise GristmillError(f"{said}; load with {' or '.join(fitting)}, which fits")
    raise GristmillError(f"{said}, and no max_len or max_slots alone fits; use a GPU with more memory")


@contextmanager
def refuse_out_of_memory(device: torch.device, doing: str, remedy: str) -> Iterator[None]:
    """Turns the device's running out of memory into a GristmillError: what was asked for, what is free."""
    try:
        yield
        return
    except RuntimeError as error:  # torch's own error is one, and the driver's comes as a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        traceback.clear_frames(error.__traceback__)  # they keep what was half made
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    needed = f"needed {asked[1]} more" if asked else "needed more than there is"
    raise GristmillError(
        f"device 'cuda' ran out of memory {doing}: {needed}, free {_gib(free)} GiB; {remedy}"
    ) from None


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``limit`` that fits, 0 where none does; what is less than it fits too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
