"""Writing a directory that appears complete or not at all, in place of an earlier one only when asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gristmill.runtime.errors import GristmillError


@contextmanager
def new_folder(out: str | Path, force: bool, is_export: Callable[[set[str]], bool]) -> Iterator[Path]:
    """A directory beside `out`, which takes its place when the block ends well.

    is_export: whether a directory with these names is an earlier export, which `force` may replace. Raises
    GristmillError where something else is there.
    """
    target = Path(out).resolve()
    _check_target(target, force, is_export)
    staging = target.parent / f".{target.name}.tmp-{os.getpid()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir()
    try:
        yield staging
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_target(target: Path, force: bool, is_export: Callable[[set[str]], bool]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise GristmillError(f"{target} is a file; give the name of a directory to be made")
    names = {path.name for path in target.iterdir()}
    if names and not force:
        raise GristmillError(f"{target} exists; use --force (force=True) to replace it")
    if names and not is_export(names):
        raise GristmillError(f"{target} exists and is not an export; remove it or give another name")
