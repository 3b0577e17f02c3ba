"""Why a point is as fast as it is: phases, kinds of instructions, their roofs, and what would help next."""

from __future__ import annotations

from gristmill.report import choose
from gristmill.report.schema import KindVerdict, PhaseWhy, Point, Remedy, Report
from gristmill.report.summary import source
from gristmill.report.tables import Block, Column, Group, Note, Number, Row, Table, Tag, Text, cell, join, say

_TONES = {"memory": "memory", "compute": "compute", "communication": "communication", "overhead": "overhead"}


def groups(report: Report) -> tuple[Block, ...]:
    """A group for each point that was looked into; the picks are open."""
    open_ids = {pick.point.id for pick in choose.picks(report)}
    points = [point for point in choose.good(report) if point.why]
    open_ids = open_ids or {p.id for p in points[:1]}
    return tuple(_group(report, point, point.id in open_ids) for point in points)


def _group(report: Report, point: Point, open: bool) -> Group:
    blocks: list[Block] = [_phases(report, point)]
    for i, why in enumerate(point.why):
        blocks.append(_kinds(report, point, why, i))
        blocks += [Note(say("{}: {}", why.name, why.reason))] if why.reason else []
    verdicts = join([say("{} {}", why.name, _verdict(why.verdict)) for why in point.why], "; ")
    return Group(f"why-{point.id}", say("{} on {}: {}", point.label, point.device, verdicts), tuple(blocks), open)


def _verdict(name: str) -> Tag:
    return Tag(f"{name}-bound", _TONES[name])


def _phases(report: Report, point: Point) -> Table:
    columns = (Column("phase", numeric=False), Column("rows"), Column("context"), Column("sequences"),
               Column("measured"), Column("model"), Column("error", "model against measurement"), Column("overhead"),
               Column("communication"), Column("verdict", numeric=False), Column("next remedies", numeric=False))  # fmt: skip
    rows = tuple(
        Row((cell(w.name), cell(w.rows), cell(w.context), cell(w.sequences), cell(w.seconds, "seconds"),
             cell(w.modelled, "seconds"), cell(w.error, "increase"), cell(w.overhead, "seconds"),
             cell(w.communication, "seconds"), cell(_verdict(w.verdict)), _remedies(w.remedies)))
        for w in point.why
    )  # fmt: skip
    return Table(f"why-{point.id}-phases", "Phases", columns, rows, source(report, point.command, point.device))


def _kinds(report: Report, point: Point, why: PhaseWhy, number: int) -> Table:
    columns = (Column("kind", numeric=False), Column("count"), Column("operations"), Column("bytes"),
               Column("intensity", "operations per byte"), Column("time"), Column("of phase"),
               Column("attained"), Column("reading"), Column("roof", "least time"), Column("of roof"),
               Column("overhead"), Column("error", "of the model"), Column("verdict", numeric=False),
               Column("remedies", numeric=False))  # fmt: skip
    rows = tuple(_kind_row(kind, why) for kind in why.kinds)
    return Table(f"why-{point.id}-{number}", f"{why.name}, by kind of instruction", columns, rows,
                 source(report, point.command, point.device))  # fmt: skip


def _kind_row(kind: KindVerdict, why: PhaseWhy) -> Row:
    per_second = 1 / kind.seconds if kind.seconds else None
    return Row((
        cell(kind.kind), cell(kind.count), cell(kind.operations, "ops"), cell(kind.bytes, "bytes"),
        cell(kind.intensity, "ops/byte"), cell(kind.seconds, "seconds"),
        cell(kind.seconds / why.seconds if why.seconds else None, "share"),
        cell(kind.operations * per_second if per_second else None, "ops/s"),
        cell(kind.bytes * per_second if per_second else None, "bytes/s"),
        cell(max(kind.memory_floor, kind.compute_floor), "seconds"), cell(kind.roof_share, "share"),
        cell(kind.overhead, "seconds"), cell(kind.error, "increase"), cell(_verdict(kind.verdict)),
        _remedies(kind.remedies),
    ))  # fmt: skip


def _remedies(remedies: tuple[Remedy, ...]) -> Text:
    if not remedies:
        return cell(None)
    return join([say("{} {} ({})", r.name, Number(r.gain, "factor"), r.rule) for r in remedies], "; ")
