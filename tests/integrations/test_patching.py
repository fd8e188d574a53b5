"""Patching a peer: everything or nothing, everywhere it holds a function, and back again.

The peer is made up, a package of three modules and a registry, and so is its version.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from rlhf_kernels.integrations._patching import Patch, PatchError, Peer, Replacement

PEER = Peer("made-up-peer", "made_up", since="1.2", before="1.4")
SOURCES = {
    "made_up": "",
    "made_up.math": """
REGISTRY = {}

def twice(x, by=2):
    return x * by

def half(x):
    return x / 2

REGISTRY["twice"] = REGISTRY["double"] = twice
""",
    "made_up.trainer": "from made_up.math import half, twice as times_two",
}
LATER = "from made_up.math import twice"


def twice(x: Tensor, by: int = 2) -> Tensor:
    return x + x if by == 2 else x * by


def half(x: Tensor) -> Tensor:
    return 0.5 * x


def sample(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [function(torch.arange(3.0))]


def module(name: str, source: str) -> ModuleType:
    made = ModuleType(name)
    sys.modules[name] = made
    exec(source, vars(made))
    return made


def state() -> dict[str, dict[str, object]]:
    """Every name of every module of the peer, and its registry."""
    found = {
        name: {key: value for key, value in vars(made).items() if not key.startswith("__")}
        for name, made in sys.modules.items()
        if name.partition(".")[0] == "made_up"
    }
    registry = found["made_up.math"]["REGISTRY"]
    assert isinstance(registry, dict)
    return {**found, "registry": dict(registry)}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "1.3.1" if name == PEER.distribution else version(name),
    )
    for name, source in SOURCES.items():
        module(name, source)
    yield sys.modules["made_up.math"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
        del sys.modules[name]


@pytest.fixture
def patch() -> Patch:
    return Patch(
        PEER,
        [
            Replacement("made_up.math", twice, sample, registered=("REGISTRY", "twice")),
            Replacement("made_up.math", half, sample),
        ],
    )


def refuses(patch: Patch, *words: str) -> None:
    """The message holds the words, and nothing was touched."""
    before = state()
    with pytest.raises(PatchError) as refused:
        patch.patch()
    assert [word for word in words if word not in str(refused.value)] == []
    assert state() == before
    assert not patch.active


def test_every_name_and_every_entry_is_replaced(
    peer: ModuleType, patch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rlhf_kernels"):
        places = patch.patch()
    expected = {
        "made_up.math.twice": twice,
        "made_up.math.half": half,
        "made_up.trainer.times_two": twice,
        "made_up.trainer.half": half,
        "made_up.math.REGISTRY['twice']": twice,
        "made_up.math.REGISTRY['double']": twice,
    }
    assert sorted(places) == sorted(expected)
    now = state()
    assert now["registry"] == {"twice": twice, "double": twice}
    assert now["made_up.trainer"] == {"half": half, "times_two": twice}
    assert now["made_up.math"]["twice"] is twice
    assert all(any(place in line for line in caplog.messages) for place in places)


def test_undone_completely(peer: ModuleType, patch: Patch) -> None:
    before = state()
    places = patch.patch()
    assert patch.active
    assert sorted(patch.unpatch()) == sorted(places)
    assert state() == before
    assert not patch.active


def test_what_holds_meanwhile(peer: ModuleType, patch: Patch) -> None:
    seen = []

    @contextmanager
    def meanwhile() -> Iterator[None]:
        seen.append(sys.modules["made_up.trainer"].half is half)
        yield
        seen.append(sys.modules["made_up.trainer"].half is half)

    patch = Patch(PEER, patch.replacements, meanwhile)
    with patch.patched():
        assert seen == [False]
    assert seen == [False, False]
    patch.patch()
    patch.unpatch()
    assert seen == [False] * 4
    refuses(Patch(PEER, [Replacement("made_up.none", half, sample)], meanwhile), "made_up.none")
    assert seen == [False] * 4


def test_undone_in_modules_imported_since(peer: ModuleType, patch: Patch) -> None:
    theirs = peer.twice
    with patch.patched():
        later = module("made_up.later", LATER)
        assert later.twice is twice
    assert later.twice is theirs


def test_undone_after_an_exception(peer: ModuleType, patch: Patch) -> None:
    before = state()
    with pytest.raises(KeyError, match="mine"), patch.patched():
        assert state() != before
        raise KeyError("mine")
    assert state() == before


def test_undone_where_the_block_unpatches(peer: ModuleType, patch: Patch) -> None:
    before = state()
    with patch.patched():
        patch.unpatch()
    assert state() == before


def test_what_another_put_there_since_stays(peer: ModuleType, patch: Patch) -> None:
    before = state()
    with patch.patched():
        peer.half = len
    assert state() == {**before, "made_up.math": {**before["made_up.math"], "half": len}}


def test_patching_twice(peer: ModuleType, patch: Patch) -> None:
    with patch.patched():
        refuses_while_active(patch)
        again = Patch(PEER, patch.replacements)
        refuses(again, "made_up.math.twice", "ours already")
    patch.patch()
    patch.unpatch()


def refuses_while_active(patch: Patch) -> None:
    before = state()
    with pytest.raises(PatchError, match="patched already"):
        patch.patch()
    assert state() == before and patch.active


def test_unpatching_what_is_not_patched(peer: ModuleType, patch: Patch) -> None:
    with pytest.raises(PatchError, match="made_up is not patched"):
        patch.unpatch()


@pytest.mark.parametrize("version", ["1.1.9", "1.4", "1.10.0", "2.0rc1", "dev"])
def test_a_version_outside_of_the_range(
    version: str, peer: ModuleType, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    refuses(patch, "made-up-peer", version, ">=1.2,<1.4")


@pytest.mark.parametrize("version", ["1.2", "1.2.0", "1.3.9.post1", "1.3.0+cu128"])
def test_a_version_in_the_range(
    version: str, peer: ModuleType, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with patch.patched() as places:
        assert places


def test_a_missing_peer() -> None:
    missing = Peer("no-such-peer", "no_such_peer", since="1.0", before="2.0")
    with pytest.raises(PatchError, match=r"no-such-peer is not installed.*>=1\.0,<2\.0"):
        Patch(missing, []).patch()


def test_a_missing_module(peer: ModuleType) -> None:
    refuses(Patch(PEER, [Replacement("made_up.gone", half, sample)]), "made_up.gone")


def test_a_missing_function(peer: ModuleType, patch: Patch) -> None:
    del peer.half
    refuses(patch, "made_up.math", "half")


@pytest.mark.parametrize(
    "changed",
    [
        "def half(y): return y / 2",
        "def half(x, y=1): return x / 2",
        "def half(x=0): return x / 2",
        "def half(*, x): return x / 2",
    ],
)
def test_a_changed_signature(changed: str, peer: ModuleType, patch: Patch) -> None:
    exec(changed, vars(peer))
    refuses(patch, "made_up.math.half takes (", "expected (x")


def test_a_missing_registry(peer: ModuleType, patch: Patch) -> None:
    theirs = peer.REGISTRY
    peer.REGISTRY = None
    with pytest.raises(PatchError, match=r"made_up\.math has no registry REGISTRY"):
        patch.patch()
    assert peer.twice is theirs["twice"]


def test_a_registry_entry_of_somebody_else(peer: ModuleType, patch: Patch) -> None:
    peer.REGISTRY["twice"] = len
    refuses(patch, "REGISTRY['twice']", "len")


@pytest.mark.parametrize(
    "drift", ["x / 2 + 1e-3", "x.double() / 2", "(x / 2)[:2]", "x / 2 + float('nan')"]
)
def test_numbers_that_differ(drift: str, peer: ModuleType, patch: Patch) -> None:
    exec(f"def half(x): return {drift}", vars(peer))
    refuses(patch, "made_up.math.half", "apart on a sample")


def test_a_function_that_fails_on_the_sample(peer: ModuleType, patch: Patch) -> None:
    exec("def half(x): raise TypeError('a new kind of x')", vars(peer))
    refuses(patch, "made_up.math.half", "a new kind of x")


def test_an_empty_sample_compares_nothing(peer: ModuleType) -> None:
    exec("def half(x): raise TypeError('not on this machine')", vars(peer))
    with Patch(PEER, [Replacement("made_up.math", half, lambda _: [])]).patched():
        assert peer.half is half


def test_rounding_is_no_difference(peer: ModuleType, patch: Patch) -> None:
    exec("def half(x): return x / 2 * (1 + 1e-6)", vars(peer))
    with patch.patched() as places:
        assert places


THEIR_FUNCTION = """
import torch

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, by=2):
        return x * by

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2, None
"""


class Doubled:
    @staticmethod
    def apply(x: Tensor, by: int = 2) -> Tensor:
        return x * by


@pytest.mark.parametrize("default", [2, 3])
def test_an_autograd_function_is_called_by_apply(peer: ModuleType, default: int) -> None:
    made = module("made_up.function", THEIR_FUNCTION.replace("by=2", f"by={default}"))
    theirs = made.Doubled
    numbers = torch.arange(3.0)
    patch = Patch(
        PEER, [Replacement("made_up.function", Doubled, lambda each: [each.apply(numbers)])]
    )
    if default == 3:
        refuses(patch, "takes (x, by=3)", "expected (x: ")
        return
    with patch.patched():
        assert made.Doubled is Doubled and patch.theirs(Doubled) is theirs
    assert made.Doubled is theirs
    with pytest.raises(PatchError, match="is not patched"):
        patch.theirs(Doubled)


# Methods


BOXES = """
class Box:
    def __init__(self, size=1):
        self.size = size

    def grow(self, x):
        return x + self.size

class Crate(Box):
    pass
"""


class Box:
    def __init__(self, size: int = 1) -> None:
        self.size = size

    def grow(self, x: Tensor) -> Tensor:
        return self.size + x


def grown(function: Callable[..., Tensor]) -> list[Tensor]:
    return [function(sys.modules["made_up.boxes"].Box(3), torch.arange(3.0))]


@pytest.fixture
def boxes(peer: ModuleType) -> ModuleType:
    return module("made_up.boxes", BOXES)


@pytest.fixture
def of_boxes() -> Patch:
    own = Replacement("made_up.boxes", Box.grow, grown, owner="Box", constructor=Box)
    return Patch(PEER, [Replacement("made_up.math", half, sample), own])


def test_a_method_is_replaced_for_every_instance_and_put_back(
    boxes: ModuleType, of_boxes: Patch
) -> None:
    before, theirs = state(), boxes.Box.grow
    earlier = boxes.Crate(5)
    with of_boxes.patched() as places:
        assert "made_up.boxes.Box.grow" in places
        assert boxes.Box.grow is boxes.Crate.grow is Box.grow
        assert earlier.grow(1) == boxes.Box(5).grow(1) == 6
    assert boxes.Box.grow is earlier.grow.__func__ is theirs
    assert state() == before


def test_a_missing_class(peer: ModuleType, boxes: ModuleType, of_boxes: Patch) -> None:
    del boxes.Box
    refuses(of_boxes, "made_up.boxes has no class Box")


def test_a_missing_method(boxes: ModuleType, of_boxes: Patch) -> None:
    del boxes.Box.grow
    refuses(of_boxes, "made_up.boxes.Box has no function grow")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("def grow(self, y): return y + self.size", "made_up.boxes.Box.grow takes (self, y)"),
        ("def __init__(self, size=2): self.size = size", "made_up.boxes.Box takes (size=2)"),
        ("def grow(self, x): return x - self.size", "made_up.boxes.Box.grow and ours are"),
    ],
)
def test_a_class_that_has_changed(
    changed: str, message: str, boxes: ModuleType, of_boxes: Patch
) -> None:
    made: dict[str, Callable[..., object]] = {}
    exec(changed, made)
    for name in ("grow", "__init__"):
        if name in made:
            setattr(boxes.Box, name, made[name])
    refuses(of_boxes, message)


def test_ours_is_no_replacement_for_itself(boxes: ModuleType, of_boxes: Patch) -> None:
    with of_boxes.patched():
        refuses(Patch(PEER, of_boxes.replacements[1:]), "made_up.boxes.Box.grow is ours already")
