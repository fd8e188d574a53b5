"""What a command line or a YAML file names: data, perhaps a slice of it, and rewards."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.data import (
    DataError,
    Demonstration,
    PreferencePair,
    load_rows,
    to_demonstrations,
    to_preferences,
    to_prompts,
)

_SLICE = re.compile(r"^(?P<source>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")


def split_slice(source: str) -> tuple[str, slice]:
    """``"pairs.jsonl[:2000]"`` as ``("pairs.jsonl", slice(None, 2000))``; no brackets, all rows."""
    match = _SLICE.match(source)
    if match is None:
        return source, slice(None)
    start, stop = (int(match[name]) if match[name] else None for name in ("start", "stop"))
    return match["source"], slice(start, stop)


def read_rows(source: Any) -> Any:
    """Rows of anything ``rlhf.data.load_rows`` reads; a name may end with a Python slice.

    Raises:
        DataError: It cannot be read, or the slice has no rows.
    """
    if not isinstance(source, str):
        return load_rows(source)
    name, part = split_slice(source)
    rows = load_rows(name)
    indices = range(*part.indices(len(rows)))
    if not indices:
        raise DataError(f"{source}: the slice holds none of the {len(rows)} rows; change it.")
    return rows if len(indices) == len(rows) else rows.select(indices)


def read_demonstrations(source: Any) -> list[Demonstration]:
    """Demonstrations from a source that ``read_rows`` reads; rows count from the slice's first."""
    return to_demonstrations(read_rows(source), _name(source))


def read_preferences(source: Any) -> list[PreferencePair]:
    """Preference pairs from a source that ``read_rows`` reads."""
    return to_preferences(read_rows(source), _name(source))


def read_prompts(source: Any) -> list[dict[str, Any]]:
    """Prompts with their other columns, from a source that ``read_rows`` reads."""
    return to_prompts(read_rows(source), _name(source))


def load_reward(name: str) -> Callable[..., Any]:
    """A reward by name.

    Args:
        name: ``heuristic`` (simple patterns in the text, a toy); a folder that ``rlhf reward``
            wrote or any one-label sequence classifier; or a Python function ``file.py:function`` or
            ``package.module:function``, called as ``f(prompts, responses, **columns)``.

    Raises:
        ValueError: There is no such reward; the message says what was looked for.
    """
    if name == "heuristic":
        from rlhf.rewards import HeuristicReward

        return HeuristicReward()
    module_name, colon, function_name = name.rpartition(":")
    if colon and function_name.isidentifier():
        return _function(module_name, function_name, name)
    from rlhf.reward import RewardModel

    return RewardModel.from_pretrained(name)


def _function(module_name: str, function_name: str, name: str) -> Callable[..., Any]:
    module = _module(module_name, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward {name!r}: {module_name} has no function {function_name!r}")
    return function


def _module(module_name: str, name: str) -> Any:
    if not module_name.endswith(".py"):
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name.split(".")[0] and error.name != module_name:
                raise  # the module is there and lacks something itself
            raise ValueError(
                f"reward {name!r}: there is no module {module_name!r}. For a file, write "
                "path/to/file.py:function."
            ) from error
    path = Path(module_name).expanduser()
    if not path.is_file():
        raise ValueError(f"reward {name!r}: there is no file {module_name}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "data"
