"""The README's snippets run as pasted, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from word_models import save_word_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_kernels_snippet() -> None:
    snippet = next(text for text in SNIPPETS if "import gae" in text or "gae," in text)
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["logits"].grad is not None
    assert names["loss"].isfinite()


def test_trainer_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = next(text for text in SNIPPETS if "PPOTrainer" in text)
    model = save_word_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    # The same lines on a model that is at hand, and fewer updates.
    snippet = snippet.replace("path/or/hub-id", model).replace(
        "total_updates=20", "total_updates=1"
    )
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "runs/brief/model.safetensors").exists()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
