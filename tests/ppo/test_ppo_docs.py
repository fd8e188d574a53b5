"""The examples of docs/rewards.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.ppo.scoring import score_responses

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_rewards_of_the_page_score() -> None:
    names: dict[str, Any] = {}
    for code in CODE:
        exec(compile(code, str(PAGE), "exec"), names)
    rows = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 2?", "answer": "4"}]
    scores = score_responses(names["reward"], rows, ["It is 2", "5"])
    assert scores.tolist() == pytest.approx([1.0 - 0.2 * 0.07, -0.2 * 0.01])
    assert names["remote"].batch_size == 64
