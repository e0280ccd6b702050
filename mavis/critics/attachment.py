"""Attaching a critic to the policy that it reads: for good, for a block, or found by the policy that is generating."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor

from mavis.errors import CriticError
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.state_capture import StateCapture, captures_around, captures_on, generating_policy

_borrowing = threading.Lock()


class Attachable:
    """What reads a policy's hidden states while it is attached to it.

    Whoever inherits it is a module and sets `fingerprint`.
    """

    fingerprint: Fingerprint
    to: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self._capture: StateCapture | None = None
        self._borrowers = 0

    def attach(self, policy: Any) -> Attachment:
        """Make the critic read what `policy` computes from now on.

        Args:
            policy: the causal LM whose generation is to be steered; its weights are not touched.

        Returns:
            An attachment whose `detach()` removes every hook; as a context manager it detaches on leaving.

        Raises:
            CriticError: if the policy has another hidden size or vocabulary, or the critic is attached elsewhere.
            PolicyError: if the policy has no output embedding.
        """
        if self._capture is not None:
            if self._capture.policy() is not None:
                raise CriticError(
                    "critic is attached to a policy already.",
                    "call critic.detach() first; a critic serves one policy at a time.",
                )
            self.detach()
        self.fingerprint.check(policy)
        self._on_attach(policy)
        self._capture = StateCapture(policy, self)
        return Attachment(partial(self._detach_capture, self._capture), partial(self._capture.raise_pending, wait=True))

    def detach(self) -> None:
        """Stop reading; leaves no hook behind and is harmless when nothing is attached."""
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    def _detach_capture(self, captured: StateCapture) -> None:
        """Detach, unless the critic has been attached anew since."""
        if self._capture is captured:
            self.detach()

    @contextmanager
    def attached_to(self, policy: Any) -> Iterator[None]:
        """Be attached to a policy for the time of a block, whoever else in another thread is.

        An attachment that is there already stays; one that is made here ends with the last block that needs it.

        Raises:
            CriticError: if the critic is attached to another policy, or does not fit this one.
        """
        with _borrowing:
            if self.attached_policy is None:
                self.attach(policy)
                self._borrowers, borrowed = 1, True
            elif self.attached_policy is policy:
                borrowed = self._borrowers > 0
                self._borrowers += borrowed
            else:
                raise CriticError(
                    "critic is attached to another policy than the one that is to generate.",
                    "call critic.detach() first.",
                )
        try:
            yield
            self.raise_pending()
        finally:
            if borrowed:
                with _borrowing:
                    self._borrowers -= 1
                    if self._borrowers == 0:
                        self.detach()

    def raise_pending(self) -> None:
        """Raise if something that was wrong in this thread's generation has been found out since.

        Raises:
            DecodingError: if rows could not be matched to the policy's forward passes.
        """
        if self._capture is not None:
            self._capture.raise_pending(wait=True)

    @property
    def restarted(self) -> bool:
        """Whether the latest forward pass in this thread began a new sequence after one that went on from a cache."""
        return self._capture is not None and self._capture.restarted

    @property
    def attached_policy(self) -> Any | None:
        """The policy this critic reads, or None."""
        return self._capture.policy() if self._capture is not None else None

    def _on_attach(self, policy: Any) -> None:
        """Move to where the policy's hidden states are."""
        self.to(states_device(policy))

    def _states(self, prefix_ids: Tensor) -> Tensor:
        if self._capture is None:
            raise CriticError(
                "critic is attached to no policy, so there are no hidden states to read.",
                "call critic.attach(policy), or use mavis.generate, which attaches it for the call.",
            )
        return self._capture.states(prefix_ids)


class Attachment:
    """The tie between a critic and a policy; ends with `detach()` or the `with` block."""

    def __init__(self, detach: Callable[[], None], raise_pending: Callable[[], None]) -> None:
        self._detach, self._settle = detach, raise_pending

    def detach(self) -> None:
        """Remove the hooks, unless the critic has been attached anew since."""
        self._detach()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._settle()
        finally:
            self.detach()


def generating_critic() -> Any:
    """Find the critic attached to the policy whose forward pass came last in this thread.

    Raises:
        CriticError: if there is none, or if several critics are attached to that policy.
    """
    return attached_critic(generating_policy())


def attached_critics(policy: Any) -> list[Any]:
    """List the critics that are attached to a policy, to what wraps it (PEFT, a compiler), or to what it wraps."""
    return [capture.owner for capture in captures_around(policy)]


def attached_critic(policy: Any | None) -> Any:
    """Find the critic attached to a policy.

    Raises:
        CriticError: if there is none, or if several are attached.
    """
    critics = [capture.owner for capture in captures_on(policy)] if policy is not None else []
    if not critics:
        raise CriticError(
            "critic is None, and no critic is attached to the policy that is generating in this thread.",
            "attach one with critic.attach(policy), or name it: MavisTilt(weights, critic).",
        )
    if len(critics) > 1:
        raise CriticError(
            f"critic is None, and {len(critics)} critics are attached to the policy that is generating.",
            "name the one to use: MavisTilt(weights, critic).",
        )
    return critics[0]
