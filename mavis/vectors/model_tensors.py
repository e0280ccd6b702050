"""The tensors of a model, in memory or in a folder, under the names that its modules give them."""

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
_APART = "give each tensor memory of its own, e.g. by .clone(), or load the policy with from_pretrained."


@dataclass(frozen=True)
class Layout:
    """What two models must share for the weights of one to be added to those of the other.

    Args:
        model_type: the architecture's name in its config, such as `llama`.
        shapes: of every tensor, tied ones once.
        tied: names that mean the tensor of another name, as `lm_head.weight` may mean that of the embedding.
    """

    model_type: str
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Read the layout off a model."""
        first: dict[Any, str] = {}
        shapes, tied = {}, {}
        for name, tensor in state_of(model).items():
            place = _place(tensor)
            if place in first:
                tied[name] = first[place]
            else:
                first[place], shapes[name] = name, tuple(tensor.shape)
        return cls(str(getattr(getattr(model, "config", None), "model_type", "unknown")), shapes, tied)

    def check(self, other: Layout, who: str, whom: str) -> None:
        """Refuse a layout that is not the same.

        Args:
            other: to compare with this one.
            who: what has the other layout, to begin the message.
            whom: what has this one.

        Raises:
            VectorError: if the architecture, a name, a shape or a tie differs; names the first that do.
        """
        said = [f"it is {other.model_type!r} and not {self.model_type!r}"] * (self.model_type != other.model_type)
        for name in dict.fromkeys([*self.shapes, *other.shapes, *self.tied, *other.tied]):
            mine, its = self._entry(name), other._entry(name)
            if mine != its:
                said.append(f"{name!r} is {_words(its)} and not {_words(mine)}")
        if said:
            more = f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
            raise VectorError(
                f"{who} does not fit {whom}: {'; '.join(said[:_SHOWN])}{more}.",
                "vectors go between models of one architecture, vocabulary and shape.",
            )

    def _entry(self, name: str) -> tuple[int, ...] | str | None:
        return self.tied.get(name) or self.shapes.get(name)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Read what `to_json` returned and a file has kept."""
        shapes = {name: tuple(shape) for name, shape in data["shapes"].items()}
        return cls(data["model_type"], shapes, dict(data["tied"]))


class ModelTensors(Mapping[str, Tensor]):
    """The tensors of a model by name, tied ones once.

    Args:
        tensors: the tensors by the names they are kept under.
        kept_as: every name they are kept under, by the name in the layout.
        layout: of the model.
        skeleton: a model of that layout, with or without weights.
        stored: the files, if it is a folder.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        kept_as: dict[str, list[str]],
        layout: Layout,
        skeleton: Any,
        stored: StoredTensors | None = None,
    ) -> None:
        self._tensors, self.kept_as, self.layout = tensors, kept_as, layout
        self.skeleton, self.stored = skeleton, stored

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self.kept_as[name][0]].detach()

    def __contains__(self, name: object) -> bool:
        return name in self.kept_as

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept_as)

    def __len__(self) -> int:
        return len(self.kept_as)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells these weights from others."""
        return Fingerprint.of(self.skeleton, self if self.stored is not None else None)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """List a model's own parameters and lasting buffers; tied ones are one tensor under several names."""
    model = getattr(model, "_orig_mod", model)  # a compiled module names everything after itself
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def check_apart(state: Mapping[str, Tensor], names: Container[str]) -> None:
    """Refuse tensors that cannot be changed one by one.

    Args:
        state: of a model, see `state_of`.
        names: of those that are to be changed.

    Raises:
        VectorError: if one of them has an element that is in several places, or is where another tensor is; tensors
            that are the same are tied and no such case.
    """
    seen: dict[Any, str] = {}
    for name, tensor in state.items():
        seen.setdefault(_place(tensor), name)
    ranges = []
    for place, name in seen.items():
        tensor = state[name]
        if not isinstance(place, tuple):
            continue
        reach: int = 1  # elements from the first to after the last, of the dimensions so far
        for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
            if stride < reach and name in names:
                raise VectorError(f"policy keeps several elements of {name!r} in one place.", _APART)
            reach += stride * (size - 1)
        start = int(tensor.storage_offset()) * tensor.element_size()
        ranges.append((place[:2], start, start + int(reach) * tensor.element_size(), name))
    end: tuple[Any, int, str] | None = None
    for storage, start, stop, name in sorted(ranges, key=lambda found: (str(found[0]), *found[1:])):
        if end is not None and end[0] == storage and start < end[1] and (name in names or end[2] in names):
            raise VectorError(f"policy keeps {name!r} in a place that overlaps that of {end[2]!r}.", _APART)
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
        argument: what to call it in errors.

    Raises:
        VectorError: if the folder cannot be read, its files do not name their tensors as the model does, or the model
            wears an adapter or has no weights.
    """
    if isinstance(model, nn.Module):
        return _of_model(model, argument)
    if isinstance(model, str | os.PathLike):
        return _of_folder(model, argument)
    raise VectorError(f"{argument} is a {type(model).__name__}.", "give a model, or the folder of one.")


def meta_model(model: Any, argument: str) -> Any:
    """Build a causal LM without weights from what tells its shape.

    Args:
        model: a model, or its folder.
        argument: what to call it in errors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            if isinstance(model, nn.Module):
                return type(model)(copy.deepcopy(model.config))
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, local_files_only=True))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise VectorError(
            f"{argument} is {_named(model)}, of which no causal LM can be built: {first_sentence(error)}.",
            "load the models with from_pretrained and give those.",
        ) from error


def _of_model(model: Any, argument: str) -> ModelTensors:
    if getattr(model, "peft_config", None):
        raise VectorError(
            f"{argument} is a {type(model).__name__}, a model with an adapter on.",
            "give the model of model.merge_and_unload(), or as the aligned one the adapter's folder.",
        )
    state, layout = state_of(model), Layout.of(model)
    absent = [name for name in layout.shapes if state[name].device.type == "meta"]
    if absent:
        raise VectorError(
            f"{argument} keeps {absent[0]!r} on device 'meta', where there are no weights.",
            "load it whole onto its devices, or give its folder.",
        )
    return ModelTensors(state, {name: [name] for name in layout.shapes}, layout, model)


def _of_folder(folder: str | os.PathLike[str], argument: str) -> ModelTensors:
    path = existing_folder(folder, argument)
    skeleton = meta_model(path, argument)
    stored, layout = StoredTensors(path), Layout.of(skeleton)
    found = _module_names(stored, [*layout.shapes, *layout.tied], getattr(skeleton, "base_model_prefix", ""))
    layout = _with_ties_of(stored, found, layout)
    kept_as: dict[str, list[str]] = {name: [found[name]] if name in found else [] for name in layout.shapes}
    for name, other in layout.tied.items():
        kept_as[other] += [found[name]] if name in found else []
    lost = [name for name, files in kept_as.items() if not files]
    if lost:
        extra = sorted(set(stored) - set(found.values()))
        raise VectorError(
            f"{argument} is {str(folder)!r}, whose files hold no {_some(lost)}"
            + (f" but {_some(extra)}." if extra else "."),
            "where files name tensors otherwise than the model, load the models with from_pretrained and give those.",
        )
    for name, files in kept_as.items():
        if stored.shapes[files[0]] != layout.shapes[name]:
            raise VectorError(
                f"{argument} is {str(folder)!r}, whose {files[0]!r} has shape {stored.shapes[files[0]]}, but its "
                f"config.json says {layout.shapes[name]}.",
                "give the folder as save_pretrained has written it.",
            )
    return ModelTensors(stored, kept_as, layout, skeleton, stored)


def _with_ties_of(stored: StoredTensors, found: Mapping[str, str], layout: Layout) -> Layout:
    """Untie what the files hold two tensors of, as transformers does in loading them."""
    untied = {
        name: layout.shapes[other]
        for name, other in layout.tied.items()
        if name in found and other in found and not torch.equal(stored[found[name]], stored[found[other]])
    }
    tied = {name: other for name, other in layout.tied.items() if name not in untied}
    return Layout(layout.model_type, layout.shapes | untied, tied)


def _module_names(stored: Iterable[str], known: Iterable[str], prefix: str) -> dict[str, str]:
    """Find each of a model's names in a file, which may have been written with or without the prefix of the trunk."""
    names, found = set(known), {}
    for kept in stored:
        for name in (kept, f"{prefix}.{kept}", kept.removeprefix(f"{prefix}.")):
            if name in names:
                found[name] = kept
                break
    return found


def _words(entry: tuple[int, ...] | str | None) -> str:
    if entry is None:
        return "missing"
    return f"tied to {entry!r}" if isinstance(entry, str) else f"of shape {entry}"


def _place(tensor: Tensor) -> Any:
    """What two tensors share that are one and the same, even if two objects say so."""
    if tensor.device.type != "meta" and tensor.layout == torch.strided and tensor.numel():
        try:
            pointer = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # of quantised kinds that have several storages inside
            pointer = 0
        if pointer:
            return tensor.device, pointer, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return id(tensor)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (" ..." if len(names) > _SHOWN else "")


def _named(model: Any) -> str:
    return f"a {type(model).__name__}" if isinstance(model, nn.Module) else repr(str(model))
