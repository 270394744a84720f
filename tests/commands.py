"""The command line in a test: `mpsearch` in this process, which has imported torch already."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from mpsearch.cli import main

Done = subprocess.CompletedProcess[str]


def mpsearch(*arguments: str | Path, cwd: Path, columns: int = 160) -> Done:
    """The command as a shell runs it, but in this process: seconds less for each of the many commands."""
    command = ["mpsearch", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", command),
        patch.object(sys, "path", [*sys.path]),
        patch.dict(os.environ, {"COLUMNS": str(columns)}),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return Done(command, int(ended.value.code or 0), out.getvalue(), err.getvalue())
