"""The points that a page puts forward."""

from __future__ import annotations

from dataclasses import replace

from sample_report import sample_report

from gristmill.report import choose
from gristmill.report.schema import Point, Report

SAMPLE = sample_report()
BY_ID = {point.id: point for point in SAMPLE.points}


def report_of(*points: Point) -> Report:
    return replace(SAMPLE, points=points)


def test_the_shapes_that_most_points_share() -> None:
    assert choose.decode_shape(SAMPLE) == choose.Shape(rows=1, context=128, sequences=1)
    assert choose.prefill_shape(SAMPLE) == choose.Shape(rows=512, context=0, sequences=1)
    odd = replace(BY_ID["f16"], speed=tuple(s for s in BY_ID["f16"].speed if s.context == 4096))
    assert choose.decode_shape(report_of(odd, BY_ID["int8"])) == choose.Shape(1, 4096, 1)
    assert choose.decode_shape(report_of()) is None


def test_the_picks_keep_the_promise_and_are_no_peers() -> None:
    assert [(p.point.id, p.why) for p in choose.picks(SAMPLE)] == [
        ("int4-gptq-kv8", "fastest"),
        ("int4-gptq", "smallest"),
        ("int4-gptq-cuda", "fastest and smallest"),
    ]
    rest = report_of(*(BY_ID[id] for id in ("f16", "int4-rtn", "int3-gptq", "q8_0", "int4-awq")))
    assert choose.picks(rest) == [], "all lose more than the promise, are floats, peers, or failed"


def test_the_fastest_and_the_smallest_may_differ() -> None:
    small = BY_ID["int4-gptq"]
    slow = replace(small, speed=tuple(replace(s, tokens_s=s.tokens_s / 10) for s in small.speed))
    found = choose.picks(report_of(BY_ID["int8"], slow))
    assert [(p.point.id, p.why) for p in found] == [("int8", "fastest"), ("int4-gptq", "smallest")]


def test_a_promise_is_kept_with_the_whole_interval() -> None:
    point = BY_ID["int4-gptq"]
    assert point.accuracy and choose.keeps_promise(point)
    unsure = replace(point.accuracy, ppl_increase=replace(point.accuracy.ppl_increase, high=0.0101))
    assert not choose.keeps_promise(replace(point, accuracy=unsure))
    short = replace(point.accuracy, tokens=224)
    assert not choose.keeps_promise(replace(point, accuracy=short)), "too few tokens for an interval"


def test_the_reference_is_the_float_point_of_the_device() -> None:
    reference = choose.reference(SAMPLE, "cpu")
    assert reference is not None and reference.id == "f16"
    assert choose.reference(SAMPLE, "cuda") is None


def test_no_two_points_look_the_same() -> None:
    styles = choose.styles(SAMPLE)
    assert set(styles) == set(BY_ID)
    good = [styles[point.id] for point in choose.good(SAMPLE)]
    assert len({style.marker for style in good}) == len(good), "told apart without colours"
    assert styles["q4_0"].colour == styles["q8_0"].colour != styles["int8"].colour
