"""The head of the page and the table of all points."""

from __future__ import annotations

from gristmill.report import choose
from gristmill.report.schema import Accuracy, Point, Report
from gristmill.report.tables import (
    Block,
    Card,
    Code,
    Column,
    Number,
    Row,
    Small,
    Source,
    Table,
    Tag,
    Text,
    cell,
    join,
    say,
)


def source(report: Report, command: str = "", device: str = "") -> Source:
    """What repeats a figure, and where and when it was measured; no device: on all of them."""
    machines = [report.machines[device]] if device in report.machines else list(report.machines.values())
    where = [f"{m.name}, {m.threads} threads" if m.threads > 1 else m.name for m in machines]
    where += [" ".join(item) for item in report.versions.items() if item[0] == "gristmill"]
    return Source(command or report.command, (*where, report.created[:10]))


def facts(report: Report) -> list[tuple[str, Text]]:
    """The head: what was measured on what."""
    rows = [("Model", cell(report.model))]
    for device, m in report.machines.items():
        rows.append(
            (
                f"Machine ({device})",
                say(
                    "{}, {} cores, {} threads used, {}, {}; {}. Measured here: reading {}, "
                    "float products {}, integer products {}",
                    m.name,
                    Number(m.cores, "count"),
                    Number(m.threads, "count"),
                    Number(m.memory_bytes, "bytes"),
                    m.isa,
                    m.system,
                    Number(m.read_bytes_s, "bytes/s"),
                    Number(m.float_ops_s, "ops/s"),
                    Number(m.integer_ops_s, "ops/s"),
                ),
            )
        )
    rows += [("Text", join(list(texts), "; ")) for texts in [_texts(report)] if texts]
    rows.append(
        ("Versions", cell(", ".join(f"{name} {version}" for name, version in report.versions.items())))
    )
    rows.append(
        (
            "Measured",
            say("{}{}", report.created.replace("T", " ").replace("+00:00", " UTC"), _duration(report)),
        )
    )
    rows += [("Remarks", cell("; ".join(report.remarks)))] if report.remarks else []
    rows.append(("Repeat", cell(Code(report.command))))
    return rows


def _duration(report: Report) -> Text:
    return say(", in {}", Number(report.seconds, "seconds")) if report.seconds else Text(())


def _texts(report: Report) -> list[Text]:
    """One for each text that was scored."""
    found: dict[tuple[str, str], Accuracy] = {}
    for point in choose.good(report):
        if point.accuracy:
            found.setdefault((point.accuracy.text, point.accuracy.text_sha256), point.accuracy)
    return [
        say(
            "{} (sha256 {}), {} tokens in windows of {}{}",
            a.text,
            a.text_sha256[:12],
            Number(a.tokens, "count"),
            Number(a.window, "count"),
            say(", beside {}", a.reference) if a.reference else say(""),
        )
        for a in found.values()
    ]


def promise() -> Number:
    """The increase of perplexity that the page takes for small."""
    return Number(choose.PROMISE, "limit")


def cards(report: Report) -> tuple[Card, ...]:
    """What to take: a card for each pick, or one that says that there is none."""
    found = tuple(_card(report, pick) for pick in choose.picks(report))
    none = say("No rounded point was sure to keep perplexity within +{} of the float model's.", promise())
    return found or (Card(say("Best"), "none", (none,)),)


def _card(report: Report, pick: choose.Pick) -> Card:
    point, base = pick.point, choose.reference(report, pick.point.device)
    speed = choose.decode_speed(report, point)
    other = choose.decode_speed(report, base) if base else None
    facts = []
    if speed:
        beside = say(", {} {}", Number(speed / other, "factor"), base.label) if base and other else say("")
        facts.append(say("decode {} tok/s{}", Number(speed, "tok/s"), beside))
    if point.memory:
        facts.append(say("{} on disk", Number(point.memory.artifact_bytes, "bytes")))
    if point.accuracy:
        facts.append(say("perplexity {}", _interval(point.accuracy)))
    title = say("{} on {} within +{} perplexity", pick.why.capitalize(), point.device, promise())
    return Card(title, point.label, tuple(facts))


_COLUMNS = (
    Column("point", numeric=False),
    Column("device", numeric=False),
    Column("size", "on disk"),
    Column("bits", "per weight"),
    Column("decode", "tok/s, one sequence"),
    Column("prefill", "tok/s"),
    Column("first token", "time to it"),
    Column("perplexity", "against float, 95 %"),
    Column("KL", "nats, mean"),
    Column("KL p99", "nats"),
    Column("top 1", "the same"),
    Column("top 5", "among them"),
    Column("peak memory", "of the process"),
)


def table(report: Report) -> Table:
    """Every point; failed ones at the end with their reason."""
    best = {(pick.point.id, pick.why) for pick in choose.picks(report)}
    ordered = [*choose.good(report), *(p for p in report.points if p.status != "ok")]
    rows = tuple(
        _row(report, point, [why for id, why in sorted(best) if id == point.id]) for point in ordered
    )
    decode, prefill = choose.decode_shape(report), choose.prefill_shape(report)
    columns = list(_COLUMNS)
    if decode:
        columns[4] = Column("decode", f"tok/s after {decode.context:,}")
    if prefill:
        columns[5] = Column("prefill", f"tok/s of {prefill.rows:,}")
    return Table(
        "summary-table",
        "Size, speed and accuracy",
        tuple(columns),
        rows,
        source(report),
        say(
            "Every column sorts. Dominated: another is at least as accurate and as fast or as small (both, "
            "where not said)."
        ),
    )


def _row(report: Report, point: Point, best: list[str]) -> Row:
    tags = [Tag(why, "good") for why in best]
    lost = [by for by in ("speed", "size") if choose.is_dominated(report, point, by)]
    if lost:
        tags.append(Tag("dominated" if len(lost) > 1 else f"dominated in {lost[0]}", "plain"))
    if point.status != "ok":
        tags.append(Tag("failed", "bad"))
    first = Text((point.label, *(part for tag in tags for part in (" ", tag))))
    marks = (
        *(["failed"] if point.status != "ok" else []),
        *(["dominated"] if len(lost) > 1 else []),
        *(["pick"] if best else []),
    )
    figures = (
        _figures(report, point) if point.status == "ok" else [cell(point.reason or "no reason was given")]
    )
    return Row((first, cell(point.device), *figures), marks)


def _figures(report: Report, point: Point) -> list[Text]:
    a, m, w = point.accuracy, point.memory, point.latency
    prefill = choose.speed_at(point, "prefill", choose.prefill_shape(report))
    return [
        cell(m.artifact_bytes if m else None, "bytes"),
        cell(m.bits_per_weight if m else None, "bits"),
        cell(choose.decode_speed(report, point), "tok/s"),
        cell(prefill.tokens_s if prefill else None, "tok/s"),
        cell(w.first_token if w else None, "seconds"),
        _interval(a),
        cell(a.kl.estimate if a else None, "nats"),
        cell(a.kl_p99 if a else None, "nats"),
        cell(a.top1_agreement if a else None, "share"),
        cell(a.top5_agreement if a else None, "share"),
        cell(m.peak_bytes if m else None, "bytes"),
    ]


def _interval(accuracy: Accuracy | None) -> Text:
    if accuracy is None:
        return cell(None)
    i = accuracy.ppl_increase
    low, high = Number(i.low, "increase"), Number(i.high, "increase")
    return say("{}{}", Number(i.estimate, "increase"), Small(say("{} to {}", low, high)))


def gaps(report: Report) -> tuple[Block, ...]:
    """What could not be measured of points that are otherwise good."""
    rows = tuple(
        Row((cell(p.label), cell(p.device), cell(p.reason))) for p in choose.good(report) if p.reason
    )
    columns = tuple(Column(name, numeric=False) for name in ("point", "device", "not measured, and why"))
    return (Table("gaps", "What was not measured", columns, rows, source(report)),) if rows else ()


def commands(report: Report) -> Table:
    """What repeats each point alone."""
    rows = tuple(
        Row(
            (
                cell(p.label),
                cell(p.device),
                cell(p.runtime),
                cell(p.content_id[:16] or None),
                cell(Code(p.compile_command) if p.compile_command else None),
                cell(Code(p.command) if p.command else None),
            )
        )
        for p in report.points
    )
    names = ("point", "device", "runtime", "content", "made by", "measured by")
    columns = tuple(Column(name, numeric=False) for name in names)
    return Table("commands", "The commands of each point", columns, rows, source(report))


_TERMS = (
    (
        "increase of perplexity",
        "of the artifact against the float model on the same tokens, with the 95 % interval "
        "of a paired bootstrap over blocks of tokens",
    ),
    (
        "KL",
        "how far the distribution of the next token is from the float model's, nats per token; 0: the same",
    ),
    (
        "fastest, smallest",
        "of the rounded points whose increase of perplexity stays within 1 % with its whole interval",
    ),
    (
        "dominated",
        "another point on the same device diverges no more and is at least as fast (or as small), and "
        "better in one of both: there is no reason to take it",
    ),
    (
        "roof",
        "the least time that bytes over the measured read stream and operations over the measured peak allow",
    ),
    ("memory-bound", "reading bytes sets the pace: fewer bits or more rows at once help"),
    ("compute-bound", "arithmetic sets the pace: cheaper products help"),
    (
        "overhead-bound",
        "time that does not grow with the work sets the pace: fewer and larger instructions help",
    ),
    ("communication-bound", "waiting for other devices sets the pace"),
    (
        "predicted gain",
        "how many times as fast the phase would be by the model "
        "time = max(bytes / read stream, operations / peak) + overhead",
    ),
)


def terms() -> Table:
    columns = (Column("word", numeric=False), Column("meaning", numeric=False))
    return Table("terms", "Words", columns, tuple(Row((cell(word), cell(text))) for word, text in _TERMS))
