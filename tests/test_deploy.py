"""The files of examples/deploy, as far as they can be tried without a container engine."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from gristmill.cli import cli

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"


def served_with(words: list[str]) -> None:
    """The words are a call of `gristmill serve` whose options exist and are well-formed."""
    assert Path(words[0]).name == "gristmill" and words[1] == "serve"
    serve = cli.commands["serve"]
    options = [word.replace("${CREDENTIALS_DIRECTORY}", str(ROOT)) for word in words[2:]]
    options = [str(ROOT / "README.md") if option.startswith(f"{ROOT}/keys") else option for option in options]
    serve.make_context("serve", options, parent=click.Context(cli))


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_the_image_is_the_runtime_alone_and_not_root() -> None:
    found = instructions()
    last_stage = found[max(i for i, (word, _) in enumerate(found) if word == "FROM") :]
    kinds = [word for word, _ in last_stage]
    assert "slim" in last_stage[0][1] and kinds.index("USER") < kinds.index("ENTRYPOINT")
    assert dict(last_stage)["USER"] != "root"
    copies = [rest for word, rest in last_stage if word == "COPY"]
    assert copies == ["--from=build /opt/gristmill /opt/gristmill"]
    assert "[compile" not in (DEPLOY / "Dockerfile").read_text()
    (entry,) = (rest for word, rest in last_stage if word == "ENTRYPOINT")
    served_with([part.strip('"') for part in entry.strip("[]").split(", ")])
    for name in ("constraints.txt", "setup.py", "pyproject.toml", "MANIFEST.in"):
        assert (ROOT / name).exists()  # what its build needs of the context
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert not {"compiler", "kernels", "runtime", "setup.py", "README.md", "LICENSE"} & set(ignored)


def test_the_health_check_of_the_image_is_python() -> None:
    (check,) = (rest for word, rest in instructions() if word == "HEALTHCHECK")
    program = check.split("CMD", 1)[1].strip().strip("[]").split(", ", 2)[2].strip('"')
    compile(program, "health", "exec")
    assert "/health" in program


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "gristmill.service").read_text().splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_starts_the_server_and_stops_it_gently() -> None:
    found = unit()
    words = shlex.split(found["ExecStart"][0])
    served_with(words)
    grace = float(words[words.index("--grace") + 1])
    assert float(found["TimeoutStopSec"][0]) > grace and found["KillSignal"] == ["SIGTERM"]
    assert found["DynamicUser"] == found["NoNewPrivileges"] == ["yes"]


def test_systemd_knows_every_line(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (Debian's package systemd)")
    text = (
        (DEPLOY / "gristmill.service")
        .read_text()
        .replace("/opt/gristmill/bin/gristmill", shutil.which("true") or "")
    )
    (tmp_path / "gristmill.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "gristmill.service")],
        capture_output=True, text=True,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "gristmill.service" in line]
    assert not complaints, complaints
