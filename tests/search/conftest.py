"""Puts this folder on the path, so that tests, and the Ray workers that they start, can import `drive`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
