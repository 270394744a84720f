"""Tests here share helper modules: pictured."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
