"""The commands, and nothing else: each reads its arguments, calls one function and prints what came of it.

Exit codes: 0 done; 2 the input is wrong (one message, no traceback); 1 our fault; 130 interrupted.
"""

from mpsearch.cli import studies, runs, networks, results, hardware  # noqa: F401, I001  (in the order of `mpsearch --help`)
from mpsearch.cli.base import app, main

__all__ = ["app", "main"]
