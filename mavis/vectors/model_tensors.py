"""The tensors of a model, in memory or in a folder, by the names of its state dict."""

from __future__ import annotations

import copy
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mavis.errors import VectorError, first_sentence
from mavis.policies.fingerprint import Fingerprint
from mavis.vectors.tensor_files import StoredTensors, existing_folder

ModelOrFolder = nn.Module | str | os.PathLike[str]
_SHOWN = 3
_OVERLAP_HINT = "give each tensor its own memory, e.g. by .clone(), or load the policy with from_pretrained."


@dataclass(frozen=True)
class Layout:
    """What two models must share for the weights of one to be added to those of the other.

    Args:
        model_type: the architecture's name in its config, such as `llama`.
        shapes: of every tensor, tied ones once.
        tied: from the name of a tied tensor to the name that `shapes` lists it under, e.g. for `lm_head.weight`.
    """

    model_type: str
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Derive the layout of a model."""
        first: dict[Any, str] = {}
        shapes, tied = {}, {}
        for name, tensor in state_of(model).items():
            key = _memory_key(tensor)
            if key in first:
                tied[name] = first[key]
            else:
                first[key], shapes[name] = name, tuple(tensor.shape)
        return cls(str(getattr(getattr(model, "config", None), "model_type", "unknown")), shapes, tied)

    def check(self, other: Layout, other_name: str, own_name: str) -> None:
        """Check that another layout equals this one.

        Args:
            other: to compare with this one.
            other_name: what has the other layout, for errors.
            own_name: what has this one.

        Raises:
            VectorError: if the architecture, a name, a shape or a tie differs; names the first that do.
        """
        mismatches = [f"it is {other.model_type!r} and not {self.model_type!r}"] * (self.model_type != other.model_type)
        for name in dict.fromkeys([*self.shapes, *other.shapes, *self.tied, *other.tied]):
            expected, found = self._entry(name), other._entry(name)
            if expected != found:
                mismatches.append(f"{name!r} is {_describe(found)} and not {_describe(expected)}")
        if mismatches:
            more = f"; and {len(mismatches) - _SHOWN} more" if len(mismatches) > _SHOWN else ""
            raise VectorError(
                f"{other_name} does not fit {own_name}: {'; '.join(mismatches[:_SHOWN])}{more}.",
                "vectors need models of the same architecture, vocabulary and shapes.",
            )

    def _entry(self, name: str) -> tuple[int, ...] | str | None:
        return self.tied.get(name) or self.shapes.get(name)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Rebuild a layout from `to_json`."""
        shapes = {name: tuple(shape) for name, shape in data["shapes"].items()}
        return cls(data["model_type"], shapes, dict(data["tied"]))


class ModelTensors(Mapping[str, Tensor]):
    """The tensors of a model by name, tied ones once.

    Args:
        tensors: by the names that they are stored under.
        stored_names: from a name in the layout to every name that the tensor is stored under.
        layout: of the model.
        skeleton: a model of that layout, with or without weights.
        stored: the files, if the model is a folder.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        stored_names: dict[str, list[str]],
        layout: Layout,
        skeleton: Any,
        stored: StoredTensors | None = None,
    ) -> None:
        self._tensors, self.stored_names, self.layout = tensors, stored_names, layout
        self.skeleton, self.stored = skeleton, stored

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self.stored_names[name][0]].detach()

    def __contains__(self, name: object) -> bool:
        return name in self.stored_names

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored_names)

    def __len__(self) -> int:
        return len(self.stored_names)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of these weights."""
        return Fingerprint.of(self.skeleton, self if self.stored is not None else None)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """List a model's parameters and persistent buffers; tied ones are one tensor under several names."""
    model = getattr(model, "_orig_mod", model)  # a compiled module prefixes every name
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def check_no_overlap(state: Mapping[str, Tensor], names: Container[str]) -> None:
    """Check that tensors can be changed one at a time.

    Args:
        state: of a model, see `state_of`.
        names: of the tensors to change.

    Raises:
        VectorError: if several elements of one share memory, or it overlaps another tensor. Tied tensors are one tensor
            and are allowed.
    """
    seen: dict[Any, str] = {}
    for name, tensor in state.items():
        seen.setdefault(_memory_key(tensor), name)
    ranges = []
    for key, name in seen.items():
        tensor = state[name]
        if not isinstance(key, tuple):
            continue
        reach: int = 1  # elements spanned by the dimensions so far
        for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
            if stride < reach and name in names:
                raise VectorError(f"policy has elements of {name!r} that share memory.", _OVERLAP_HINT)
            reach += stride * (size - 1)
        start = int(tensor.storage_offset()) * tensor.element_size()
        ranges.append((key[:2], start, start + int(reach) * tensor.element_size(), name))
    end: tuple[Any, int, str] | None = None
    for storage, start, stop, name in sorted(ranges, key=lambda entry: (str(entry[0]), *entry[1:])):
        if end is not None and end[0] == storage and start < end[1] and (name in names or end[2] in names):
            raise VectorError(f"policy has {name!r} in memory that overlaps {end[2]!r}.", _OVERLAP_HINT)
        if end is None or end[0] != storage or stop > end[1]:
            end = storage, stop, name


def subtracted(aligned: Tensor, base: Tensor) -> Tensor:
    """Compute aligned − base on the CPU, in float32; 0 where both are the same infinity."""
    one, other = base.to("cpu", torch.float32), aligned.to("cpu", torch.float32)
    return (other - one).masked_fill_(one == other, 0)


def tensors_of(model: ModelOrFolder, argument: str) -> ModelTensors:
    """Open a model, in memory or in a folder.

    Args:
        model: a causal LM, or a folder with `config.json` and safetensors.
        argument: its name in errors.

    Raises:
        VectorError: if the folder cannot be read, its tensors are not named as in the model, or the model has an
            adapter or no weights.
    """
    if isinstance(model, nn.Module):
        return _of_model(model, argument)
    if isinstance(model, str | os.PathLike):
        return _of_folder(model, argument)
    raise VectorError(f"{argument} is a {type(model).__name__}.", "pass a model, or the folder of one.")


def meta_model(model: Any, argument: str) -> Any:
    """Build a causal LM of the same shape without weights.

    Args:
        model: a model, or its folder.
        argument: its name in errors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            if isinstance(model, nn.Module):
                return type(model)(copy.deepcopy(model.config))
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, local_files_only=True))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise VectorError(
            f"{argument} is {_describe_model(model)}, of which no causal LM can be built: {first_sentence(error)}.",
            "load the models with from_pretrained and pass those.",
        ) from error


def _of_model(model: Any, argument: str) -> ModelTensors:
    if getattr(model, "peft_config", None):
        raise VectorError(
            f"{argument} is a {type(model).__name__}, a model with an adapter.",
            "pass model.merge_and_unload(), or as `aligned` the adapter's folder.",
        )
    state, layout = state_of(model), Layout.of(model)
    absent = [name for name in layout.shapes if state[name].device.type == "meta"]
    if absent:
        raise VectorError(
            f"{argument} has {absent[0]!r} on device 'meta', which holds no weights.",
            "load it completely onto its devices, or pass its folder.",
        )
    return ModelTensors(state, {name: [name] for name in layout.shapes}, layout, model)


def _of_folder(folder: str | os.PathLike[str], argument: str) -> ModelTensors:
    path = existing_folder(folder, argument)
    skeleton = meta_model(path, argument)
    stored, layout = StoredTensors(path), Layout.of(skeleton)
    found = _module_names(stored, [*layout.shapes, *layout.tied], getattr(skeleton, "base_model_prefix", ""))
    layout = _with_ties_of(stored, found, layout)
    stored_names: dict[str, list[str]] = {name: [found[name]] if name in found else [] for name in layout.shapes}
    for name, other in layout.tied.items():
        stored_names[other] += [found[name]] if name in found else []
    missing = [name for name, files in stored_names.items() if not files]
    if missing:
        extra = sorted(set(stored) - set(found.values()))
        raise VectorError(
            f"{argument} is {str(folder)!r}, whose files hold no {_listed(missing)}"
            + (f" but {_listed(extra)}." if extra else "."),
            "if the files name tensors differently from the model, load both models with from_pretrained.",
        )
    for name, files in stored_names.items():
        if stored.shapes[files[0]] != layout.shapes[name]:
            raise VectorError(
                f"{argument} is {str(folder)!r}, whose {files[0]!r} has shape {stored.shapes[files[0]]}, but its "
                f"config.json says {layout.shapes[name]}.",
                "pass a folder as save_pretrained writes it.",
            )
    return ModelTensors(stored, stored_names, layout, skeleton, stored)


def _with_ties_of(stored: StoredTensors, found: Mapping[str, str], layout: Layout) -> Layout:
    """Untie tensors that the files store with different values, as transformers does when loading them."""
    untied = {
        name: layout.shapes[other]
        for name, other in layout.tied.items()
        if name in found and other in found and not torch.equal(stored[found[name]], stored[found[other]])
    }
    tied = {name: other for name, other in layout.tied.items() if name not in untied}
    return Layout(layout.model_type, layout.shapes | untied, tied)


def _module_names(stored: Iterable[str], known: Iterable[str], prefix: str) -> dict[str, str]:
    """Map each of a model's names to the stored one, which may lack or have the prefix of the base model."""
    names, found = set(known), {}
    for stored_name in stored:
        for name in (stored_name, f"{prefix}.{stored_name}", stored_name.removeprefix(f"{prefix}.")):
            if name in names:
                found[name] = stored_name
                break
    return found


def _describe(entry: tuple[int, ...] | str | None) -> str:
    if entry is None:
        return "missing"
    return f"tied to {entry!r}" if isinstance(entry, str) else f"of shape {entry}"


def _memory_key(tensor: Tensor) -> Any:
    """Return a key that is equal for tensors that are the same memory, even if they are different objects."""
    if tensor.device.type != "meta" and tensor.layout == torch.strided and tensor.numel():
        try:
            pointer = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # quantised tensors with several storages
            pointer = 0
        if pointer:
            return tensor.device, pointer, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return id(tensor)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (" ..." if len(names) > _SHOWN else "")


def _describe_model(model: Any) -> str:
    return f"a {type(model).__name__}" if isinstance(model, nn.Module) else repr(str(model))
