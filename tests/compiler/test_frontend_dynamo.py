"""torch.compile(backend="gristmill"): the eager numbers, by the C++ executor where a graph has regions."""

import importlib.metadata
import logging
from collections.abc import Iterator

import pytest
import torch
from models import BASE, config_of, random_model
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from gristmill.compiler.frontends import dynamo
from gristmill.runtime.errors import GristmillError

TOLERANCE = 1e-5  # of the largest output, float32


@pytest.fixture(autouse=True)
def fresh(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, "gristmill")
    yield
    torch._dynamo.reset()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Linear(32, 64),
        nn.GELU(),
        nn.LayerNorm(64),
        nn.Linear(64, 64, bias=False),
        nn.SiLU(),
        nn.Linear(64, 10),
    )
    return nn.Sequential(*layers).eval()


def distance(model: nn.Module, compiled: object, x: torch.Tensor) -> float:
    assert callable(compiled)
    expected, found = model(x), compiled(x)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_an_mlp_is_one_region(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    compiled = torch.compile(model, backend=dynamo.NAME)
    with torch.no_grad():
        for rows in (5, 3, 600):  # the last is more than a program holds
            assert distance(model, compiled, torch.randn(rows, 32)) < TOLERANCE
        assert distance(model, compiled, torch.randn(2, 3, 32)) < TOLERANCE
    lines = {r.message for r in caplog.records if r.name == "gristmill"}
    assert lines == {"a graph is 1 regions of 4 instructions, and 0 calls of torch"}


def test_integer_weights_round_and_written_parameters_count() -> None:
    model = mlp()
    compiled = torch.compile(model, backend=dynamo.NAME, options={"weights": "int8", "group_size": 32})
    x = torch.randn(9, 32)
    with torch.no_grad():
        assert 1e-5 < distance(model, compiled, x) < 0.03
        before = compiled(x)
        model.get_parameter("0.weight").mul_(2)
        assert not torch.equal(compiled(x), before)
        assert distance(model, compiled, x) < 0.03


def test_gradients_are_left_to_torch() -> None:
    model = mlp()
    compiled = torch.compile(model, backend=dynamo.NAME)
    x = torch.randn(4, 32)
    weight = model.get_parameter("0.weight")
    expected, found = (torch.autograd.grad(run(x).square().sum(), weight)[0] for run in (model, compiled))
    assert torch.allclose(expected, found)


def test_a_llama_with_a_batch(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(config_of("llama", attn_implementation="sdpa"))
    compiled = torch.compile(model, backend=dynamo.NAME)
    ids = torch.randint(0, BASE["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (m(ids, use_cache=False).logits for m in (model, compiled))
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE
    (line,) = [r.message for r in caplog.records if r.name == "gristmill"]
    assert line.startswith(
        "a graph is 4 regions of 13 instructions"
    )  # norm and qkv; output to down; and the head


def test_other_types_are_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp().double()
    with torch.no_grad():
        x = torch.randn(3, 32, dtype=torch.float64)
        assert torch.equal(torch.compile(model, backend=dynamo.NAME)(x), model(x))
    assert "left to torch: it has a tensor of float64, expected float32" in caplog.text


@pytest.mark.parametrize("options, message", [
    ({"method": "gptq"}, "unknown option 'method', expected one of weights"),
    ({"threads": -1}, "threads is -1"),
    ({"weights": "int5"}, "weights is 'int5'"),
])  # fmt: skip
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        dynamo.backend(torch.fx.symbolic_trace(mlp()), [], options=options)


def test_torch_finds_the_backend_by_its_entry_point() -> None:
    (found,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name=dynamo.NAME)
    assert found.load() is dynamo.backend is lookup_backend(dynamo.NAME)
