"""`PYTHON report/peers ...`: the folder's modules under the package name `peers`, whatever else is there."""

import importlib
import sys
from pathlib import Path

sys.path[0:1] = []  # the folder itself, whose files are no modules of their own
sys.path.append(str(Path(__file__).resolve().parents[1]))
importlib.import_module("peers.commands").main()
