"""Alignment vectors in a policy's weights for a while, and the policy as it was afterwards, bit for bit."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mavis.errors import VectorError, closest, first_sentence
from mavis.policies.applied_vectors import AppliedVectors, vectors_of_policies
from mavis.policies.fingerprint import Fingerprint, applied_vectors
from mavis.policies.state_capture import captures_around
from mavis.vectors.model_tensors import check_apart, state_of
from mavis.vectors.tensor_files import FLOATS, writing
from mavis.vectors.vector import AlignmentVector

Keep = Literal["cpu", "disk"]
"""Where the policy's own weights are kept meanwhile."""

_AT_ONCE = 2**20  # elements that are added at once: what that takes in passing is then little beside any large tensor
_INTERRUPTS = 100  # that putting back goes on after; each has put something back, unless it came at once
_claiming = threading.Lock()


def add_to(weight: Tensor, difference: Tensor, name: str) -> None:
    """Add a difference to a weight, in its place.

        θ ← round(θ + Δ), the sum in float32 at least, the rounding to the weight's own precision

    Args:
        weight: θ, float64, float32, bfloat16 or float16, on any device.
        difference: Δ, float32, of the same shape.
        name: to say where it went wrong.

    Raises:
        VectorError: if the weight has another dtype, or the sum is not finite where the weight is; a part of the weight
            may have been changed by then.
    """
    if weight.dtype not in FLOATS:
        raise VectorError(
            f"{name!r} is {weight.dtype}, to which nothing can be added.", "load it without quantisation."
        )
    exact = torch.promote_types(weight.dtype, torch.float32)
    if weight.is_contiguous():
        parts = zip(weight.view(-1).split(_AT_ONCE), difference.reshape(-1).split(_AT_ONCE), strict=True)
    else:  # which has no flat view
        parts = zip([weight], [difference], strict=True)
    for part, change in parts:
        total = part.to(exact).add(change.to(part.device, exact)).to(part.dtype)
        if bool((part.isfinite() & ~total.isfinite()).any()):
            raise VectorError(f"{name!r} plus the vectors is beyond {weight.dtype}.", "use smaller coefficients.")
        part.copy_(total)


class Applied:
    """A vector in a policy's weights for the time of a `with` block; may be entered again after it was left.

    Args:
        policy: the causal LM; its tensors are changed in place, one after the other.
        vector: what is added.
        names: what to call it, for critics that are attached meanwhile.
        keep: where the tensors that it changes are kept, as they were: `cpu`, in memory, or `disk`, in a folder for
            temporary files.

    Raises:
        VectorError: for another `keep`, or a policy that is no model. On entering: if the vector does not fit the
            policy, the policy has vectors applied, two of its tensors overlap, or a sum is not finite; the policy is
            then as it was. On leaving: if it was not entered, or the block has put other tensors in the place of some
            that would be put back; all others are put back then, and leaving may be tried again.
    """

    def __init__(self, policy: Any, vector: AlignmentVector, names: Iterable[str], keep: Keep = "cpu") -> None:
        if keep not in get_args(Keep):
            raise VectorError(f"keep is {keep!r}.", closest(str(keep), get_args(Keep)))
        if not isinstance(policy, nn.Module):
            raise VectorError(
                f"policy is a {type(policy).__name__}, expected a model.", "load it with from_pretrained and give that."
            )
        self._policy, self._vector, self._names, self._keep = policy, vector, tuple(names), keep
        self._undo: _Undo | None = None

    def __enter__(self) -> Any:
        inner = getattr(self._policy, "_orig_mod", self._policy)
        self._vector.check(inner)
        state = state_of(inner)
        check_apart(state, self._vector.tensors)
        undo = _Undo(inner, self._keep)
        try:
            undo.claim(AppliedVectors(self._names, Fingerprint.of(inner).weights, bool(self._vector.tensors)))
            self._undo = undo
            with torch.inference_mode():  # in which tensors can be changed that were made in it
                # The largest first: what a tensor takes in passing is then little when the most is kept.
                for name in sorted(self._vector.tensors, key=lambda name: state[name].numel(), reverse=True):
                    undo.keep(name, state[name])
                    add_to(state[name], self._vector.tensors[name], name)
            for capture in captures_around(inner):
                capture.owner.fingerprint.check(inner)
        except BaseException:
            self._leave(undo)
            raise
        return self._policy

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._undo is None:
            raise VectorError("these vectors are not applied.", "use them as `with vectors.applied(...):`.")
        self._leave(self._undo)

    def _leave(self, undo: _Undo) -> None:
        try:
            undo()
        finally:
            if undo.is_done and self._undo is undo:
                self._undo = None


class _Undo:
    """What gives a policy back as it was; until it has done all of that, it can be called again.

    Args:
        policy: the model itself, no wrapper.
        where: see `Applied`.
    """

    def __init__(self, policy: Any, where: Keep) -> None:
        self._policy = policy
        self._claim: AppliedVectors | None = None
        self._kept: dict[str, tuple[Tensor, Tensor | Path]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="mavis-kept-") if where == "disk" else None

    @property
    def is_done(self) -> bool:
        """Whether everything was put back."""
        return not self._kept and vectors_of_policies.get(self._policy) is not self._claim

    def claim(self, vectors: AppliedVectors) -> None:
        """See to it that one policy has one application at a time: what is put back is then what was there."""
        with _claiming:
            found = applied_vectors(self._policy)
            if found is not None:
                names = ", ".join(map(repr, found.names))
                raise VectorError(
                    f"policy has vectors applied already: {names}.",
                    "leave that block first, or name all vectors in one call.",
                )
            self._claim = vectors  # first, so that it is given up whenever an interrupt comes
            vectors_of_policies[self._policy] = vectors

    def keep(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor as it is."""
        if self._folder is None:
            self._kept[name] = tensor, tensor.detach().to("cpu", copy=True)
            return
        file = Path(self._folder.name) / f"{len(self._kept)}.safetensors"
        with writing(file):
            save_file({"kept": tensor.detach().cpu().contiguous()}, file)
        self._kept[name] = tensor, file

    def __call__(self) -> None:
        """Put everything back, come what may, and then raise what came."""
        interrupt: BaseException | None = None
        wrong: dict[str, Exception] = {}
        for _ in range(_INTERRUPTS):
            try:
                self._put_back(wrong)
                self._detach_capture()
                break
            except Exception:
                raise
            except BaseException as error:
                interrupt = error
        if self._kept:
            shown = ", ".join(f"{name!r} ({first_sentence(wrong[name])})" for name in self._kept if name in wrong)
            raise VectorError(
                f"policy still has the vectors in what could not be put back: {shown or ', '.join(self._kept)}.",
                "undo what the block has done to these and leave it again, or load the policy anew.",
            ) from interrupt
        if interrupt is not None:
            raise interrupt

    @torch.inference_mode()
    def _put_back(self, wrong: dict[str, Exception]) -> None:
        policy = self._policy
        here = {id(tensor) for tensor in chain(policy.parameters(), policy.buffers())}
        state = state_of(policy)
        # The last first, as with any undoing.
        for name in [*reversed(self._kept)]:
            tensor, kept = self._kept[name]
            try:
                # An adapter that the block has put on gives tensors other names, but they are the same. Where they are
                # not, as with buffers that have moved, the name tells.
                place = tensor if id(tensor) in here else state.get(name)
                original = load_file(kept)["kept"] if isinstance(kept, Path) else kept
                if place is None or place.shape != original.shape:
                    what = "is gone" if place is None else f"has shape {tuple(place.shape)} now"
                    raise ValueError(f"it {what}")
                place.copy_(original)
            except Exception as error:
                wrong[name] = error
            else:
                del self._kept[name]

    def _detach_capture(self) -> None:
        if self._kept:
            return
        with _claiming:
            if self._claim is not None and vectors_of_policies.get(self._policy) is self._claim:
                del vectors_of_policies[self._policy]
        if self._folder is not None:
            self._folder.cleanup()
