"""Describes values by plain data that is the same in every process: code, options, weights, and what they refer to."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import importlib.metadata
import json
import marshal
import re
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Mapping, Set
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_STEADY = ("numpy", "torch")  # packages that mavis itself computes with: their versions do not count
_DEEPEST = 60  # levels of attributes, closures and globals that are followed
_SAMPLED = 1 << 10  # elements of a large array that are hashed
_ARRAYS_WITHIN = 2  # objects of packages within each other; further in, arrays are workspaces rather than learnt
_NO_SLOTS = ("__dict__", "__weakref__")
_MODULE_STATE = vars(torch.nn.Module()).keys()


def hash_of(description: Any) -> str:
    """Hash a description, which is plain data."""
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()


class Describer:
    """Describes values by plain data that is the same in every process.

    Args:
        quick: whether to describe large data in its order in memory, which is the same within a process only.
    """

    def __init__(self, *, quick: bool = False) -> None:
        self.quick = quick
        self.known: dict[int, tuple[Any, list[Any]]] = {}  # by id; the value is kept, so that its id stays its own
        self.versions: list[int] = []  # of the objectives of mavis
        self.is_compiled = False

    def describe(self, value: Any, depth: int = 0) -> list[Any]:
        """Describe a value, and all that it refers to by a hash."""
        plain = _plain(value)
        if plain is not None:
            return plain
        if id(value) not in self.known:
            if depth > _DEEPEST:
                return ["deep", _name(value)]
            self.known[id(value)] = value, ["cycle", _name(value)]
            self.known[id(value)] = value, self._quick(value) or [hash_of(self._describe_parts(value, depth + 1))]
        return self.known[id(value)][1]

    def _quick(self, value: Any) -> list[Any] | None:
        """Describe a container of nothing but plain data; None for any other value."""
        if not self.quick or type(value) not in (dict, list, set, tuple):
            return None
        with contextlib.suppress(ValueError):  # something in it is not plain
            return ["data", hashlib.sha256(marshal.dumps(value, 2)).hexdigest()]
        return None

    def _describe_parts(self, value: Any, depth: int) -> list[Any]:
        if isinstance(value, functools.partial):
            return ["partial", *self._each((value.func, value.args, value.keywords), depth)]
        if isinstance(value, types.MethodType):
            return ["method", *self._each((value.__func__, value.__self__), depth)]
        if isinstance(value, types.FunctionType | type):
            return self._describe_code(value, depth)
        is_own = _is_mavis(type(value)) or not _is_installed(type(value))
        if isinstance(value, np.ndarray):  # of objects
            return ["array", list(value.shape), *self._each(value.flatten()[:_SAMPLED].tolist(), depth)]
        if is_own and callable(getattr(type(value), "identity", None)):
            own = type(value) if not _is_mavis(type(value)) and "identity" not in vars(type(value)) else None
            code = [] if own is None else [self._describe_code(own, depth)]  # a subclass may score otherwise
            return ["identity", _name(value), self.describe(value.identity(), depth), *code]
        if isinstance(value, Mapping | Set | list | tuple | deque):
            items = self._describe_items(value, depth)
            return [*items, "subclass", *self._describe_object(value, depth)] if is_own else items
        if isinstance(value, torch.nn.Module):
            return self._describe_module(value, depth)
        if is_own:
            return self._describe_object(value, depth)
        if _is_pipeline(value):
            return ["pipeline", _name(value), self.describe(_pipeline_content(value), depth)]
        if hasattr(value, "__wrapped__"):  # by a decorator, such as functools.cache
            return ["wrapper", self.describe(value.__wrapped__, depth)]
        if isinstance(value, enum.Enum):
            return ["enum", _name(value), value.name]
        if isinstance(value, types.SimpleNamespace):
            return ["namespace", self.describe(vars(value), depth)]
        return ["installed", self._describe_code(type(value), depth), self._describe_models(value, depth, set())]

    def _describe_items(self, value: Any, depth: int) -> list[Any]:
        if isinstance(value, Mapping):
            return ["mapping", *sorted(map(json.dumps, (self._each(item, depth) for item in value.items())))]
        if isinstance(value, Set):
            return ["set", *sorted(map(json.dumps, self._each(value, depth)))]
        return ["sequence", *self._each(value, depth)]

    def _describe_object(self, value: Any, depth: int) -> list[Any]:
        version = None if _is_mavis(type(value)) else _version(value)
        code = self._describe_code(type(value), depth) if version is None else ["version", version]
        return ["object", code, self.describe(_attributes(value), depth)]

    def _describe_module(self, module: torch.nn.Module, depth: int) -> list[Any]:
        parts = [
            self._each((name, _name(part) if _is_installed(type(part)) else type(part), _module_settings(part)), depth)
            for name, part in module.named_modules()
        ]
        return ["module", parts, self.describe(dict(module.state_dict()), depth)]

    def _describe_models(self, value: Any, depth: int, seen: set[int], objects: int = 0) -> list[Any]:
        """Describe the models and arrays that an object of a package holds, and nothing else that it holds."""
        if isinstance(value, torch.nn.Module) or _is_pipeline(value):
            return self.describe(value, depth)
        if isinstance(value, torch.Tensor | np.ndarray):
            return self.describe(value, depth) if objects <= _ARRAYS_WITHIN else []
        if isinstance(value, types.FunctionType) and not _is_installed(value):  # such as numpy.vectorize holds
            return self.describe(value, depth)
        if callable(getattr(value, "to_numpy", None)):  # tables and columns of pandas
            return [self.describe([value.to_numpy(), [*map(str, getattr(value, "columns", ()))]], depth)]
        if id(value) in seen or depth > _DEEPEST:
            return []
        seen.add(id(value))
        if isinstance(value, dict | list | tuple):
            held = [("", part) for part in (value.values() if isinstance(value, dict) else value)]
        elif _is_installed(type(value)) and not _is_standard(type(value)):
            held, objects = sorted(_attributes(value).items()), objects + 1
        else:
            return []
        found = (
            [name, *self._describe_models(part, depth + 1, seen, objects)]
            for name, part in held
            if not isinstance(part, str | int | float)
        )
        return [part for part in found if len(part) > 1]

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
            return ["installed", code.__module__, _name(code), _package_version(code.__module__)]
        return self._describe_class(code, depth) if isinstance(code, type) else self._describe_function(code, depth)

    def _describe_class(self, cls: type, depth: int) -> list[Any]:
        members: dict[str, Any] = {}
        for name, member in vars(cls).items():
            if name.startswith("__") and not isinstance(member, types.FunctionType):
                continue
            members[name] = _code_of(member)
        return ["class", _name(cls), self.describe(members, depth), *self._each(cls.__bases__, depth)]

    def _describe_function(self, function: types.FunctionType, depth: int) -> list[Any]:
        self.is_compiled = True
        code, names = _bytecode(function.__code__, function.__doc__)
        used: dict[str, Any] = {}
        for name in sorted(names & function.__globals__.keys()):
            value = used[name] = function.__globals__[name]
            if isinstance(value, types.ModuleType) and not _is_installed(value):
                used |= {f"{name}.{inner}": getattr(value, inner) for inner in sorted(names) if hasattr(value, inner)}
        cells = dict(zip(function.__code__.co_freevars, map(_cell_content, function.__closure__ or ()), strict=True))
        return ["function", code, *self._each((used, cells, function.__defaults__, function.__kwdefaults__), depth)]


def _code_of(member: Any) -> Any:
    """Return the functions in what a class makes of them: properties, bound and dispatched methods."""
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    if isinstance(member, property):
        return member.fget
    if isinstance(member, functools.cached_property):
        return member.func
    if isinstance(member, functools.partialmethod):
        return functools.partial(member.func, *member.args, **member.keywords)
    if isinstance(member, functools.singledispatchmethod):
        return dict(member.dispatcher.registry)
    return member


def _plain(value: Any) -> list[Any] | None:
    """Describe a value without parts; None if it has some."""
    if value is None or isinstance(
        value, bool | int | float | complex | str | Path | Decimal | Fraction | range | np.generic
    ):
        return [type(value).__name__, str(value)]
    if isinstance(value, torch.dtype | torch.device):
        return ["torch", str(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, re.Pattern):
        return ["pattern", str(value.pattern), value.flags]
    if isinstance(value, types.ModuleType):
        return ["name", value.__name__, _package_version(value.__name__) if _is_installed(value) else ""]
    if isinstance(value, types.BuiltinFunctionType):
        return ["name", value.__name__]
    if isinstance(value, torch.Tensor):
        return ["tensor", str(value.dtype), _sampled(value)]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        sample = value.reshape(-1)[:: max(1, value.size // _SAMPLED)]
        return ["array", list(value.shape), str(value.dtype), hashlib.sha256(sample.tobytes()).hexdigest()]
    return None


def _sampled(tensor: torch.Tensor) -> list[Any]:
    """Describe the content of a tensor by its shape and a sample; by nothing if it cannot be read, as on `meta`."""
    try:
        flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLED)].cpu().double().numpy()
        return [list(tensor.shape), hashlib.sha256(sample.tobytes()).hexdigest()]
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # sparse, quantised, or without memory
        return []


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _mangled(name: str, cls: type) -> str:
    """Return what a private name of a class is called outside it."""
    is_private = name.startswith("__") and not name.endswith("__")
    return f"_{cls.__name__.lstrip('_')}{name}" if is_private else name


def _attributes(value: Any) -> dict[str, Any]:
    """Return what an object stores."""
    slots = [_mangled(name, cls) for cls in type(value).__mro__ for name in _slots(cls) if name not in _NO_SLOTS]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _module_settings(module: torch.nn.Module) -> dict[str, Any]:
    """Return what a module stores beside its weights; of an installed class, its public numbers."""
    stored = {name: value for name, value in vars(module).items() if name not in _MODULE_STATE}
    if not _is_installed(type(module)):
        return stored
    return {name: value for name, value in stored.items() if name[0] != "_" and isinstance(value, int | float)}


def _is_pipeline(value: Any) -> bool:
    """Say whether a value is a pipeline of transformers, without importing it."""
    module = sys.modules.get("transformers.pipelines.base")
    return module is not None and isinstance(value, module.Pipeline)


def _pipeline_content(pipeline: Any) -> list[Any]:
    """Return what the outputs of a pipeline depend on."""
    config = getattr(pipeline.model, "config", None)
    options = (f"_{step}_params" for step in ("preprocess", "forward", "postprocess"))
    return [
        pipeline.model,
        type(pipeline.tokenizer),
        *(getattr(config, name, None) for name in ("id2label", "problem_type")),
        *(getattr(pipeline, name, None) for name in options),
    ]


@functools.cache
def _package_version(module: str) -> str:
    """Return the version of a module's package, without that of its build; empty if it does not count or has none."""
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names or package in ("mavis", *_STEADY):
        return ""
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
    return str(version or "").partition("+")[0]


def _name(value: Any) -> str:
    """Name a function or class, or the class of another value, without its module: code may move."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))


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


def _cell_content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return "empty"


def _is_standard(code: Any) -> bool:
    """Say whether a class is of the standard library."""
    return str(code.__module__).partition(".")[0] in sys.stdlib_module_names


def _is_installed(value: Any) -> bool:
    """Say whether a function, class or module is of the standard library or an installed package."""
    module = value if isinstance(value, types.ModuleType) else sys.modules.get(value.__module__)
    if module is None or module.__name__ == "__main__":
        return False
    file = getattr(module, "__file__", None)
    return file is None or file.startswith(_INSTALLED)
