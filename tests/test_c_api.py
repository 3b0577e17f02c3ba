"""The library for C: the same logits, tokens and draws as a Session, errors in words, no crash."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gristmill
from gristmill.runtime.decoding.sampling import uniform

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "build" / "native"
PROMPT = [3, 17, 5, 90, 41, 8, 8, 2]
ID = ctypes.c_int32


class Options(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("max_len", ctypes.c_int64), ("max_slots", ctypes.c_int64),
        ("threads", ctypes.c_int32), ("huge_pages", ctypes.c_int32), ("pinned", ctypes.c_int32),
        ("isa", ctypes.c_char_p),
    ]  # fmt: skip


class Limits(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("max_len", ctypes.c_int64), ("max_slots", ctypes.c_int64),
        ("max_tokens", ctypes.c_int64), ("vocabulary", ctypes.c_int64), ("threads", ctypes.c_int64),
        ("weight_bytes", ctypes.c_uint64), ("kv_bytes", ctypes.c_uint64),
    ]  # fmt: skip


class Sampling(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("temperature", ctypes.c_float), ("top_p", ctypes.c_float),
        ("top_k", ctypes.c_int64), ("seed", ctypes.c_uint64), ("sequence", ctypes.c_uint64),
    ]  # fmt: skip


def built(out: Path, *arguments: str) -> Path:
    """The library, of the extension's objects and what is built now; one process at a time."""
    if not list(NATIVE.glob("*.o")):
        pytest.skip("build/native has no objects of the extension: install from source first (make test)")
    if shutil.which("flock") is None or shutil.which("make") is None:
        pytest.skip("needs make and flock")
    out.mkdir(parents=True, exist_ok=True)
    make = ["make", "-s", "-f", "runtime/c_api/Makefile", f"OUT={out}", f"NATIVE={NATIVE}", *arguments]
    subprocess.run(["flock", str(out / "lock"), *make], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def library() -> Any:
    found = ctypes.CDLL(str(built(ROOT / "build" / "c_tests") / "lib" / "libgristmill.so"))
    ids, count = ctypes.POINTER(ID), ctypes.c_int64
    for name, result, *parameters in (
        ("open", ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(Options)),
        ("close", None, ctypes.c_void_p),
        ("last_error", ctypes.c_char_p),
        ("get_limits", ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Limits)),
        ("end_ids", count, ctypes.c_void_p, ids, count),
        ("greedy", ID, ctypes.c_void_p, count, ids, count),
        ("sample", ID, ctypes.c_void_p, count, ids, count, ctypes.POINTER(Sampling)),
        ("length", count, ctypes.c_void_p, count),
        ("truncate", ctypes.c_int, ctypes.c_void_p, count, count),
        ("copy", ctypes.c_int, ctypes.c_void_p, count, count, count),
        ("forward", ctypes.c_int, ctypes.c_void_p, ids, ids, ids, count, ids, count,
         ctypes.POINTER(ctypes.c_float)),
    ):  # fmt: skip
        function = getattr(found, f"gristmill_{name}")
        function.restype, function.argtypes = result, parameters
    return found


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("c") / "py7m.grist"
    gristmill.compile(ROOT / "examples" / "py7m", out, weights="int8", kv="int8", gate=False, max_slots=4)
    return out


@pytest.fixture
def model(library: Any, artifact: Path) -> Iterator[Any]:
    options = Options(ctypes.sizeof(Options), threads=1)
    opened = library.gristmill_open(str(artifact).encode(), ctypes.byref(options))
    assert opened, error(library)
    yield opened
    library.gristmill_close(opened)


def error(library: Any) -> str:
    return library.gristmill_last_error().decode()


def ids(values: list[int]) -> Any:
    return (ID * len(values))(*values)


def generated(
    library: Any, model: Any, slot: int, prompt: list[int], count: int, how: Sampling | None
) -> list[int]:
    found: list[int] = []
    tokens = prompt
    for _ in range(count):
        arguments = (model, slot, ids(tokens), len(tokens))
        if how is None:
            found.append(library.gristmill_greedy(*arguments))
        else:
            found.append(library.gristmill_sample(*arguments, ctypes.byref(how)))
        tokens = found[-1:]
    return found


def sampling(**values: Any) -> Sampling:
    return Sampling(**{"size": ctypes.sizeof(Sampling), "temperature": 1.0, "top_p": 1.0, **values})


def test_versions(library: Any) -> None:
    header = (ROOT / "runtime" / "cpu" / "gristmill.h").read_text()
    assert f"#define GRISTMILL_API {library.gristmill_api()}\n" in header
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", library._name], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in exported.splitlines() if " T " in line}
    assert {name for name in names if name.startswith("gristmill_")} == {
        line.split("gristmill_", 1)[1].split("(")[0].join(("gristmill_", ""))
        for line in header.replace("gristmill_model *", "").splitlines()
        if line.startswith("GRISTMILL_EXPORT")
    }


def test_limits_are_those_of_a_session(library: Any, model: Any, artifact: Path) -> None:
    limits = Limits(ctypes.sizeof(Limits))
    assert library.gristmill_get_limits(model, ctypes.byref(limits)) == 0
    session = gristmill.load(artifact)
    assert (limits.max_len, limits.max_slots, limits.max_tokens, limits.vocabulary) == (
        session.max_len, session.max_slots, session.max_tokens, session.vocabulary,
    )  # fmt: skip
    assert (limits.weight_bytes, limits.kv_bytes, limits.threads) == (
        session.memory["weight_bytes"], session.memory["kv_bytes"], 1,
    )  # fmt: skip
    ends = ids([-1] * 4)
    count = library.gristmill_end_ids(model, ends, 4)
    assert set(ends[:count]) == session.eos_ids


def test_greedy_tokens_are_those_of_a_session(library: Any, model: Any, artifact: Path) -> None:
    session = gristmill.load(artifact)
    long = (PROMPT * 100)[:700]  # more than one forward takes
    for slot, prompt in enumerate((PROMPT, long)):
        want = session.generate(prompt, max_new_tokens=40, ignore_eos=True).token_ids
        assert generated(library, model, slot, prompt, 40, None) == want
        assert library.gristmill_length(model, slot) == len(prompt) + 39


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9, "temperature": 0.7}]
)
def test_draws_are_those_of_a_session(
    library: Any, model: Any, artifact: Path, options: dict[str, Any]
) -> None:
    session = gristmill.load(artifact)
    for seed in (0, 1, 2**63 - 1):
        library.gristmill_truncate(model, 0, 0)
        got = generated(library, model, 0, PROMPT, 60, sampling(seed=seed, **options))
        want = session.generate(
            PROMPT, max_new_tokens=60, ignore_eos=True, seed=seed, **{"temperature": 1.0, **options}
        )
        assert got == want.token_ids


def test_frequencies_of_draws(library: Any, model: Any) -> None:
    """What one position draws over many sequences follows the softmax: chi-square over the likely tokens."""
    limits = Limits(ctypes.sizeof(Limits))
    library.gristmill_get_limits(model, ctypes.byref(limits))
    logits = logits_of(library, model, PROMPT, limits.vocabulary)
    weights = np.exp(logits - logits.max())
    likely = np.argsort(-weights)[:8]
    draws = np.zeros(limits.vocabulary)
    for number in range(4000):
        library.gristmill_truncate(model, 0, len(PROMPT) - 1)
        how = sampling(seed=7, sequence=number)
        draws[library.gristmill_sample(model, 0, ids(PROMPT[-1:]), 1, ctypes.byref(how))] += 1
    expected = 4000 * weights / weights.sum()
    cells = [*((draws[i], expected[i]) for i in likely)]
    cells.append((4000 - sum(d for d, _ in cells), 4000 - sum(e for _, e in cells)))
    assert sum((d - e) ** 2 / e for d, e in cells) < 27.9  # 99.95 % of chi-square with 8 degrees


def logits_of(library: Any, model: Any, tokens: list[int], vocabulary: int) -> np.ndarray:
    count = len(tokens)
    out = np.empty(vocabulary, np.float32)
    code = library.gristmill_forward(
        model, ids(tokens), ids(list(range(count))), ids([0] * count), count, ids([count - 1]), 1,
        out.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
    )  # fmt: skip
    assert code == 0, error(library)
    return out


def test_a_forward_has_the_bits_of_a_session(library: Any, model: Any, artifact: Path) -> None:
    session = gristmill.load(artifact)
    want = session.forward(PROMPT, range(len(PROMPT)), [0] * len(PROMPT), [len(PROMPT) - 1])
    assert logits_of(library, model, PROMPT, session.vocabulary).tobytes() == want[0].tobytes()


def test_slots_are_copied_and_truncated(library: Any, model: Any) -> None:
    first = generated(library, model, 0, PROMPT, 12, None)
    assert library.gristmill_copy(model, 0, 1, len(PROMPT) - 1) == 0
    assert library.gristmill_length(model, 1) == len(PROMPT) - 1
    assert generated(library, model, 1, PROMPT[-1:], 12, None) == first
    assert library.gristmill_truncate(model, 0, len(PROMPT) - 1) == 0
    assert generated(library, model, 0, PROMPT[-1:], 12, None) == first


def test_threads_take_turns(library: Any, model: Any) -> None:
    want = generated(library, model, 0, PROMPT, 20, None)
    found: dict[int, list[int]] = {}

    def run(slot: int) -> None:
        found[slot] = generated(library, model, slot, PROMPT, 20, None)

    library.gristmill_truncate(model, 0, 0)
    threads = [threading.Thread(target=run, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), want)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda c, m: c.gristmill_greedy(None, 0, ids([1]), 1), "got NULL for a model"),
        (lambda c, m: c.gristmill_greedy(m, 0, None, 1), "got NULL for tokens"),
        (lambda c, m: c.gristmill_greedy(m, 9, ids([1]), 1), "got slot 9, expected 0 to 3"),
        (lambda c, m: c.gristmill_greedy(m, 0, ids([1]), 0), "got 0 tokens for slot 0, expected 1 to"),
        (lambda c, m: c.gristmill_greedy(m, 0, ids([1]), 2**40), "tokens for slot 0, expected 1 to"),
        (lambda c, m: c.gristmill_greedy(m, 0, ids([-1]), 1), "got token -1, expected 0 to"),
        (lambda c, m: c.gristmill_greedy(m, 0, ids([10**6]), 1), "got token 1000000, expected 0 to"),
        (lambda c, m: c.gristmill_sample(m, 0, ids([1]), 1, None), "got NULL for sampling"),
        (lambda c, m: c.gristmill_sample(m, 0, ids([1]), 1, ctypes.byref(sampling(temperature=0.0))),
         "got temperature 0, expected a number above 0"),
        (lambda c, m: c.gristmill_sample(m, 0, ids([1]), 1, ctypes.byref(sampling(top_p=1.5))),
         "got top_p 1.5"),
        (lambda c, m: c.gristmill_sample(m, 0, ids([1]), 1, ctypes.byref(sampling(size=4000))),
         "gristmill_sampling has size 4000"),
        (lambda c, m: c.gristmill_truncate(m, 0, 5), "slot 0 holds 0 positions, got position 5"),
        (lambda c, m: c.gristmill_copy(m, 0, 1, 3), "slot 0 holds 0 positions, got position 3"),
        (lambda c, m: c.gristmill_forward(m, ids([1]), ids([4]), ids([0]), 1, None, 0, None),
         "slot 0 holds 0 positions, got position 4"),
        (lambda c, m: c.gristmill_forward(m, ids([1, 2]), ids([0, 2]), ids([0, 0]), 2, None, 0, None),
         "slot 0 got position 2 after 0"),
        (lambda c, m: c.gristmill_forward(m, ids([1]), ids([0]), ids([0]), 1, ids([1]), 1, None),
         "got NULL for logits"),
        (lambda c, m: c.gristmill_forward(m, ids([1]), ids([0]), ids([0]), 10**9, None, 0, None),
         "got 1000000000 rows, expected 1 to"),
    ],
)  # fmt: skip
def test_what_is_refused(library: Any, model: Any, call: Any, said: str) -> None:
    assert call(library, model) == -1
    assert error(library).startswith(said) or said in error(library)
    assert "\n" not in error(library)
    assert library.gristmill_length(model, 0) == 0  # and nothing was done


def test_artifacts_that_are_refused(library: Any, artifact: Path, tmp_path: Path) -> None:
    def refused(path: Path, options: Options | None = None) -> str:
        assert not library.gristmill_open(str(path).encode(), ctypes.byref(options) if options else None)
        return error(library)

    assert not library.gristmill_open(None, None) and error(library) == "got NULL for artifact"
    assert "is missing; expected an artifact directory" in refused(tmp_path / "nothing")
    assert "has no manifest.json: not a gristmill artifact" in refused(tmp_path)
    too_long = Options(ctypes.sizeof(Options), max_len=10**6)
    assert "max_len is 1000000, expected 1 to" in refused(artifact, too_long)
    assert "isa is 'z80'" in refused(artifact, Options(ctypes.sizeof(Options), isa=b"z80"))
    for name in ("program.json", "manifest.json", "weights.safetensors", "generation_config.json"):
        copy = tmp_path / name.split(".")[0]
        shutil.copytree(artifact, copy)
        data = bytearray((copy / name).read_bytes())
        data[20 if name == "weights.safetensors" else len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        assert name in refused(copy)
        (copy / name).write_bytes(data[:-1])
        assert name in refused(copy)
    newer = tmp_path / "newer"
    shutil.copytree(artifact, newer)
    text = (newer / "manifest.json").read_text()
    (newer / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    assert "has format 2, this library reads up to 1; install a newer one" in refused(newer)


def test_uniform_is_numpys(library: Any, tmp_path: Path) -> None:
    """The generator alone, at the ends of its arguments."""
    program = tmp_path / "uniform.cpp"
    triples = [(0, 0, 0), (1, 2, 3), (2**64 - 1, 5, 2**31), (7, 2**64 - 1, 2**40)]
    calls = "\n".join(
        f'std::printf("%a\\n", gristmill::uniform({a}ull, {b}ull, {c}ull));' for a, b, c in triples
    )
    program.write_text(f'#include <cstdio>\n#include "sampling.h"\nint main() {{ {calls} }}\n')
    sources = [str(program), *(str(ROOT / "runtime" / "c_api" / n) for n in ("sampling.cpp",))]
    include = [f"-I{ROOT / folder}" for folder in ("runtime/c_api", "runtime/cpu")]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++17", *include, *sources, "-o", tmp_path / "uniform"], check=True)
    out = subprocess.run([tmp_path / "uniform"], capture_output=True, text=True, check=True).stdout
    assert [float.fromhex(line) for line in out.split()] == [uniform(*triple) for triple in triples]


def test_the_example_under_a_sanitizer(artifact: Path, library: Any, tmp_path: Path) -> None:
    """It prints the tokens that `gristmill run` would, and its mistakes are lines."""
    out = built(
        ROOT / "build" / "c_tests_asan", "EXTRA=-fsanitize=address,undefined -fno-sanitize-recover=all"
    )
    program = tmp_path / "generate"
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
               f"-I{out / 'include'}", str(ROOT / "examples" / "c" / "generate.c"), f"-L{out / 'lib'}",
               "-lgristmill", f"-Wl,-rpath,{out / 'lib'}", "-o", str(program)]  # fmt: skip
    subprocess.run(command, check=True)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        texts = [str(program), *map(str, arguments)]
        environment = {"PATH": os.environ["PATH"], "ASAN_OPTIONS": "detect_leaks=1"}
        return subprocess.run(texts, capture_output=True, text=True, env=environment)

    session = gristmill.load(artifact)
    greedy = run(artifact, 24, *PROMPT)
    assert greedy.stderr == "" and greedy.returncode == 0
    assert [int(i) for i in greedy.stdout.split()] == session.generate(PROMPT, max_new_tokens=24).token_ids
    drawn = run(artifact, 24, "--seed", 11, *PROMPT)
    want = session.generate(PROMPT, max_new_tokens=24, temperature=1.0, seed=11).token_ids
    assert [int(i) for i in drawn.stdout.split()] == want
    for arguments, said in (
        ((tmp_path / "none", 4, 1), "is missing; expected an artifact directory"),
        ((artifact, 4, 999999), "got token 999999"),
        ((artifact, "x", 1), "got x, expected a number"),
    ):
        wrong = run(*arguments)
        assert wrong.returncode in (1, 2) and said in wrong.stderr and wrong.stderr.count("\n") == 1
