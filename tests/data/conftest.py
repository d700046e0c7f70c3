"""The scripts in data/models are run in place, not installed: tests import them from there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data" / "models"))
