"""Rewards as a command line names them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_reward(name: str) -> Callable[..., Any]:
    """A reward by name.

    Args:
        name: ``heuristic`` (simple patterns in the text, a toy); a folder that ``rlhf reward``
            wrote or any one-label sequence classifier; or a Python function ``file.py:function`` or
            ``package.module:function``, called as ``f(prompts, responses, **columns)``; or the
            ``http://`` address of one (see ``HTTPReward``).

    Raises:
        ValueError: There is no such reward; the message says what was looked for.
    """
    if name.startswith(("http://", "https://")):
        from rlhf.http_reward import HTTPReward

        return HTTPReward(name)
    if name == "heuristic":
        from rlhf.rewards import HeuristicReward

        return HeuristicReward()
    module_name, colon, function_name = name.rpartition(":")
    if colon and function_name.isidentifier():
        return _function(module_name, function_name, name)
    from rlhf.models import ModelError
    from rlhf.reward import RewardModel

    try:
        return RewardModel.from_pretrained(name)
    except ModelError as error:
        raise ValueError(
            f"reward {name!r}: {error} A reward is a folder written by `rlhf reward`, a Python "
            "function (file.py:function or package.module:function), an http:// address, or "
            "heuristic."
        ) from error


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
    path = Path(module_name).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"reward {name!r}: there is no file {module_name}")
    return _module_of_file(path)


def _module_of_file(path: Path) -> Any:
    """The module of a file, which may import the files beside it."""
    # A name of its own, so that it neither hides nor is hidden by an installed module.
    unique = f"_rlhf_reward_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent)
    sys.modules[unique] = module  # dataclasses and pickle look their module up here
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    finally:
        with contextlib.suppress(ValueError):  # the file took it out itself
            sys.path.remove(folder)
    return module
