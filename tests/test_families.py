"""Artifacts of every family against transformers: whole prefill, token by token, chunked, mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VARIANTS, VOCABULARY, save_tiny
from transformers.pytorch_utils import Conv1D

import gristmill
from gristmill.export.program_module import ProgramModule, module_of
from gristmill.quant.scheme import Scheme, parse
from gristmill.quant.tensor import dequantize_tensor, quantize_tensor

TOLERANCE = 1e-4  # of the largest logit, float32 throughout
LENGTHS = (40, 23)

Batch = list[tuple[int, int]]  # rows (sequence, position)


def i32(values: Any) -> np.ndarray:
    return np.asarray(list(values), np.int32)


@pytest.fixture(scope="module", params=[*FAMILIES, *VARIANTS])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path]]:
    """(transformers model, artifact) of one family."""
    family, changes = VARIANTS.get(request.param, (request.param, {}))
    directory = tmp_path_factory.mktemp(request.param)
    model = save_tiny(directory / "model", family, **changes)
    gristmill.compile(directory / "model", directory / "artifact", weights="f32", gate=False, max_tokens=32)
    yield model, directory / "artifact"


@pytest.fixture(scope="module")
def expected(compiled: tuple[Any, Path]) -> list[np.ndarray]:
    """transformers' logits of the two texts. Its longrope looks at a batch's longest position, ours at
    max_len."""
    model, _ = compiled
    with torch.no_grad():
        if _is_longrope(model):
            return [_long(model, ids) for ids in texts()]
        return [model(input_ids=torch.tensor(ids)[None].long()).logits[0].numpy() for ids in texts()]


def _is_longrope(model: Any) -> bool:
    return (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "longrope"


def _long(model: Any, ids: np.ndarray) -> np.ndarray:
    """The logits of a text inside a longer one, where transformers takes the long set."""
    longer = np.concatenate([ids, np.resize(ids, 100)])
    return model(input_ids=torch.tensor(longer)[None].long()).logits[0, : len(ids)].numpy()


def texts() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(2, VOCABULARY, n) for n in LENGTHS]


def whole() -> list[Batch]:
    return [[(0, p) for p in range(32)], [(0, p) for p in range(32, 40)], [(1, p) for p in range(23)]]


def one_by_one() -> list[Batch]:
    return [[(s, p)] for s in (0, 1) for p in range(LENGTHS[s])]


def chunked() -> list[Batch]:
    cuts = [0, 1, 12, 29, 40]
    return [[(0, p) for p in range(a, b)] for a, b in zip(cuts, cuts[1:])] + [
        [(1, p) for p in range(5 * i, min(5 * i + 5, 23))] for i in range(5)
    ]


def mixed() -> list[Batch]:
    """Both sequences in every batch, at different lengths, first as chunks and then as joint decode steps."""
    batches = [
        [(0, p) for p in range(17)] + [(1, p) for p in range(4)],
        [(1, p) for p in range(4, 20)] + [(0, p) for p in range(17, 30)],
    ]
    batches += [[(1, 20 + i), (0, 30 + i)] for i in range(3)]
    return batches + [[(0, 33 + i)] for i in range(7)]


def run(session: Any, batches: list[Batch]) -> list[np.ndarray]:
    """The logits of both sequences, row by row, in slots 2 and 0."""
    slots = {0: 2, 1: 0}
    out = [np.zeros((n, session.vocabulary), np.float32) for n in LENGTHS]
    ids = texts()
    for batch in batches:
        logits = session.forward(
            i32(ids[s][p] for s, p in batch),
            i32(p for _, p in batch),
            i32(slots[s] for s, _ in batch),
            i32(range(len(batch))),
        )
        for row, (s, p) in enumerate(batch):
            out[s][p] = logits[row]
    return out


@pytest.mark.parametrize("plan", [whole, one_by_one, chunked, mixed], ids=lambda f: f.__name__)
def test_logits_equal_transformers(
    compiled: tuple[Any, Path], expected: list[np.ndarray], plan: Callable[[], list[Batch]]
) -> None:
    session = gristmill.load(compiled[1], threads=2, max_slots=3)
    for got, want in zip(run(session, plan()), expected):
        difference = np.abs(got - want).max() / np.abs(want).max()
        assert difference < TOLERANCE, (
            f"largest difference {difference:.2e} at row {np.abs(got - want).max(1).argmax()}"
        )


def test_hidden_states_equal_transformers(compiled: tuple[Any, Path]) -> None:
    """After the last norm, as `output_hidden_states` has them: whole, and row by row in another slot."""
    model, artifact = compiled
    session = gristmill.load(artifact, threads=1, max_slots=3)
    ids = texts()[1]
    longer = np.concatenate([ids, np.resize(ids, 100)]) if _is_longrope(model) else ids
    with torch.no_grad():
        states = model(torch.tensor(longer)[None].long(), output_hidden_states=True).hidden_states
    want = states[-1][0, : len(ids)].numpy()
    logits, whole = session.forward_hidden(ids, range(len(ids)), [0] * len(ids))
    assert whole.shape == (len(ids), model.config.hidden_size)
    assert np.abs(whole - want).max() < TOLERANCE * np.abs(want).max()
    rows = [session.forward_hidden([token], [n], [1]) for n, token in enumerate(ids)]
    np.testing.assert_array_equal(np.concatenate([row[0] for row in rows]), logits)
    np.testing.assert_array_equal(np.concatenate([row[1] for row in rows]), whole)


def test_the_torch_module_agrees(compiled: tuple[Any, Path]) -> None:
    """Chunks and single steps over its own caches."""
    session, model = gristmill.load(compiled[1], threads=2, max_slots=3), module_of(compiled[1])
    for got, want in zip(run(ModuleSession(model), chunked()), run(session, whole())):
        assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


class ModuleSession:
    """`forward` over the module, whose rows are of one slot, as all batches of `chunked` are."""

    def __init__(self, model: ProgramModule) -> None:
        self.model, self.vocabulary = model, model.program.vocabulary
        self.caches: dict[int, list[torch.Tensor]] = {}

    def forward(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> Any:
        caches = self.caches.setdefault(int(slots[0]), self.model.empty_caches(64))
        with torch.inference_mode():
            ids = (torch.from_numpy(array.astype(np.int64)) for array in (tokens, positions, rows))
            return self.model(*ids, caches).numpy()


@pytest.mark.parametrize("plain", [False, True], ids=["runtime", "plain"])
def test_exports_to_onnx_agree(compiled: tuple[Any, Path], plain: bool, tmp_path: Path) -> None:
    out = gristmill.export_checkpoint(compiled[1], tmp_path / "o", "onnx", plain=plain)
    session = gristmill.load(compiled[1], threads=2, max_slots=3)
    theirs = gristmill.load(out, device="onnx:cpu", threads=1, max_slots=3)
    for got, want in zip(run(theirs, mixed()), run(session, mixed())):
        assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def test_bits_do_not_depend_on_batches_or_threads(compiled: tuple[Any, Path]) -> None:
    one = gristmill.load(compiled[1], threads=1, max_slots=3)
    two = gristmill.load(compiled[1], threads=2, max_slots=3)
    first = run(one, whole())
    for other in (run(two, one_by_one()), run(one, chunked()), run(two, mixed())):
        for a, b in zip(first, other):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("weights", ["int8", "int4", "int3", "int2", "fp8"])
def test_quantized_bits_do_not_depend_on_batches_or_threads(weights: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "mistral", hidden_size=288)  # wide enough for int8 activations
    gristmill.compile(
        tmp_path / "model",
        tmp_path / "a",
        weights=weights,
        group_size=32,
        kv="int8",
        gate=False,
        max_tokens=32,
    )
    one = gristmill.load(tmp_path / "a", threads=1, max_slots=3)
    two = gristmill.load(tmp_path / "a", threads=2, max_slots=3)
    first = run(one, whole())
    for other in (run(two, one_by_one()), run(one, chunked()), run(two, mixed())):
        for a, b in zip(first, other):
            np.testing.assert_array_equal(a, b)


NARROW = {"gpt2": {"n_inner": 160}}  # a linear of 256 columns would have int8 activations
STORED = [
    *((family, "int3-g32-asym") for family in ("gemma2", "qwen2", "gpt2", "gpt_neox")),
    *(("llama", text) for text in ("int8-g32", "int4-g64", "int3-g64", "int2-g32", "int2-row-asym")),
    ("llama", "fp8"),
    ("phi3", "fp8-g32"),
]


@pytest.mark.parametrize(("family", "scheme"), STORED)
def test_quantized_logits_equal_those_of_the_weights_stored(family: str, scheme: str, tmp_path: Path) -> None:
    """Narrow linears keep f32 activations: the artifact is the model with other weights, no more no less."""
    model, form = save_tiny(tmp_path / "model", family, **NARROW.get(family, {})), parse(scheme)
    gristmill.compile(
        tmp_path / "model",
        tmp_path / "a",
        weights=form.format,
        embedding="fp8",
        head="fp8",
        group_size=form.group_size or "row",
        asymmetric=not form.symmetric,
        kv="f32",
        gate=False,
        max_tokens=32,
    )
    round_weights(model, form)
    session = gristmill.load(tmp_path / "a", threads=2, max_slots=3)
    for got, ids in zip(run(session, whole()), texts()):
        with torch.no_grad():
            want = model(input_ids=torch.tensor(ids)[None].long()).logits[0].numpy()
        assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def round_weights(model: Any, scheme: Scheme) -> None:
    """Every linear to the nearest weights of a scheme, embeddings and head to fp8 rows; transformers' Conv1D
    holds its weights transposed."""
    ends = {model.get_output_embeddings(), *(m for m in model.modules() if isinstance(m, torch.nn.Embedding))}
    for module in model.modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding, Conv1D)):
            continue
        if module is model.get_output_embeddings() and module.weight is model.get_input_embeddings().weight:
            continue  # tied: one matrix
        transposed = isinstance(module, Conv1D)
        w = module.weight.data.T if transposed else module.weight.data
        used = parse("fp8") if module in ends else scheme
        rounded = torch.from_numpy(dequantize_tensor(quantize_tensor("w", w.contiguous(), used)))
        module.weight.data = rounded.T.contiguous() if transposed else rounded
