"""`gristmill plan`: what a model will take and give on a device, and the devices that are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gristmill.cli_options import JSON
from gristmill.cli_output import echo_json, note, show_columns

if TYPE_CHECKING:
    from gristmill.report.devices import DeviceSpec
    from gristmill.report.plan import Entry, Plan, PlanOptions

MEASURED, LIST = "cpu", "list"


@click.command("plan", no_args_is_help=True)
@click.argument("model", required=False)
@click.option(
    "--device-spec", "device", default=MEASURED, show_default=True, metavar="NAME|FILE",
    help="The device: cpu measures this machine, list shows the known ones, FILE is JSON with their fields.",
)  # fmt: skip
@click.option(
    "--context", type=int,
    help="Positions before the decoded token.  [default: 1024, or what the model has]",
)  # fmt: skip
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences that decode together.")
@click.option(
    "--weights", metavar="FORMATS", help="With commas between.  [default: f16,fp8,int8,int4,int3,int2]"
)
@click.option("--kv", metavar="FORMATS", help="Of the KV cache.  [default: f16,int8,fp8,int4]")
@click.option("--threads", type=int, help="Of the CPU that is measured; default: one for each physical core.")
@JSON
def plan_command(
    model: str | None, device: str, context: int | None, batch: int, weights: str | None, kv: str | None,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Say what MODEL will take and give on a device: bytes, what fits, speed, and where computing takes over.

    MODEL is a Hugging Face directory, of which config.json is enough, a hub name, or an artifact. Nothing is
    compiled, and the device need not be there. "floor" is what the device's roofs allow, "expected" what the
    kernels of this project attain of them: see docs/plan.md.

    \b
    gristmill plan examples/py7m
    gristmill plan model/ --device-spec h200 --context 8192 --batch 32
    gristmill plan model/ --device-spec a10 --weights int4,int8 --kv f16,int8
    gristmill plan py7m.grist --json
    gristmill plan --device-spec list
    """
    from gristmill.report.plan import PlanOptions, plan

    if device == LIST:
        _show_devices(as_json)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'; --device-spec list needs none.")
    if threads is not None and device != MEASURED:
        raise click.UsageError("--threads is for --device-spec cpu")
    options = PlanOptions(_names(weights), _names(kv), context, batch)
    made = _plan(model, device, options, threads, plan)
    if as_json:
        echo_json(made.to_json())
    else:
        show_plan(made)


def _plan(model: str, device: str, options: PlanOptions, threads: int | None, plan: Any) -> Plan:
    from gristmill.report.devices import known_device

    if device != MEASURED:
        return plan(model, known_device(device), options)

    def measure(weights: tuple[str, ...], caches: tuple[str, ...]) -> DeviceSpec:
        from gristmill.report.cpu_probe import ProbeOptions, measure_cpu

        note("measuring this machine")
        return measure_cpu(ProbeOptions(weights, caches, threads))

    return plan(model, measure, options)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _show_devices(as_json: bool) -> None:
    from gristmill.report.devices import DEVICES, device_json

    if as_json:
        echo_json({name: device_json(spec) for name, spec in DEVICES.items()})
        return
    rows = [
        (
            name, spec.name, f"{spec.memory_bytes / 2**30:g}", f"{spec.bandwidth / 1e9:.0f}",
            *(_tera(ops) for ops in (spec.f32_ops, spec.f16_ops, spec.fp8_ops, spec.int8_ops)),
            str(spec.processors), f"{spec.pcie_bandwidth / 1e9:.0f}", spec.source,
        )
        for name, spec in DEVICES.items()
    ]  # fmt: skip
    columns = (
        "name", "device", "GiB", "GB/s", "f32", "bf16", "fp8", "int8", "SMs", "PCIe GB/s", "source",
    )  # fmt: skip
    show_columns(columns, rows, left=("name", "device", "source"))
    click.echo("\nf32 to int8: 10^12 dense operations per second. cpu: this machine, measured at once.")


def _tera(operations: float) -> str:
    return f"{operations / 1e12:.4g}" if operations else "-"


def show_plan(made: Plan) -> None:
    """The table, and what it says in words."""
    from gristmill.report.plan_text import lines, sequences

    device = made.device
    click.echo(
        f"{made.model} on {device.name} ({_size(made.usable_bytes)} usable, "
        f"{device.bandwidth / 1e9:.4g} GB/s): {sequences(made.batch)} after {made.context} positions\n"
    )
    columns = (
        "weights", "KV", "bits", "size", "read/token", "KV/position", "batch", "context", "floor", "expected",
        "prefill", "bound by", "break-even",
    )  # fmt: skip
    befores = [None, *made.entries[:-1]]
    rows = [_row(entry, before) for entry, before in zip(made.entries, befores, strict=True)]
    show_columns(columns, rows, left=("weights", "KV", "bound by"))
    click.echo(
        "\nbatch, context: the most that fit, of such sequences and of positions in each. floor, expected, "
        "prefill: tok/s.\nbreak-even: sequences at which computing takes over from reading weights, by the "
        "roofs.\n"
    )
    for line in lines(made):
        click.echo(line)


def _row(entry: Entry, before: Entry | None) -> tuple[str, ...]:
    """What belongs to the weights alone stands in the first row of a format."""
    first = before is None or before.weights != entry.weights
    of_weights = (entry.weights, f"{entry.bits_per_weight:.2f}", _size(entry.weight_bytes))
    weights, bits, size = of_weights if first else ("", "", "")
    speed = (
        (f"{entry.floor_tok_s:.4g}", f"{entry.tok_s:.4g}", f"{entry.prefill_tok_s:.4g}", entry.bound)
        if entry.fits
        else ("", "does not fit", "", "")
    )
    return (
        weights, entry.kv, bits, size, _size(entry.read_bytes), _size(entry.kv_bytes),
        str(entry.max_batch), str(entry.max_context), *speed,
        ("never" if entry.break_even_roof is None else str(entry.break_even_roof)) if first else "",
    )  # fmt: skip


def _size(size: int) -> str:
    from gristmill.runtime.report import size_text

    return size_text(size)
