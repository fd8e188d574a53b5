"""Replacing a peer's functions by ours: all of them or none, and back again.

`Patch` looks at everything before it touches anything: the peer's version, the signature of every
function, what its registries hold, and the numbers that both functions give on a small sample.
Functions are then replaced wherever the peer's imported modules hold them by name, since
`from x import y` binds them anew in each; methods in their class, and so for its instances too,
those that are there already and those that come.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Function = Callable[..., Any]


class PatchError(RuntimeError):
    """A peer cannot be patched, or unpatched, as it is. Nothing of it was changed."""


@dataclass(frozen=True)
class Peer:
    """A package that is patched.

    distribution: its name on PyPI. package: its name in Python.
    since, before: the versions known to fit, the first one and the first one beyond.
    """

    distribution: str
    package: str
    since: str
    before: str

    @property
    def versions(self) -> str:
        return f">={self.since},<{self.before}"

    def fits(self, version: str) -> bool:
        return _release(self.since) <= _release(version) < _release(self.before)


@dataclass(frozen=True)
class Replacement:
    """One function of the peer, and ours.

    module: where the peer defines it; it has the name of ours.
    ours: a function; or a class with `apply`, for an autograd.Function.
    owner: the module's class whose method it is; None: it is the module's own.
    constructor: a class that is built with the same arguments as the owner, whose instances the
        method therefore can read; checked, not replaced. None: the method reads nothing of them.
    sample: calls the function it is given on a few numbers and returns what came out, gradients
        too; empty where the peer's own cannot run on this machine. Its random numbers have a
        generator of their own.
    registered: (name, key) of the module's dict that offers the function under a key.
    tolerance: how far outputs may be apart, relative to 1 + their size.
    """

    module: str
    ours: Function
    sample: Callable[[Function], Sequence[Tensor]]
    registered: tuple[str, str] | None = None
    tolerance: float = 1e-5
    owner: str | None = None
    constructor: type | None = None

    @property
    def name(self) -> str:
        return self.ours.__name__

    @property
    def holder(self) -> str:
        """The path of the module, or class, that has it."""
        return self.module if self.owner is None else f"{self.module}.{self.owner}"

    @property
    def path(self) -> str:
        return f"{self.holder}.{self.name}"


class Patch:
    """The replacements of one peer, as one thing that is there or is not.

    meanwhile: a context that holds while they are there.
    """

    def __init__(
        self,
        peer: Peer,
        replacements: Sequence[Replacement],
        meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.peer = peer
        self.replacements = tuple(replacements)
        self.meanwhile = meanwhile
        self._theirs: list[Function] | None = None
        self._open = ExitStack()

    @property
    def active(self) -> bool:
        return self._theirs is not None

    def patch(self) -> list[str]:
        """Replace the functions; return, and log, each place where one was replaced.

        Raises:
            PatchError: patched already; the peer is missing or of another version; a function is
                missing, has another signature, or gives other numbers; a registry's entry is not
                the peer's own. The message says which, and nothing was replaced.
        """
        if self.active:
            raise PatchError(f"{self.peer.package} is patched already; unpatch it first")
        _fitting([self])
        theirs = [self._theirs_checked(replacement) for replacement in self.replacements]
        for replacement, function in zip(self.replacements, theirs):
            self._check_registered(replacement, function)
        for replacement, function in zip(self.replacements, theirs):
            _compare(replacement, function)
        self._theirs = theirs
        try:
            self._open.enter_context(self.meanwhile())
            places = self._swap(dict(zip(theirs, self._ours)))
        except BaseException:
            self.unpatch()
            raise
        for place in places:
            logger.info("%s now runs on rlhf_kernels", place)
        return places

    def unpatch(self) -> list[str]:
        """Put the peer's functions back; return each place.

        That includes modules imported since, which took ours by name. What someone else has put in
        the place of ours stays.

        Raises:
            PatchError: not patched.
        """
        if self._theirs is None:
            raise PatchError(f"{self.peer.package} is not patched")
        places = self._swap(dict(zip(self._ours, self._theirs)))
        self._theirs = None
        self._open.close()
        return places

    @contextmanager
    def patched(self) -> Iterator[list[str]]:
        """`patch`, and `unpatch` at the end, an exception's too; gives the places replaced."""
        places = self.patch()
        try:
            yield places
        finally:
            if self.active:  # not where the block has unpatched
                self.unpatch()

    def theirs(self, ours: Function) -> Function:
        """What the peer had in the place of ours while it is patched.

        Raises:
            PatchError: not patched.
        """
        if self._theirs is None:
            raise PatchError(f"{self.peer.package} is not patched")
        return self._theirs[self._ours.index(ours)]

    @property
    def _ours(self) -> list[Function]:
        return [replacement.ours for replacement in self.replacements]

    def _theirs_checked(self, replacement: Replacement) -> Function:
        holder: ModuleType | type = _imported(replacement.module)
        if replacement.owner is not None:
            holder = _owner(replacement.module, replacement.owner)
        function = vars(holder).get(replacement.name)
        if function is None:
            raise PatchError(f"{replacement.holder} has no function {replacement.name}")
        if function is replacement.ours:
            raise PatchError(f"{replacement.path} is ours already")
        _check_signature(replacement.path, function, replacement.ours)
        if replacement.constructor is not None and isinstance(holder, type):
            _check_signature(replacement.holder, holder, replacement.constructor)
        return function

    def _check_registered(self, replacement: Replacement, function: Function) -> None:
        if replacement.registered is None:
            return
        name, key = replacement.registered
        entry = _registry(replacement.module, name).get(key)
        if entry is not function:
            raise PatchError(
                f"{replacement.module}.{name}[{key!r}] holds {entry!r}; expected {replacement.path}"
            )

    def _registries(self) -> Iterator[tuple[str, dict[Any, Any]]]:
        named = {(each.module, each.registered[0]) for each in self.replacements if each.registered}
        for module, name in sorted(named):
            yield f"{module}.{name}", _registry(module, name)

    def _owners(self) -> Iterator[tuple[str, type]]:
        named = {(each.module, each.owner) for each in self.replacements if each.owner}
        for module, name in sorted(named):
            yield f"{module}.{name}", _owner(module, name)

    def _swap(self, to: dict[Function, Function]) -> list[str]:
        """Exchange functions in the peer's imported modules, classes, registries; say where."""
        places = []
        by_id = {id(old): new for old, new in to.items()}
        for module_name, module in self._modules():
            for name, value in list(vars(module).items()):
                if id(value) in by_id:
                    setattr(module, name, by_id[id(value)])
                    places.append(f"{module_name}.{name}")
        for path, owner in self._owners():
            for name, value in list(vars(owner).items()):
                if id(value) in by_id:
                    setattr(owner, name, by_id[id(value)])
                    places.append(f"{path}.{name}")
        for path, registry in self._registries():
            for key, value in list(registry.items()):
                if id(value) in by_id:
                    registry[key] = by_id[id(value)]
                    places.append(f"{path}[{key!r}]")
        return places

    def _modules(self) -> list[tuple[str, ModuleType]]:
        package = self.peer.package
        return [
            (name, module)
            for name, module in sorted(sys.modules.items())
            if (name == package or name.startswith(f"{package}."))
            and isinstance(module, ModuleType)
        ]


class PatchByVersion:
    """One peer's patches, each for other versions: the one that fits what is installed."""

    def __init__(self, *patches: Patch) -> None:
        self.patches = patches

    def patch(self) -> list[str]:
        """As `Patch.patch`, of the patch that fits.

        Raises:
            PatchError: as there; or the version installed is none of theirs.
        """
        return (self._active or _fitting(self.patches)).patch()

    def unpatch(self) -> list[str]:
        """As `Patch.unpatch`."""
        return (self._active or self.patches[0]).unpatch()

    def patched(self) -> AbstractContextManager[list[str]]:
        """As `Patch.patched`, of the patch that fits.

        Raises:
            PatchError: as `patch`.
        """
        return (self._active or _fitting(self.patches)).patched()

    @property
    def _active(self) -> Patch | None:
        return next((patch for patch in self.patches if patch.active), None)


def _fitting(patches: Sequence[Patch]) -> Patch:
    """The patch for the version that is installed.

    Raises:
        PatchError: none of them is for it, or none is installed.
    """
    name = patches[0].peer.distribution
    versions = [patch.peer.versions for patch in patches]
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as missing:
        wanted = " or ".join(name + each for each in versions)
        raise PatchError(f"{name} is not installed; these adapters are for {wanted}") from missing
    for patch in patches:
        if patch.peer.fits(found):
            return patch
    wanted = " or ".join(versions)
    raise PatchError(f"{name} is of version {found}; these adapters are for {wanted}")


def _imported(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PatchError(f"{module} cannot be imported: {error}") from error


def _registry(module: str, name: str) -> dict[Any, Any]:
    registry = vars(_imported(module)).get(name)
    if not isinstance(registry, dict):
        raise PatchError(f"{module} has no registry {name}")
    return registry


def _owner(module: str, name: str) -> type:
    owner = vars(_imported(module)).get(name)
    if not isinstance(owner, type):
        raise PatchError(f"{module} has no class {name}")
    return owner


def _check_signature(path: str, theirs: Function, ours: Function) -> None:
    if _parameters(theirs) != _parameters(ours):
        raise PatchError(f"{path} takes {_signature(theirs)}; expected {_signature(ours)}")


def _release(version: str) -> tuple[int, ...]:
    """0.9.1.post2 as (0, 9, 1): what comes behind the numbers does not change a signature."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def _parameters(function: Function) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults; annotations change nothing about a call."""
    parameters = _signature(function).parameters.values()
    return [(each.name, each.kind, each.default) for each in parameters]


def _signature(function: Function) -> inspect.Signature:
    """Of an autograd.Function, or what stands in for one with an `apply` of its own: what that
    takes; of another class what it is built with."""
    if not isinstance(function, type):
        return inspect.signature(function)
    if not issubclass(function, torch.autograd.Function):
        return inspect.signature(vars(function).get("apply", function))
    _context, *parameters = inspect.signature(function.forward).parameters.values()
    return inspect.Signature(parameters)


def _compare(replacement: Replacement, theirs: Function) -> None:
    try:
        with torch.inference_mode(False), torch.enable_grad():
            expected = replacement.sample(theirs)
            found = replacement.sample(replacement.ours) if expected else expected
    except Exception as error:
        raise PatchError(
            f"{replacement.path} could not be compared on a sample: {error}"
        ) from error
    if len(found) != len(expected):
        raise PatchError(f"{replacement.path} gives {len(expected)} numbers, ours {len(found)}")
    for theirs_out, ours_out in zip(expected, found):
        difference = _difference(theirs_out, ours_out)
        if not difference <= replacement.tolerance:
            raise PatchError(
                f"{replacement.path} and ours are {difference:.1e} apart on a sample, more than "
                f"{replacement.tolerance:.0e}, relative to 1 + their size"
            )


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    expected, found = expected.detach().double(), found.detach().double()
    if expected.numel() == 0:
        return 0.0
    return float(((expected - found).abs() / (1 + expected.abs())).max())
