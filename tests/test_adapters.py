"""Adapters over one artifact: rows of several in a batch, prefixes that stay apart, and what is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import PREFIX, logits_of, merged, random_pairs, save_adapter
from families import save_tiny
from tiny import fake_session

import gristmill
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.evaluation import negative_log_likelihood, token_nll
from gristmill.runtime.scoring import score_continuations
from gristmill.runtime.session import Session

TOLERANCE = 1e-5  # of the largest logit: f32 sums in another order
IDS = [0, 17, 42, 5, 99, 256, 3, 3, 71]
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@dataclass
class Made:
    """A model, its artifact in f32, and two adapters with their tensors."""

    model: Any
    artifact: Path
    folders: dict[str, Path]
    tensors: dict[str, dict[str, torch.Tensor]]

    def expected(self, name: str | None, ids: list[int]) -> np.ndarray:
        """transformers' logits of the merged model."""
        model = copy.deepcopy(self.model)
        return logits_of(model if name is None else merged(model, self.tensors[name]), ids)

    def open(self, **options: Any) -> Session:
        return gristmill.load(self.artifact, adapters=self.folders, **{"threads": 2, **options})


def make(folder: Path, family: str, kinds: tuple[str, ...], **changes: Any) -> Made:
    model = save_tiny(folder / "model", family, **changes)
    gristmill.compile(folder / "model", folder / "out", weights="f32", gate=False)
    tensors = {"a": random_pairs(model, kinds, seed=1), "b": random_pairs(model, kinds[:2], seed=2)}
    folders = {name: save_adapter(folder / name, found) for name, found in tensors.items()}
    return Made(model, folder / "out", folders, tensors)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llama"), "llama", LLAMA)


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(got - expected).max() / np.abs(expected).max()
    assert difference < tolerance, difference


def test_each_row_of_every_linear_is_of_its_own_merged_model(made: Made) -> None:
    names: list[str | None] = [None, "a", "b", None]
    for name, got in zip(names, mixed_batch(made.open(), names, IDS), strict=True):
        assert_close(got, made.expected(name, IDS))


def mixed_batch(session: Session, names: list[str | None], ids: list[int]) -> list[np.ndarray]:
    """Logits of the same tokens under each adapter, all rows in one forward, the sequences interleaved."""
    count, slots = len(ids), list(range(len(names)))
    for slot, name in zip(slots, names, strict=True):
        session.reset(slot, name)
    positions = np.repeat(np.arange(count), len(names))
    owners = np.tile(slots, count)
    logits = session.forward(np.repeat(ids, len(names)), positions, owners)
    return [logits[owners == slot] for slot in slots]


@pytest.mark.parametrize(
    ("family", "kinds", "changes"),
    [
        ("llama", ("lm_head", "q_proj"), {"tie_word_embeddings": True}),
        ("phi3", ("qkv_proj", "gate_up_proj", "o_proj", "down_proj"), {}),
        ("gpt2", ("c_attn", "c_proj", "c_fc"), {}),
        ("gpt_neox", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), {}),
    ],
)
def test_each_row_is_of_its_own_merged_model(
    tmp_path: Path, family: str, kinds: tuple[str, ...], changes: dict[str, Any]
) -> None:
    made = make(tmp_path, family, kinds, **changes)
    names: list[str | None] = [None, "a", "b", None]
    found = mixed_batch(made.open(), names, IDS)
    if changes.get("tie_word_embeddings"):  # PEFT's layer is beside the head alone
        made.model.lm_head.weight = torch.nn.Parameter(made.model.lm_head.weight.detach().clone())
    for name, got in zip(names, found, strict=True):
        assert_close(got, made.expected(name, IDS))
    plain = gristmill.load(made.artifact, threads=2).forward(IDS, range(len(IDS)), [0] * len(IDS))
    for without in (found[0], found[3]):
        np.testing.assert_array_equal(without, plain)
    assert np.abs(found[1] - plain).max() > 0.1 * np.abs(plain).max()


def test_int4_with_an_adapter_is_the_dequantized_model_with_it(made: Made, tmp_path: Path) -> None:
    """Read back from a checkpoint in which nothing is rounded again."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "int4"
    formats = {"weights": "int4", "group_size": 32, "embedding": "f32", "head": "f32", "kv": "f32"}
    gristmill.compile(made.artifact.parent / "model", out, gate=False, activations="f32", **formats)
    plain = gristmill.compile(made.artifact.parent / "model", tmp_path / "int8", gate=False, **formats)
    gristmill.export_checkpoint(out, tmp_path / "gptq", "compressed-tensors")
    model = dequantized(AutoModelForCausalLM.from_config(made.model.config), tmp_path / "gptq")
    expected = logits_of(merged(model, made.tensors["a"]), IDS)
    session = gristmill.load(out, threads=2, adapters=made.folders)
    found = mixed_batch(session, ["a", None], IDS)
    assert_close(found[0], expected)
    quantized_activations = gristmill.load(plain.path, threads=2, adapters=made.folders)
    assert_close(mixed_batch(quantized_activations, ["a"], IDS)[0], expected, 5e-2)
    base = gristmill.load(out, threads=1).forward(IDS, range(len(IDS)), [0] * len(IDS))
    np.testing.assert_array_equal(found[1], base)


def dequantized(model: Any, folder: Path) -> Any:
    """The model with the values that an exported checkpoint stands for."""
    from gristmill.compiler.load import load_source

    checkpoint = load_source(str(folder)).checkpoint
    state = {name: checkpoint.read(name) for name in model.state_dict()}
    model.load_state_dict(state)
    return model.eval().float()


def texts(session: Session, jobs: list[tuple[str | None, list[int]]], **options: Any) -> list[list[int]]:
    """New tokens of each job, all of them run at once from threads of their own."""
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        adapter, ids = jobs[number]
        done = session.generate(ids, max_new_tokens=12, ignore_eos=True, adapter=adapter, **options)
        found[number] = done.token_ids

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(jobs))]


def greedy(made: Made, name: str | None, ids: list[int], count: int = 12) -> list[int]:
    model = copy.deepcopy(made.model)
    model = model if name is None else merged(model, made.tensors[name])
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[-count:]


def test_generations_of_all_adapters_side_by_side(made: Made) -> None:
    session = made.open(max_slots=3)
    prompts = [IDS, [0, 9, 8], [0, *range(5, 40)]]
    jobs = [(name, ids) for ids in prompts for name in (None, "a", "b")]
    found = texts(session, jobs)
    assert found == [greedy(made, name, ids) for name, ids in jobs]
    assert len({tuple(tokens) for tokens in found[:3]}) == 3, "the adapters differ"
    sampled = texts(session, jobs[:3], temperature=1.0, seed=5)
    alone = [
        made.open().generate(ids, max_new_tokens=12, ignore_eos=True, temperature=1.0, seed=5, adapter=name)
        for name, ids in jobs[:3]
    ]
    assert sampled == [done.token_ids for done in alone]


def test_prefixes_are_of_one_adapter(made: Made) -> None:
    session = made.open(max_slots=4)
    ids = [0, *range(20, 60)]

    def reused(name: str | None) -> int:
        done = session.generate(ids, max_new_tokens=3, ignore_eos=True, adapter=name)
        assert done.token_ids == greedy(made, name, ids, 3)
        return int(done.reused_tokens)

    assert [reused("a"), reused(None), reused("b")] == [0, 0, 0]
    assert [reused("a"), reused(None), reused("b")] == [40, 40, 40]
    session.unload_adapter("a")
    assert reused("b") == 40
    session.load_adapter("a", made.folders["a"])
    assert reused("a") == 0, "what the adapter of that name left is forgotten"


def test_a_prompt_does_not_wait_for_one_of_another_adapter() -> None:
    """Nor does it copy its rows: a fake executor's logits tell which tokens a slot has."""
    session = fake_session(max_tokens=8, max_slots=3, max_len=80)
    session.adapters._held = {}
    ids = [0, *range(2, 70)]
    alone = session.generate(ids, max_new_tokens=2).token_ids
    slots = session._slots
    slot = next(slot for slot in range(3) if slots.kept(slot))
    slots.adapters[slot] = 4
    assert slots.longest_kept(ids) == (-1, 0)
    assert slots.longest_kept(ids, 4)[0] == slot
    again = session.generate(ids, max_new_tokens=2)
    assert (again.token_ids, again.reused_tokens) == (alone, 0)


def test_beams_contrastive_search_and_streams(made: Made, tmp_path: Path) -> None:
    session = made.open()
    whole = tmp_path / "merged"
    model = made.artifact.parent / "model"
    gristmill.compile(model, whole, weights="f32", gate=False, lora=made.folders["a"])
    other = gristmill.load(whole, threads=2)
    options = {"max_new_tokens": 6, "ignore_eos": True}
    for search in ("beam_search", "contrastive_search"):
        got = getattr(session, search)(IDS, adapter="a", **options)
        expected = getattr(other, search)(IDS, **options)
        got, expected = (found[0] if isinstance(found, list) else found for found in (got, expected))
        assert got.token_ids == expected.token_ids
    assert "".join(session.stream(IDS, adapter="a", **options)) == other.generate(IDS, **options).text


def test_a_draft_proposes_for_adapters(made: Made) -> None:
    session = gristmill.load(made.artifact, threads=1, adapters=made.folders, draft=made.artifact)
    for name in (None, "a"):
        done = session.generate(IDS, max_new_tokens=12, ignore_eos=True, lookup=False, adapter=name)
        assert done.token_ids == greedy(made, name, IDS)


def test_an_adapter_in_use_is_not_unloaded(made: Made) -> None:
    session = made.open(max_slots=2)
    with session.slot("a") as slot:
        session.forward(IDS[:2], [0, 1], [slot, slot])
        with pytest.raises(GristmillError, match="adapter 'a' is generating"):
            session.unload_adapter("a")
    with session.stream(IDS, adapter="b", max_new_tokens=50, ignore_eos=True) as stream:
        next(stream)
        with pytest.raises(GristmillError, match="adapter 'b' is generating"):
            session.unload_adapter("b")
    session.unload_adapter("b")
    waiting = session.stream(IDS, adapter="a", max_new_tokens=3, ignore_eos=True)
    session.unload_adapter("a")
    with pytest.raises(GristmillError, match="adapter 'a' was unloaded"):
        next(waiting)
    assert session._slots.free() == 2
    assert session.generate(IDS, max_new_tokens=1).token_ids


def test_texts_are_scored_with_an_adapter(made: Made) -> None:
    session = made.open()
    ids = list(range(2, 60))
    found = {name: negative_log_likelihood(session, ids, adapter=name) for name in (None, "a")}
    whole = [*session.tokenizer.prefix_ids, *ids]
    for name, nll in found.items():
        expected = token_nll(made.expected(name, whole[:-1]), np.array(whole[1:]))
        np.testing.assert_allclose(nll, expected[-len(nll) :], rtol=1e-4)
    assert np.abs(found["a"] - found[None]).max() > 0.1
    [score] = score_continuations(session, [(ids[:40], ids[40:])], adapter="a")
    expected = token_nll(made.expected("a", ids[:-1])[39:], np.array(ids[40:]))
    assert score.log_likelihood == pytest.approx(-expected.sum(), rel=1e-4)


def test_names_are_checked(made: Made) -> None:
    session = made.open()
    assert list(session.adapters.all) == ["a", "b"]
    held = session.adapters.all["a"]
    assert (held.base, held.path) == ("made/by-hand", made.folders["a"])
    for name, says in (("c", "there is no adapter 'c'; there are a, b"), ("bb", "did you mean b")):
        with pytest.raises(GristmillError, match=says):
            session.generate(IDS, adapter=name)
    with pytest.raises(GristmillError, match="adapter is 3, expected the name"):
        session.generate(IDS, adapter=3)
    with pytest.raises(GristmillError, match="already"):
        session.load_adapter("a", made.folders["b"])
    for name in ("", "x\n", "y" * 201):
        with pytest.raises(GristmillError, match="an adapter's name is"):
            session.load_adapter(name, made.folders["b"])
    with pytest.raises(GristmillError, match="load some with load_adapter"):
        gristmill.load(made.artifact, threads=1).generate(IDS, adapter="a")
    with pytest.raises(GristmillError, match="adapters at run time are for device 'cpu'"):
        fake_session().load_adapter("a", made.folders["a"])
    with pytest.raises(GristmillError, match="adapters at run time are for device 'cpu'"):
        gristmill.load(made.artifact, "cuda", adapters=made.folders)


Tensors = dict[str, torch.Tensor]
FIRST = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "config", "says"),
    [
        (lambda t: t | {f"{FIRST}.lora_A.weight": torch.ones(4, 64)}, {}, r"expected \[4, 96\].*base model"),
        (lambda t: t | {f"{FIRST}.lora_B.weight": torch.ones(80, 4)}, {}, r"expected \[96, 4\]"),
        (
            lambda t: {k.replace("q_proj", "wq"): v for k, v in t.items()}, {},
            "no linear model.layers.0.self_attn.wq; its linears are down_proj",
        ),
        (lambda t: t | {f"{PREFIX}lm_head.weight": torch.ones(320, 96)}, {}, "whole parameters.*--lora"),
        (lambda t: t | {f"{FIRST}.lora_B.bias": torch.ones(96)}, {}, "given a bias.*--lora"),
        (
            lambda t: t | {f"{FIRST}.lora_magnitude_vector": torch.ones(96)}, {"use_dora": True},
            "changed by DoRA.*--lora",
        ),
        (
            lambda t: {f"{PREFIX}model.embed_tokens.lora_embedding_{p}": torch.ones(s)
                       for p, s in (("A", (4, 320)), ("B", (96, 4)))}, {}, "an embedding.*--lora",
        ),
        (lambda t: {k: torch.full_like(v, torch.inf) for k, v in t.items()}, {}, "not finite"),
        (
            lambda t: {k: torch.ones((128, 96) if "lora_A" in k else (96, 128)) for k in t}, {"r": 128},
            "rank 128, more than its 96 inputs",
        ),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(
    made: Made, tmp_path: Path, edit: Callable[[Tensors], Tensors], config: dict[str, Any], says: str
) -> None:
    tensors = {k: v for k, v in made.tensors["a"].items() if "layers.0.self_attn.q_proj" in k}
    folder = save_adapter(tmp_path / "adapter", edit(tensors), **config)
    session = gristmill.load(made.artifact, threads=1)
    with pytest.raises(GristmillError, match=says):
        session.load_adapter("x", folder)
    assert not session.adapters.all and session.executor.adapter_bytes == 0  # type: ignore[attr-defined]


def test_rotated_artifacts_are_refused(made: Made, tmp_path: Path) -> None:
    gristmill.compile(
        made.artifact.parent / "model", tmp_path / "out", weights="f32", rotate=True, gate=False
    )
    with pytest.raises(GristmillError, match="compiled with --rotate.*--lora"):
        gristmill.load(tmp_path / "out", threads=1, adapters=made.folders)
