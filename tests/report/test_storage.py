"""report.json holds a Report exactly, and what is wrong with a file is said."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from sample_report import sample_report

from gristmill.report import storage
from gristmill.report.schema import Report
from gristmill.runtime.errors import GristmillError

SMALL = Report("t", "m", "2026-11-24T10:31:07+00:00", "gristmill report m", {}, {}, ())


def changed(**keys: Any) -> str:
    return json.dumps({**json.loads(storage.to_json(SMALL)), **keys})


def test_a_report_comes_back_as_it_was() -> None:
    report = dataclasses.replace(sample_report(), readings={"a": "b"}, derived={"x/y": 1 / 3})
    again = storage.from_json(storage.to_json(report))
    assert again == report
    assert storage.to_json(again) == storage.to_json(report)


def test_texts_that_are_not_unicode_come_back() -> None:
    report = dataclasses.replace(SMALL, model="\udcff\x00\u2028")
    assert storage.from_json(storage.to_json(report)) == report


def test_numbers_that_json_lacks_are_strings_in_it() -> None:
    report = dataclasses.replace(SMALL, derived={"up": math.inf, "down": -math.inf, "none": math.nan})
    text = storage.to_json(report)
    assert json.loads(text)["derived"] == {"up": "Infinity", "down": "-Infinity", "none": "NaN"}
    derived = storage.from_json(text).derived
    assert derived["up"] == math.inf and derived["down"] == -math.inf and math.isnan(derived["none"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "format 'list', this version reads 1"),
        (changed(format=2), "format 2, this version reads 1"),
        (changed(colour=1), "unknown key 'colour'"),
        (changed(title=1), "title is 1, expected text"),
        (changed(seconds=True), "seconds is True, expected a number"),
        (changed(points={}), "points is {}, expected a list"),
        (changed(points=[1]), r"points\[0\] is 1, expected an object"),
        (changed(points=[{}]), r"points\[0\] lacks 'id'"),
        (changed(derived={"a": "b"}), "derived.a is 'b', expected a number"),
        (json.dumps({"format": 1}), "lacks 'title'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text: str, said: str) -> None:
    with pytest.raises(GristmillError, match=said) as caught:
        storage.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_choice_that_is_not_one_is_refused() -> None:
    value = json.loads(storage.to_json(sample_report()))
    value["points"][0]["status"] = "maybe"
    with pytest.raises(GristmillError, match="status is 'maybe', expected one of ok, failed"):
        storage.from_json(json.dumps(value))


def test_it_is_read_from_its_folder(tmp_path: Path) -> None:
    storage.replace_files(tmp_path, {storage.JSON_NAME: storage.to_json(SMALL)})
    assert storage.read_report(tmp_path) == storage.read_report(tmp_path / "report.json") == SMALL
    with pytest.raises(GristmillError, match="cannot read"):
        storage.read_report(tmp_path / "none")


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.replace_files(tmp_path, {"a": "old", "b": "old"})

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GristmillError, match="no space left"):
        storage.replace_files(tmp_path, {"a": "new", "b": "new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GristmillError, match="cannot write the report"):
        storage.replace_files(tmp_path / "file", {"a": "b"})
