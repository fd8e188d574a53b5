"""The examples of docs/data.md are read and run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import load_rows, to_demonstrations, to_preferences, to_prompts

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCKS = re.findall(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
ROWS = [(kind, text) for language, kind, text in BLOCKS if language == "jsonl"]
CODE = [text for language, _, text in BLOCKS if language == "python"]
CONVERT: dict[str, Any] = {
    "demonstrations": to_demonstrations,
    "preferences": to_preferences,
    "prompts": to_prompts,
}


def test_every_form_has_an_example() -> None:
    kinds = [kind for kind, _ in ROWS]
    assert (kinds.count("demonstrations"), kinds.count("preferences"), kinds.count("prompts")) == (
        3,
        3,
        1,
    )


@pytest.mark.parametrize(("kind", "text"), ROWS)
def test_rows(tmp_path: Path, kind: str, text: str) -> None:
    path = tmp_path / "example.jsonl"
    path.write_text(text)
    assert len(CONVERT[kind](load_rows(path), str(path))) == 2


@pytest.mark.parametrize("code", CODE)
def test_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, plain_tokenizer: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {"tokenizer": plain_tokenizer})
