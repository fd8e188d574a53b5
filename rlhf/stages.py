"""Stages of a run: done once, remembered by a marker, and never mixed up with other settings.

A stage owns a folder. Its marker ``stage.json`` is written last, so a folder that has one is
complete; a training outside the run that writes to the folder takes the marker away. It holds the
settings that the stage ran with and the identity of the stages it was made from; a later run with
the same ones skips the stage, and with others it stops and names what differs instead of mixing old
results with new ones.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.engine import ensure_writable
from rlhf.engine.resume import WITHOUT_EFFECT, differences
from rlhf.engine.saving import STAGE_MARKER as MARKER
from rlhf.files import write_json


class StageError(ValueError):
    """A finished stage does not fit the present settings, or its marker cannot be read."""


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: Also the name of its folder.
        title: What it does, in a short plain sentence.
        takes: What goes in, in words.
        gives: What comes out, in words.
        settings: Everything that decides the result; JSON values.
        run: Does the work in the folder it is given and returns a JSON summary.
        needs: Names of the stages whose results it uses.
        check: Raises if what the stage is given cannot be used. Called before the first stage that
            is not done, so that a long run does not stop at a mistake in its last part.
    """

    name: str
    title: str
    takes: str
    gives: str
    settings: Mapping[str, Any]
    run: Callable[[Path], dict[str, Any]]
    needs: tuple[str, ...] = ()
    check: Callable[[], None] = lambda: None


@dataclass
class StageRunner:
    """Runs stages in order under one folder.

    Args:
        output_dir: The run's folder; each stage gets a folder in it.
        stages: In an order in which each follows those it needs.
        say: Called with each line meant for the person watching.
    """

    output_dir: Path
    stages: Sequence[Stage]
    say: Callable[[str], None] = print
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> dict[str, dict[str, Any]]:
        """Run what is not done yet; return every stage's summary by name.

        Raises:
            OutputError: The folder cannot be written to.
            StageError: A finished stage has other settings; nothing was run.
            Exception: What the check of a stage that is not done raises; nothing was run.
        """
        ensure_writable(self.output_dir)
        self.check()
        for stage in self.stages:
            if self.marker(stage.name) is None:
                stage.check()
        for number, stage in enumerate(self.stages, start=1):
            heading = f"[{number}/{len(self.stages)}] {stage.name}: "
            marker = self.marker(stage.name)
            if marker is not None:
                seconds = f"{marker['seconds']:.0f} s"
                self.say(heading + f"already done (it took {seconds}); kept.")
            else:
                self.say(heading + stage.title)
                marker = self._run_stage(stage)
                self.say(f"      done in {marker['seconds']:.0f} s.")
            self.results[stage.name] = marker["result"]
        return self.results

    def check(self) -> None:
        """Raise StageError, naming the difference, if a finished stage cannot be kept."""
        for index, stage in enumerate(self.stages):
            marker = self.marker(stage.name)
            if marker is None:
                continue
            problems = differences(marker["settings"], plain(stage.settings))
            for needed in stage.needs:
                earlier = self.marker(needed)
                if earlier is None:
                    problems.append(f"it was made from a {needed} stage that is no longer there")
                elif marker["made_from"].get(needed) != earlier["id"]:
                    problems.append(f"it was made from an earlier {needed} stage")
            if problems:
                raise StageError(self._explain(index, problems))

    def marker(self, name: str) -> dict[str, Any] | None:
        """A stage's marker, or None if it is not finished."""
        path = self.output_dir / name / MARKER
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            marker = json.loads(text)
            if not {"id", "settings", "made_from", "result", "seconds"} <= marker.keys():
                raise ValueError("a key is missing")
        except (ValueError, AttributeError) as error:
            raise StageError(
                f"{path} is damaged ({error}). Delete {path.parent} to redo the stage."
            ) from error
        return marker

    def describe(self) -> str:
        """What each stage takes and gives, and whether it is done."""
        lines = []
        for number, stage in enumerate(self.stages, start=1):
            state = "done" if self.marker(stage.name) else "to do"
            lines += [
                f"{number}. {stage.name} ({state}): {stage.title}",
                f"   takes  {stage.takes}",
                f"   gives  {stage.gives} -> {self.output_dir / stage.name}",
            ]
        return "\n".join(lines)

    def _run_stage(self, stage: Stage) -> dict[str, Any]:
        folder = ensure_writable(self.output_dir / stage.name)
        made_from = {name: (self.marker(name) or {}).get("id") for name in stage.needs}
        start = time.monotonic()
        result = stage.run(folder)
        marker = {
            "stage": stage.name,
            "id": uuid.uuid4().hex,
            "settings": plain(stage.settings),
            "made_from": made_from,
            "seconds": round(time.monotonic() - start, 1),
            "result": result,
        }
        write_json(folder / MARKER, marker)
        return marker

    def _explain(self, index: int, problems: list[str]) -> str:
        stage = self.stages[index]
        stale = {stage.name}
        for later in self.stages[index + 1 :]:
            if stale & set(later.needs):
                stale.add(later.name)
        folders = [
            str(self.output_dir / s.name)
            for s in self.stages
            if s.name in stale and (self.output_dir / s.name).exists()
        ]
        listed = "".join(f"\n  - {problem}" for problem in problems)
        return (
            f"the stage {stage.name!r} in {self.output_dir} is finished, but does not fit this "
            f"run:{listed}\nGo back to the earlier settings, choose another output folder, or "
            f"delete what has to be redone:\n  rm -r {' '.join(folders)}"
        )


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, without those that have no effect on results."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {k: v for k, v in dataclasses.asdict(value).items() if k not in WITHOUT_EFFECT}
        values[key] = value
    return json.loads(json.dumps(values, default=str))
