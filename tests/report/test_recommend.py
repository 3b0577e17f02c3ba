"""Dominated points, and the fastest point that keeps a promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_report import sample_report

from gristmill.compiler.statistics import Interval
from gristmill.report.pareto import with_dominated
from gristmill.report.recommend import Promise, recommend, refuse_few_tokens
from gristmill.report.schema import Memory, Point, Report, SpeedPoint
from gristmill.runtime.errors import GristmillError

ACCURACY = next(point.accuracy for point in sample_report().points if point.accuracy)


def point(
    id: str,
    tok_s: float,
    size: int,
    kl: float,
    high: float = 0.0,
    device: str = "cpu",
    runtime: str = "gristmill 1",
) -> Point:
    """high: upper bound of the increase of perplexity, whose estimate is half of it."""
    interval = Interval(high / 2, 0.0, high)
    return Point(
        id, id, runtime, device, "int4", "rtn", "f16", "ok",
        accuracy=replace(ACCURACY, kl=Interval(kl, kl, kl), ppl_increase=interval, tokens=2000),
        speed=(SpeedPoint("decode", 1, 16, 1, 1 / tok_s, tok_s, None, 1),),
        memory=Memory(size, 4.5, None, None, None),
    )  # fmt: skip


def report(*points: Point) -> Report:
    return replace(sample_report(), points=points)


def test_dominated_points() -> None:
    found = with_dominated(
        report(
            point("exact", 10, 100, 0.0),
            point("fast", 40, 60, 0.2),
            point("small", 30, 30, 0.2),
            point("worse", 20, 50, 0.3),
            point("twin", 40, 60, 0.2),
            point("gpu", 900, 99, 0.0, device="cuda"),
            point("peer", 35, 20, 0.25, runtime="llama.cpp"),
            replace(point("failed", 999, 1, 0.0), status="failed"),
            replace(point("unknown", 999, 1, 0.0), accuracy=None),
        )
    )
    assert found.dominated["speed"] == ("small", "worse", "peer"), (
        "a twin does not dominate, nor another device"
    )
    assert found.dominated["size"] == ("fast", "worse", "twin")


def test_the_fastest_that_keeps_the_promise() -> None:
    points = (
        point("f16", 10, 100, 0.0, 0.0),
        point("int8", 20, 50, 0.01, 0.004),
        point("int4", 40, 25, 0.1, 0.012),
        replace(point("broken", 1, 1, 0.0), status="failed", reason="compile: no", accuracy=None),
        point("peer", 999, 1, 0.0, 0.0, runtime="llama.cpp"),
    )
    choice = recommend(report(*points), Promise(0.01))
    assert choice.point.id == "int8", "int4's estimate is within, its upper bound is not"
    assert choice.reasons == (
        "int8: 20 tok/s, 50 B, perplexity +0.2 % (+0 % to +0.4 %); the fastest of 2 that keep "
        "perplexity +1 % at most",
        "not int4: perplexity up to +1.2 % (estimate +0.6 %)",
        "not f16: 10 tok/s",
        "not broken: compile: no",
    )
    assert recommend(report(*points), Promise(0.012)).point.id == "int4"
    assert recommend(report(*points), Promise(0.0)).point.id == "f16"
    assert recommend(report(*points), Promise(0.02, max_size=25)).point.id == "int4"
    assert recommend(report(*points), Promise(0.02, min_tok_s=40)).point.id == "int4"


def test_nothing_fits() -> None:
    points = report(point("f16", 10, 100, 0.0, 0.0), point("int4", 40, 25, 0.1, 0.012))
    with pytest.raises(
        GristmillError, match="the closest is int4, with perplexity up to .1.2 % .* tokens would dec"
    ):
        recommend(points, Promise(0.01, min_tok_s=20))
    with pytest.raises(GristmillError, match="perplexity .1 % at most, 30 B at most; the closest is int4"):
        recommend(points, Promise(0.01, max_size=30))
    with pytest.raises(GristmillError, match="the closest is f16, with 10 tok/s$"):
        recommend(points, Promise(0.001, min_tok_s=11))
    with pytest.raises(GristmillError, match="no point was measured .broken: compile: no"):
        recommend(
            report(replace(points.points[0], label="broken", status="failed", reason="compile: no")),
            Promise(1),
        )


def test_few_tokens_decide_nothing() -> None:
    with pytest.raises(GristmillError, match="255 tokens are too few.*at least 256"):
        refuse_few_tokens(255)
    refuse_few_tokens(256)
    short = point("int4", 40, 25, 0.1)
    assert short.accuracy
    short = replace(short, accuracy=replace(short.accuracy, tokens=224))
    with pytest.raises(GristmillError, match="224 tokens are too few.*at least 256"):
        recommend(report(short), Promise(0.01))
