"""Alignment vectors in a policy's weights for a while, and the policy as it was afterwards, bit for bit."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mavis.critics.capture import attached_critics
from mavis.critics.fingerprint import AppliedVectors, Fingerprint, applied_vectors, vectors_of_policies
from mavis.errors import VectorError, closest
from mavis.vectors.source import state_of
from mavis.vectors.stored import FLOATS
from mavis.vectors.vector import AlignmentVector

Keep = Literal["cpu", "disk"]
"""Where the policy's own weights are kept meanwhile."""

_claiming = threading.Lock()


def added(weight: Tensor, difference: Tensor, name: str) -> Tensor:
    """Add a difference to a weight.

        θ' = round(θ + Δ), the sum in float32 at least, the rounding to the weight's own precision

    Args:
        weight: θ, float64, float32, bfloat16 or float16, on any device.
        difference: Δ, float32, of the same shape.
        name: to say where it went wrong.

    Returns:
        θ', with the weight's dtype and device.

    Raises:
        VectorError: if the weight has another dtype, or the sum is not finite where the weight is.
    """
    if weight.dtype not in FLOATS:
        raise VectorError(
            f"{name!r} is {weight.dtype}, to which nothing can be added.", "load it without quantisation."
        )
    exact = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(exact).add(difference.to(weight.device, exact)).to(weight.dtype)
    if not bool(total.isfinite().all()) and bool(weight.isfinite().all()):
        raise VectorError(f"{name!r} plus the vectors is beyond {weight.dtype}.", "use smaller coefficients.")
    return total


class Applied:
    """A vector in a policy's weights for the time of a `with` block; may be entered again after it was left.

    Args:
        policy: the causal LM; its tensors are changed in place, one after the other.
        vector: what is added.
        names: what to call it, for critics that are attached meanwhile.
        keep: where the tensors that it changes are kept, as they were: `cpu`, in memory, or `disk`, in a folder for
            temporary files.

    Raises:
        VectorError: for another `keep`. On entering: if the vector does not fit the policy, the policy has vectors
            applied, or a sum is not finite; the policy is then as it was. On leaving: if it was not entered.
    """

    def __init__(self, policy: Any, vector: AlignmentVector, names: Iterable[str], keep: Keep = "cpu") -> None:
        if keep not in get_args(Keep):
            raise VectorError(f"keep is {keep!r}.", closest(str(keep), get_args(Keep)))
        self._policy, self._vector, self._names, self._keep = policy, vector, tuple(names), keep
        self._undo: ExitStack | None = None

    def __enter__(self) -> Any:
        policy = self._policy
        self._vector.check(policy)
        with ExitStack() as undo:
            self._claim(undo)
            kept = _OnDisk(undo) if self._keep == "disk" else _InMemory()
            undo.callback(_restore, policy, kept)
            state = state_of(policy)
            with torch.no_grad():
                # The largest first: what a tensor takes in passing is then little when the most is kept.
                for name in sorted(self._vector.tensors, key=lambda name: state[name].numel(), reverse=True):
                    total = added(state[name], self._vector.tensors[name], name)
                    kept.put(name, state[name])
                    state[name].copy_(total)
            for critic in attached_critics(policy):
                critic.fingerprint.check(policy)
            self._undo = undo.pop_all()
        return policy

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._undo is None:
            raise VectorError("these vectors are not applied.", "use them as `with vectors.applied(...):`.")
        undo, self._undo = self._undo, None
        undo.close()

    def _claim(self, undo: ExitStack) -> None:
        """See to it that one policy has one application at a time: what is restored is then what was there."""
        inner = getattr(self._policy, "_orig_mod", self._policy)
        with _claiming:
            found = applied_vectors(inner)
            if found is not None:
                names = ", ".join(map(repr, found.names))
                raise VectorError(
                    f"policy has vectors applied already: {names}.",
                    "leave that block first, or name all vectors in one call.",
                )
            vectors_of_policies[inner] = AppliedVectors(self._names, Fingerprint.of(inner).weights)
            undo.callback(vectors_of_policies.pop, inner, None)


class _InMemory:
    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self._kept[name] = tensor.detach().to("cpu", copy=True)

    def take(self) -> Iterable[tuple[str, Tensor]]:
        while self._kept:
            yield self._kept.popitem()


class _OnDisk:
    def __init__(self, undo: ExitStack) -> None:
        self._folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="mavis-kept-")))
        self._files: dict[str, Path] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        file = self._folder / f"{len(self._files)}.safetensors"
        save_file({"kept": tensor.detach().cpu().contiguous()}, file)
        self._files[name] = file

    def take(self) -> Iterable[tuple[str, Tensor]]:
        for name, file in self._files.items():
            yield name, load_file(file)["kept"]


@torch.no_grad()
def _restore(policy: Any, kept: _InMemory | _OnDisk) -> None:
    state = state_of(policy)  # anew: the block may have moved the policy to another device
    for name, tensor in kept.take():
        state[name].copy_(tensor)
