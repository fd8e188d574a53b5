"""docs/kernels.md: its snippet runs, and its table names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import rlhf_kernels

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_the_snippet_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(snippet, "docs/kernels.md", "exec"), {})
    assert re.search(r"loss -?\d+\.\d{3}, clipped 0%", capsys.readouterr().out)


def test_the_table_names_every_function():
    functions = {name for name in rlhf_kernels.__all__ if name[0].islower()}
    assert set(re.findall(r"^\| `(\w+)\(", PAGE, flags=re.MULTILINE)) == functions
