"""Alignment vectors applied to a policy's weights in a `with` block, and exactly undone afterwards."""

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
from mavis.policies.embeddings import is_quantised
from mavis.policies.fingerprint import Fingerprint, applied_vectors
from mavis.policies.state_capture import captures_around
from mavis.vectors.model_tensors import check_no_overlap, state_of
from mavis.vectors.tensor_files import FLOATS, explain_write_errors
from mavis.vectors.vector import AlignmentVector

Backup = Literal["cpu", "disk"]
"""Where the original weights are stored while vectors are applied."""

_CHUNK_SIZE = 2**20  # elements per addition, so that temporaries are small next to any large tensor
_MAX_INTERRUPTS = 100  # through which restoring continues; each attempt makes progress
_registry_lock = threading.Lock()


def add_to(weight: Tensor, difference: Tensor, name: str) -> None:
    """Add a difference to a weight in place.

        θ ← round(θ + Δ),   the sum in float32 or wider, rounded to the weight's own precision

    Args:
        weight: θ, float64, float32, bfloat16 or float16, on any device.
        difference: Δ, float32, of the same shape.
        name: of the weight, for errors.

    Raises:
        VectorError: if the weight has another dtype, or the sum is not finite where the weight is; part of the
            weight may then be changed.
    """
    _check_addable(weight, name)
    exact = torch.promote_types(weight.dtype, torch.float32)
    if weight.is_contiguous():
        parts = zip(weight.view(-1).split(_CHUNK_SIZE), difference.reshape(-1).split(_CHUNK_SIZE), strict=True)
    else:  # no flat view exists
        parts = zip([weight], [difference], strict=True)
    for part, change in parts:
        total = part.to(exact).add(change.to(part.device, exact)).to(part.dtype)
        if bool((part.isfinite() & ~total.isfinite()).any()):
            raise VectorError(f"{name!r} plus the vectors overflows {weight.dtype}.", "use smaller coefficients.")
        part.copy_(total)


def _check_addable(weight: Tensor, name: str) -> None:
    if weight.dtype not in FLOATS or is_quantised(weight):
        kind = type(weight).__name__ if weight.dtype in FLOATS else weight.dtype
        raise VectorError(f"{name!r} is {kind}, to which vectors cannot be added.", "load it without quantisation.")


class AppliedContext:
    """Context manager in which a policy's weights include a vector; it can be entered again after it was left.

    Args:
        policy: the causal LM; its tensors are changed in place, one at a time.
        vector: what is added.
        names: of the vectors, for the warnings of critics that are attached in the block.
        backup: where the original tensors are stored: `cpu`, in memory, or `disk`, in a temporary folder.

    Raises:
        VectorError: for an unknown `backup`, or a policy that is not a model. On entering: if the vector does not fit
            the policy, vectors are applied to it already, two of its tensors overlap, or a sum is not finite; the
            policy is then unchanged. On leaving: if it was not entered, or the block has replaced tensors that would be
            restored; all others are restored, and leaving can be retried.
    """

    def __init__(self, policy: Any, vector: AlignmentVector, names: Iterable[str], backup: Backup = "cpu") -> None:
        if backup not in get_args(Backup):
            raise VectorError(f"backup is {backup!r}.", closest(str(backup), get_args(Backup)))
        if not isinstance(policy, nn.Module):
            raise VectorError(
                f"policy is a {type(policy).__name__}, expected a model.", "load it with from_pretrained and pass that."
            )
        self._policy, self._vector, self._names, self._backup = policy, vector, tuple(names), backup
        self._originals: _Originals | None = None

    def __enter__(self) -> Any:
        model: Any = getattr(self._policy, "_orig_mod", self._policy)
        self._vector.check(model)
        state = state_of(model)
        check_no_overlap(state, self._vector.tensors)
        originals = _Originals(model, self._backup)
        try:
            originals.register(AppliedVectors(self._names, Fingerprint.of(model).weights, bool(self._vector.tensors)))
            self._originals = originals
            with torch.inference_mode():  # in which tensors that were created in it can be changed
                for name in self._vector.tensors:
                    _check_addable(state[name], name)
                # The largest first: temporary memory is then small when the backup is at its largest.
                for name in sorted(self._vector.tensors, key=lambda name: state[name].numel(), reverse=True):
                    originals.back_up(name, state[name])
                    add_to(state[name], self._vector.tensors[name], name)
            for capture in captures_around(model):
                capture.owner.fingerprint.check(model)
        except BaseException:
            self._restore(originals)
            raise
        return self._policy

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._originals is None:
            raise VectorError("these vectors are not applied.", "use them as `with vectors.applied(...):`.")
        self._restore(self._originals)

    def _restore(self, originals: _Originals) -> None:
        try:
            originals.restore()
        finally:
            if originals.are_restored and self._originals is originals:
                self._originals = None


class _Originals:
    """The original tensors of a policy; restoring them can be retried until all are back.

    Args:
        policy: the model itself, not a wrapper.
        backup: see `AppliedContext`.
    """

    def __init__(self, policy: Any, backup: Backup) -> None:
        self._policy = policy
        self._registered: AppliedVectors | None = None
        self._backups: dict[str, tuple[Tensor, Tensor | Path]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="mavis-backup-") if backup == "disk" else None

    @property
    def are_restored(self) -> bool:
        """Whether every tensor was restored."""
        return not self._backups and vectors_of_policies.get(self._policy) is not self._registered

    def register(self, vectors: AppliedVectors) -> None:
        """Record which vectors are applied; a policy has one application at a time, so that restoring is exact."""
        with _registry_lock:
            applied = applied_vectors(self._policy)
            if applied is not None:
                names = ", ".join(map(repr, applied.names))
                raise VectorError(
                    f"policy has vectors applied already: {names}.",
                    "leave that block first, or name all vectors in one call.",
                )
            self._registered = vectors  # first, so that it is released whenever an interrupt comes
            vectors_of_policies[self._policy] = vectors

    def back_up(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor before it is changed."""
        if self._folder is None:
            self._backups[name] = tensor, tensor.detach().to("cpu", copy=True)
            return
        file = Path(self._folder.name) / f"{len(self._backups)}.safetensors"
        with explain_write_errors(file):
            save_file({"original": tensor.detach().cpu().contiguous()}, file)
        self._backups[name] = tensor, file

    def restore(self) -> None:
        """Restore every tensor, also through interrupts, which are raised afterwards."""
        interrupt: BaseException | None = None
        failures: dict[str, Exception] = {}
        for _ in range(_MAX_INTERRUPTS):
            try:
                self._restore_tensors(failures)
                self._release()
                break
            except Exception:
                raise
            except BaseException as error:
                interrupt = error
        if self._backups:
            failed = [f"{name!r} ({first_sentence(failures[name])})" for name in self._backups if name in failures]
            raise VectorError(
                "policy still includes the vectors in tensors that could not be restored: "
                f"{', '.join(failed or self._backups)}.",
                "undo what the block did to these and leave it again, or reload the policy.",
            ) from interrupt
        if interrupt is not None:
            raise interrupt

    @torch.inference_mode()
    def _restore_tensors(self, failures: dict[str, Exception]) -> None:
        policy = self._policy
        present = {id(tensor) for tensor in chain(policy.parameters(), policy.buffers())}
        state = state_of(policy)
        for name in [*reversed(self._backups)]:
            tensor, backup = self._backups[name]
            try:
                # An adapter that the block has added renames tensors, but they are the same objects. Where they are
                # not, as with buffers that have moved, the name identifies them.
                target = tensor if id(tensor) in present else state.get(name)
                original = load_file(backup)["original"] if isinstance(backup, Path) else backup
                if target is None or target.shape != original.shape:
                    what = "is gone" if target is None else f"has shape {tuple(target.shape)} now"
                    raise ValueError(f"it {what}")
                target.copy_(original)
            except Exception as error:
                failures[name] = error
            else:
                del self._backups[name]

    def _release(self) -> None:
        """Allow the next application, once every tensor was restored."""
        if self._backups:
            return
        with _registry_lock:
            if self._registered is not None and vectors_of_policies.get(self._policy) is self._registered:
                del vectors_of_policies[self._policy]
        if self._folder is not None:
            self._folder.cleanup()
