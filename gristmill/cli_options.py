"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from gristmill.runtime.devices import DEVICES


def named_adapters(
    context: click.Context, option: click.Parameter, given: tuple[str, ...] | str | None
) -> dict[str, str]:
    """NAME=DIR texts as a mapping; DIR alone has the folder's name."""
    found: dict[str, str] = {}
    for text in (given,) if isinstance(given, str) else given or ():
        name, equals, folder = text.partition("=")
        name, folder = (name, folder) if equals else (Path(text).resolve().name, text)
        if not name or not folder:
            raise click.BadParameter(f"{text!r} is not NAME=DIR, such as sql=adapters/sql")
        if name in found:
            raise click.BadParameter(f"the name {name!r} is given twice")
        found[name] = folder
    return found


ARTIFACT = click.argument("artifact", type=click.Path())
THREADS = click.option("--threads", type=int, help="Threads; default: one for each physical core.")
DEVICE = click.option(
    "--device",
    type=click.Choice(list(DEVICES)),
    default="cpu",
    show_default=True,
    help="Where to run; onnx:cpu, onnx:cuda, torchscript and pt2:cpu: folders from `export --to onnx`, "
    "`--to torchscript` and `--to pt2`.",
)
TENSOR_PARALLEL = click.option(
    "--tensor-parallel",
    type=int,
    help="Processes that share the model, its products and --threads; on `--device cuda` with a GPU each.  "
    "[default: 1]",
)
PIN = click.option("--pin", is_flag=True, help="Keep each thread on a processor of its own.")
HUGEPAGES = click.option(
    "--hugepages",
    is_flag=True,
    help="Copy the weights into huge pages: starts later, helps on some machines.",
)
MAX_LEN = click.option("--max-len", type=int, help="Positions to make room for; default: as compiled.")
ADAPTER = click.option(
    "--adapter", metavar="NAME=DIR", callback=named_adapters,
    help="PEFT adapter (DIR alone, or with a name) that changes the model.",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
