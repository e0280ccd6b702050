"""What identifies an objective in the manifest of a run: what it does, so that changed objectives are noticed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import sys
import sysconfig
import types
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_DEEPEST = 20  # levels of attributes, closures and globals that are followed
_SAMPLED = 1 << 10  # elements of a large array that are hashed

_states: WeakKeyDictionary[Any, tuple[str, str]] = WeakKeyDictionary()
"""The identity of an objective before its first call, and after its last one."""


def objective_identity(objective: Any) -> str:
    """Identify an objective by what it does.

    A function is identified by its code, without comments and docstring, by its closure, its defaults, and by the
    functions and values of its module that it uses; an object by its class and its attributes. Code of installed
    packages counts by its name. An attribute `version` replaces name and code: change it when the rewards change. A
    method `identity` that returns plain data replaces everything else, as in `RewardModel`.

    What an objective stores while it scores, such as a cache, does not change its identity within a process.

    Args:
        objective: to identify.

    Returns:
        A hash, the same in every process.

    Examples:
        >>> from mavis.rewards import Brevity, objective_identity
        >>> objective_identity(Brevity(scale=10)) == objective_identity(Brevity(scale=10))
        True
        >>> objective_identity(Brevity(scale=10)) == objective_identity(Brevity(scale=20))
        False
    """
    now = _digest(objective)
    try:
        first, last = _states.get(objective, (now, now))
    except TypeError:  # neither hashable nor weakly referable
        return now
    return first if now == last else now


def remember_identity(objective: Any, before: str) -> None:
    """Note that a call has just changed what an objective stores, and that it is the one that it was before."""
    with contextlib.suppress(TypeError):
        _states[objective] = before, _digest(objective)


def file_digest(path: Path) -> str:
    """Hash the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_as_in_first_release(objective: Any) -> bool:
    """Say whether the objectives of mavis within an objective score as in 0.1, whose manifests do not identify them."""
    describer = _Describer()
    describer.describe(objective)
    return max(describer.versions, default=1) == 1


def _digest(objective: Any) -> str:
    return _hash(_Describer().describe(objective))[:16]


def _hash(description: Any) -> str:
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()


def _name(value: Any) -> str:
    """Name a function or class, or the class of another value, without its module: code may move."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))


class _Describer:
    """Describes values by plain data that is the same in every process."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, list[str]]] = {}  # by id; the value is kept, so that its id stays its own
        self.versions: list[int] = []  # of the objectives of mavis

    def describe(self, value: Any, depth: int = 0) -> list[Any]:
        """Describe a value, and all that it refers to by a hash."""
        plain = _plain(value)
        if plain is not None:
            return plain
        if id(value) not in self.known:
            if depth > _DEEPEST:
                return ["deep", _name(value)]
            self.known[id(value)] = value, ["cycle", _name(value)]
            self.known[id(value)] = value, [_hash(self._describe_parts(value, depth + 1))]
        return self.known[id(value)][1]

    def _describe_parts(self, value: Any, depth: int) -> list[Any]:
        if isinstance(value, Mapping):
            return ["mapping", *sorted(map(json.dumps, (self._each(item, depth) for item in value.items())))]
        if isinstance(value, Set):
            return ["set", *sorted(map(json.dumps, self._each(value, depth)))]
        if isinstance(value, list | tuple):
            return ["sequence", *self._each(value, depth)]
        if isinstance(value, functools.partial):
            return ["partial", *self._each((value.func, value.args, value.keywords), depth)]
        if isinstance(value, types.MethodType):
            return ["method", *self._each((value.__func__, value.__self__), depth)]
        if isinstance(value, torch.nn.Module):
            return ["module", self.describe(dict(value.state_dict()), depth)]
        if callable(getattr(type(value), "identity", None)):
            return ["identity", _name(value), self.describe(value.identity(), depth)]
        if isinstance(value, types.FunctionType | type):
            return self._describe_code(value, depth)
        if hasattr(value, "__wrapped__"):  # by a decorator, such as functools.cache
            return ["wrapper", self.describe(value.__wrapped__, depth)]
        attributes = {} if _is_installed(type(value)) and not _is_mavis(type(value)) else _attributes(value)
        version = None if _is_mavis(type(value)) else _version(value)
        code = self._describe_code(type(value), depth) if version is None else ["version", version]
        return ["object", code, self.describe(attributes, depth)]

    def _each(self, values: Any, depth: int) -> list[Any]:
        return [self.describe(value, depth) for value in values]

    def _describe_code(self, code: Any, depth: int) -> list[Any]:
        """Describe a function or a class: by its version if it has one, by its name if it is installed."""
        if _is_mavis(code):
            self.versions.append(getattr(code, "version", 1))
            return ["mavis", _name(code), self.versions[-1]]
        if (version := _version(code)) is not None:
            return ["version", version]
        if _is_installed(code):
            return ["installed", code.__module__, _name(code)]
        return self._describe_class(code, depth) if isinstance(code, type) else self._describe_function(code, depth)

    def _describe_class(self, cls: type, depth: int) -> list[Any]:
        members: dict[str, Any] = {}
        for name, member in vars(cls).items():
            if name.startswith("__") and not isinstance(member, types.FunctionType):
                continue
            if isinstance(member, staticmethod | classmethod):
                member = member.__func__
            members[name] = member.fget if isinstance(member, property) else member
        return ["class", _name(cls), self.describe(members, depth), *self._each(cls.__bases__, depth)]

    def _describe_function(self, function: types.FunctionType, depth: int) -> list[Any]:
        code, names = _bytecode(function.__code__, function.__doc__)
        used: dict[str, Any] = {}
        for name in sorted(names & function.__globals__.keys()):
            value = used[name] = function.__globals__[name]
            if isinstance(value, types.ModuleType) and not _is_installed(value):
                used |= {f"{name}.{inner}": getattr(value, inner) for inner in names if hasattr(value, inner)}
        cells = dict(zip(function.__code__.co_freevars, map(_content, function.__closure__ or ()), strict=True))
        return ["function", code, *self._each((used, cells, function.__defaults__, function.__kwdefaults__), depth)]


def _plain(value: Any) -> list[Any] | None:
    """Describe a value without parts; None if it has some."""
    if value is None or isinstance(value, bool | int | float | complex | str | Path | np.generic):
        return [type(value).__name__, str(value)]
    if isinstance(value, torch.dtype | torch.device):
        return ["torch", str(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, re.Pattern):
        return ["pattern", str(value.pattern), value.flags]
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        return ["name", value.__name__]
    if isinstance(value, torch.Tensor):
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLED)].cpu().double().numpy()
        return ["tensor", list(value.shape), str(value.dtype), hashlib.sha256(sample.tobytes()).hexdigest()]
    if isinstance(value, np.ndarray):
        sample = value.flatten()[:: max(1, value.size // _SAMPLED)]
        content = repr(sample.tolist()).encode() if value.dtype.hasobject else sample.tobytes()
        return ["array", list(value.shape), str(value.dtype), hashlib.sha256(content).hexdigest()]
    return None


def _attributes(value: Any) -> dict[str, Any]:
    """Return what an object stores."""
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _version(value: Any) -> list[Any] | None:
    """Describe the version that a function, class or object declares; None if it declares none."""
    version = getattr(value, "version", None)
    return None if version is None else _plain(version)


def _is_mavis(code: Any) -> bool:
    return str(code.__module__).partition(".")[0] == "mavis"


def _bytecode(code: types.CodeType, docstring: str | None) -> tuple[list[Any], set[str]]:
    """Describe compiled code without docstring, file and line numbers; return the names that it uses, too."""
    names, constants = {*code.co_names, *code.co_freevars}, list[Any]()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, more = _bytecode(constant, None)
            names |= more
            constants.append(inner)
        elif constant is None or constant != docstring:
            constants.append(sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant))
    return [code.co_code.hex(), code.co_names, code.co_varnames, constants], names


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return "empty"


def _is_installed(value: Any) -> bool:
    """Say whether a function, class or module is of the standard library or an installed package."""
    module = value if isinstance(value, types.ModuleType) else sys.modules.get(value.__module__)
    if module is None or module.__name__ == "__main__":
        return False
    file = getattr(module, "__file__", None)
    return file is None or file.startswith(_INSTALLED)
