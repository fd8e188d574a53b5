"""Benchmarks for the machine at hand: `python -m rlhf_kernels.bench`, see `docs/benchmarks.md`.

An operation is one file under `operations/`, a library to compare with one file under `peers/`.
"""
