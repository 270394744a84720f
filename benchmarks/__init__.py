"""Benchmarks: `python -m benchmarks list`, `python -m benchmarks NAME [options]`.

A benchmark is one file: a module of this folder with a typed function of the module's own name, whose parameters are
its options. The first line of the module's docstring is its sentence in `list`, the whole docstring its `--help`. What
benchmarks share is here too: `rows` (results files), `options`, `printing`, `stopwatch`.
"""
