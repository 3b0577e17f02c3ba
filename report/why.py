"""Why a point is as fast as it is: phases, kinds of instructions, their roofs, and what would help next."""

from __future__ import annotations

from gristmill.report import choose
from gristmill.report.schema import Bottleneck, KindVerdict, PhaseWhy, Point, Remedy, Report
from gristmill.report.summary import source
from gristmill.report.tables import (
    Block,
    Column,
    Group,
    Heading,
    Number,
    Row,
    Table,
    Tag,
    Text,
    cell,
    join,
    say,
    slug,
)


def blocks(report: Report) -> tuple[Block, ...]:
    """All phases of all points in one table, then a group for each point; the first pick's is open."""
    points = [point for point in choose.good(report) if point.why]
    if not points:
        return ()
    best = next((pick.point for pick in choose.picks(report) if pick.point in points), points[0])
    return (_phases(report, points), *(_group(report, point, point is best) for point in points))


def verdict(name: Bottleneck) -> Tag:
    return Tag(f"{name}-bound", name)


def _phases(report: Report, points: list[Point]) -> Table:
    split = any(why.communication is not None for point in points for why in point.why)
    columns = (
        Column("point", numeric=False),
        Column("device", numeric=False),
        Column("phase", numeric=False),
        Column("rows"),
        Column("context"),
        Column("sequences"),
        Column("measured"),
        Column("model"),
        Column("error", "of the model"),
        Column("overhead"),
        *([Column("communication")] if split else []),
        Column("verdict", numeric=False),
        Column("next remedy", "predicted gain", numeric=False),
    )
    rows = tuple(_phase_row(point, why, split) for point in points for why in point.why)
    return Table("why-phases", "Phases and their verdicts", columns, rows, source(report))


def _phase_row(point: Point, why: PhaseWhy, split: bool) -> Row:
    best = max(why.remedies, key=lambda r: r.gain, default=None)
    return Row(
        (
            cell(point.label),
            cell(point.device),
            cell(why.name),
            cell(why.rows),
            cell(why.context),
            cell(why.sequences),
            cell(why.seconds, "seconds"),
            cell(why.modelled, "seconds"),
            cell(why.error, "increase"),
            cell(why.overhead, "seconds"),
            *([cell(why.communication, "seconds")] if split else []),
            cell(verdict(why.verdict)),
            say("{} {}", best.name, Number(best.gain, "factor")) if best else cell(None),
        )
    )


def _group(report: Report, point: Point, is_open: bool) -> Group:
    inside: list[Block] = []
    for i, why in enumerate(point.why):
        inside.append(Heading(say("{} {}", why.name, verdict(why.verdict)), _reason(why)))
        inside.append(_kinds(point, why, i))
        inside += _remedies(point, why, i)
    verdicts = join([say("{} {}", why.name, verdict(why.verdict)) for why in point.why], " · ")
    title = say("{} on {}", point.label, point.device)
    where = source(report, point.command, point.device)
    return Group(f"why-{slug(point.id)}", title, verdicts, tuple(inside), is_open, where)


def _reason(why: PhaseWhy) -> Text:
    """With the roofs that the phase was held to, where they were measured for it."""
    if not why.read_bytes_s:
        return cell(why.reason)
    return say(
        "{}. Held to a read stream of {}, float products {}, integer products {}.",
        why.reason.rstrip("."),
        Number(why.read_bytes_s, "bytes/s"),
        Number(why.float_ops_s, "ops/s"),
        Number(why.integer_ops_s, "ops/s"),
    )


def _kinds(point: Point, why: PhaseWhy, number: int) -> Table:
    columns = (
        Column("kind", numeric=False),
        Column("count"),
        Column("operations"),
        Column("bytes"),
        Column("intensity", "per byte"),
        Column("time"),
        Column("share", "of the phase"),
        Column("attained", "operations"),
        Column("attained", "bytes"),
        Column("memory", "least time"),
        Column("compute", "least time"),
        Column("roof", "reached"),
        Column("overhead"),
        Column("error", "of the model"),
        Column("verdict", numeric=False),
    )
    rows = tuple(_kind_row(kind, why) for kind in why.kinds)
    return Table(f"why-{slug(point.id)}-{number}", "Kinds of instructions", columns, rows)


def _kind_row(kind: KindVerdict, why: PhaseWhy) -> Row:
    rate = 1 / kind.seconds if kind.seconds else None
    return Row(
        (
            cell(kind.kind),
            cell(kind.count),
            cell(kind.operations, "ops"),
            cell(kind.bytes, "bytes"),
            cell(kind.intensity, "ops/byte"),
            cell(kind.seconds, "seconds"),
            cell(kind.seconds / why.seconds if why.seconds else None, "share"),
            cell(kind.operations * rate if rate else None, "ops/s"),
            cell(kind.bytes * rate if rate else None, "bytes/s"),
            cell(kind.memory_floor, "seconds"),
            cell(kind.compute_floor, "seconds"),
            cell(kind.roof_share, "share"),
            cell(kind.overhead, "seconds"),
            cell(kind.error, "increase"),
            cell(Tag(kind.verdict, kind.verdict)),
        )
    )


def _remedies(point: Point, why: PhaseWhy, number: int) -> list[Block]:
    """Of the phase and of its kinds, where there are any."""
    rows = [_remedy_row("the phase", remedy) for remedy in why.remedies]
    rows += [_remedy_row(kind.kind, remedy) for kind in why.kinds for remedy in kind.remedies]
    columns = (
        Column("of", numeric=False),
        Column("remedy", numeric=False),
        Column("predicted gain"),
        Column("computed by", numeric=False),
    )
    return (
        [Table(f"why-{slug(point.id)}-{number}-next", "What would help next", columns, tuple(rows))]
        if rows
        else []
    )


def _remedy_row(of: str, remedy: Remedy) -> Row:
    return Row((cell(of), cell(remedy.name), cell(remedy.gain, "factor"), Text((remedy.rule,))))
