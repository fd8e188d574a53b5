"""What `from rlhf import ...` gives."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import rlhf

SCRIPT = """
import json
import rlhf
kinds = {}
for name in rlhf.__all__:
    scope = {}
    for _ in range(2):  # the second time, whatever the first import left behind is in the way
        exec(f"from rlhf import {name}", scope)
    kinds[name] = type(scope[name]).__name__
print(json.dumps(kinds))
"""


def test_every_exported_name_is_a_class_or_a_function() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = json.loads(done.stdout)
    assert set(kinds) == set(rlhf.__all__)
    assert {name: kind for name, kind in kinds.items() if kind == "module"} == {}
    assert set(kinds.values()) <= {"type", "ABCMeta", "function"}


def test_no_exported_name_is_that_of_a_submodule() -> None:
    """Importing a submodule binds its name in the package, over anything lazy."""
    submodules = {module.name for module in pkgutil.iter_modules(rlhf.__path__)}
    assert not submodules & set(rlhf.__all__)
