"""The Python API: a function for every command, with its name and its arguments, that returns values.

`mpsearch.run("digits", trials=9)` is `mpsearch run digits --trials 9`. Options that only say how a command prints
(`--json`, `--csv`, `--costs`) have no argument here: what a function returns has `to_json()`, and a table is a
DataFrame. `set` is `--set`: a list of `key.path=value`. Where a command takes a study, a StudySpec will do too. Long
commands tell an `mpsearch.Observer` what happens.

Errors are `mpsearch.MpsearchError` where the input is wrong; the message says what was given, what was expected and
what to do, in the words of the command line.

What is heavy (torch, Ray, plotly) is imported when a function needs it: looking at a run needs none of it.
"""

from mpsearch.api import hardware, networks, results, runs, studies

__all__ = ["hardware", "networks", "results", "runs", "studies"]
