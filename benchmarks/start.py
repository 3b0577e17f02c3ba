"""How long a new process takes to its first token, and how much memory it then has.

Every round starts a Python that imports gristmill, loads the artifact and generates; the time runs from
before the process exists. Files are in the system's cache from the second round on: the first does not count.

    python benchmarks/start.py tinyllama.grist --rounds 9
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click

from gristmill.runtime.artifact import open_artifact

CHILD = """
import json, sys, time
begin = time.perf_counter()
import gristmill
imported = time.perf_counter()
session = gristmill.load(sys.argv[1], threads=int(sys.argv[2]), max_slots=1, max_len=int(sys.argv[3]))
loaded = time.perf_counter()
stream = session.stream([300 % session.vocabulary] * 8, max_new_tokens=int(sys.argv[4]), ignore_eos=True)
next(stream)
print(flush=True)
for piece in stream:
    pass
from gristmill.runtime.machine import resident_bytes
print(json.dumps({"import_s": imported - begin, "load_s": loaded - imported, "kv": session.executor.kv_bytes,
                  "resident": resident_bytes()}))
"""


def one_start(artifact: Path, threads: int, length: int, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, str(artifact.absolute()), str(threads), str(length), str(tokens)]
    begin = time.perf_counter()
    # not from the repository's root, whose folders would stand in for the installed package
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        child.stdout.readline()
        first = time.perf_counter() - begin
        facts = child.stdout.read()
    if child.returncode:
        raise click.ClickException(f"the process ended with exit code {child.returncode}")
    return {"first_token_s": first, **json.loads(facts)}


@click.command(help=__doc__)
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", default=2, show_default=True)
@click.option("--max-len", "length", default=512, show_default=True)
@click.option("--tokens", default=100, show_default=True, help="Generated before memory is looked at.")
@click.option("--rounds", default=7, show_default=True)
def main(artifact: Path, threads: int, length: int, tokens: int, rounds: int) -> None:
    found = [one_start(artifact, threads, length, tokens) for _ in range(rounds + 1)][1:]
    middle = {name: median(row[name] for row in found) for name in found[0]}
    size = sum(entry.size for entry in open_artifact(str(artifact)).files.values())
    beyond = middle["resident"] - size - middle["kv"]
    times = " ".join(f"{row['first_token_s']:.3f}" for row in found)
    click.echo(
        f"first token after {middle['first_token_s']:.3f} s ({times}), of which import "
        f"{middle['import_s']:.3f} and load {middle['load_s']:.3f}"
    )
    click.echo(
        f"resident {middle['resident'] / 1e6:.0f} MB: artifact {size / 1e6:.0f}, KV "
        f"{middle['kv'] / 1e6:.0f}, beyond them {beyond / 1e6:.0f}"
    )


if __name__ == "__main__":
    main()
