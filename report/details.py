"""Tables of the single sections: worst tokens, last words, memory, energy."""

from __future__ import annotations

from gristmill.report import choose
from gristmill.report.clean import context, visible
from gristmill.report.schema import Point, Report, WorstToken
from gristmill.report.summary import source
from gristmill.report.tables import Block, Code, Column, Group, Number, Row, Table, cell, say, slug

CONTEXT = 60  # characters of a worst token's text before it


def worst_tokens(report: Report) -> tuple[Block, ...]:
    points = [point for point in choose.good(report) if point.accuracy and point.accuracy.worst]
    best = next(
        (pick.point for pick in choose.picks(report) if pick.point in points), points[0] if points else None
    )
    return tuple(_worst_group(report, point, point is best) for point in points)


def _worst_group(report: Report, point: Point, is_open: bool) -> Group:
    assert point.accuracy is not None
    worst = point.accuracy.worst
    columns = (
        Column("KL", "nats"),
        Column("position"),
        Column("text before", numeric=False),
        Column("what came", numeric=False),
        Column("float model", "its choice", numeric=False),
        Column("this point", "its choice", numeric=False),
        Column("probability", "in the float model"),
        Column("here", "probability"),
    )
    table = Table(
        f"worst-{slug(point.id)}",
        "Tokens whose prediction diverges most from the float model's",
        columns,
        tuple(_worst_row(w) for w in worst),
        source(report, point.command, point.device),
    )
    title = say("Worst tokens of {} on {}", point.label, point.device)
    aside = say("worst {} nats", Number(max(w.kl for w in worst), "nats"))
    return Group(f"worst-{slug(point.id)}-group", title, aside, (table,), is_open)


def _worst_row(w: WorstToken) -> Row:
    before = w.before if len(w.before) <= CONTEXT else f"…{w.before[-CONTEXT:]}"
    return Row(
        (
            cell(w.kl, "nats"),
            cell(w.position),
            cell(Code(context(before), "before")),
            cell(Code(visible(w.token), "mark")),
            cell(Code(visible(w.reference_choice), "token")),
            cell(Code(visible(w.choice), "token")),
            cell(w.reference_probability, "probability"),
            cell(w.probability, "probability"),
        )
    )


def last_words(report: Report) -> tuple[Block, ...]:
    rows = tuple(
        Row(
            (
                cell(p.label),
                cell(p.device),
                cell(p.accuracy.last_word.accuracy, "share"),
                cell(p.accuracy.last_word.low, "share"),
                cell(p.accuracy.last_word.high, "share"),
                cell(p.accuracy.last_word.passages),
            )
        )
        for p in choose.good(report)
        if p.accuracy and p.accuracy.last_word
    )
    columns = (
        Column("point", numeric=False),
        Column("device", numeric=False),
        Column("right"),
        Column("lowest"),
        Column("highest"),
        Column("passages"),
    )
    return (Table("last-word", "Last words of passages", columns, rows, source(report)),) if rows else ()


def memory(report: Report) -> tuple[Block, ...]:
    columns = (
        Column("point", numeric=False),
        Column("device", numeric=False),
        Column("on disk"),
        Column("bits", "per weight"),
        Column("KV cache"),
        Column("resident", "while decoding"),
        Column("peak"),
        Column("compile", "time"),
        Column("load", "time"),
    )
    rows = tuple(
        Row(
            (
                cell(p.label),
                cell(p.device),
                cell(m.artifact_bytes, "bytes"),
                cell(m.bits_per_weight, "bits"),
                cell(m.kv_bytes, "bytes"),
                cell(m.resident_bytes, "bytes"),
                cell(m.peak_bytes, "bytes"),
                cell(p.compile_seconds, "seconds"),
                cell(p.load_seconds, "seconds"),
            )
        )
        for p in choose.good(report)
        if (m := p.memory)
    )
    return (Table("memory-table", "Sizes", columns, rows, source(report)),) if rows else ()


def energy(report: Report) -> tuple[Block, ...]:
    columns = (
        Column("point", numeric=False),
        Column("device", numeric=False),
        Column("per token"),
        Column("tokens per joule"),
        Column("measured by", numeric=False),
    )
    rows = tuple(
        Row(
            (
                cell(p.label),
                cell(p.device),
                cell(e.joules_per_token, "joules"),
                cell(1 / e.joules_per_token if e.joules_per_token else None),
                cell(e.source),
            )
        )
        for p in choose.good(report)
        if (e := p.energy)
    )
    return (Table("energy-table", "Energy of decoding", columns, rows, source(report)),) if rows else ()


def speeds(report: Report) -> tuple[Block, ...]:
    """Every forward that was timed."""
    columns = (
        Column("point", numeric=False),
        Column("device", numeric=False),
        Column("phase", numeric=False),
        Column("rows"),
        Column("context"),
        Column("sequences"),
        Column("time"),
        Column("tok/s"),
        Column("of the roof"),
        Column("rounds"),
    )
    rows = tuple(
        Row(
            (
                cell(p.label),
                cell(p.device),
                cell(s.phase),
                cell(s.rows),
                cell(s.context),
                cell(s.sequences),
                cell(s.seconds, "seconds"),
                cell(s.tokens_s, "tok/s"),
                cell(s.roof_share, "share"),
                cell(s.rounds),
            )
        )
        for p in choose.good(report)
        for s in p.speed
    )
    if not rows:
        return ()
    table = Table("speeds", "All timed forwards", columns, rows, source(report))
    count = say("{} of them", Number(len(rows), "count"))
    return (Group("speeds-group", say("All timed forwards"), count, (table,)),)
