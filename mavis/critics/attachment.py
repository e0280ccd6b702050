"""Attaching a critic to the policy whose hidden states it reads, and finding the critic of a policy."""

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
from mavis.policies.protocol import CausalLM
from mavis.policies.state_capture import StateCapture, captures_on, generating_policy

_attach_lock = threading.Lock()


class Attachable:
    """Reads a policy's hidden states while it is attached to it.

    A mixin for modules that set `fingerprint`.
    """

    fingerprint: Fingerprint
    to: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self._capture: StateCapture | None = None
        self._temporary_users = 0

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle has: everything but the attachment to a policy."""
        return self.__dict__ | {"_capture": None, "_temporary_users": 0}

    def attach(self, policy: CausalLM) -> Attachment:
        """Read the hidden states of a policy from now on, by hooks on its forward pass.

        Args:
            policy: the causal LM to steer; its weights are not changed.

        Returns:
            An attachment whose `detach()` removes the hooks; as a context manager, it detaches at the end of the block.

        Raises:
            CriticError: if the policy has another hidden size or vocabulary, or the critic is already attached.
            PolicyError: if the policy has no output embedding.
        """
        if self._capture is not None:
            if self._capture.policy() is not None:
                raise CriticError(
                    "critic is already attached to a policy.",
                    "call critic.detach() first; a critic serves one policy at a time.",
                )
            self.detach()
        self.fingerprint.check(policy)
        self._on_attach(policy)
        self._capture = StateCapture(policy, self)
        return Attachment(partial(self._detach_capture, self._capture), partial(self._capture.raise_pending, wait=True))

    def detach(self) -> None:
        """Remove the hooks; does nothing if the critic is not attached."""
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    def _detach_capture(self, capture: StateCapture) -> None:
        """Detach, unless the critic was attached again since."""
        if self._capture is capture:
            self.detach()

    @contextmanager
    def attached_to(self, policy: CausalLM) -> Iterator[None]:
        """Attach the critic to a policy for a block; blocks in several threads may overlap.

        An attachment by `attach` stays. One that this method makes ends with the last of the overlapping blocks.

        Raises:
            CriticError: if the critic is attached to another policy, or was made for a policy of another shape.
        """
        with _attach_lock:
            if self.attached_policy is None:
                self.attach(policy)
                self._temporary_users, temporary = 1, True
            elif self.attached_policy is policy:
                temporary = self._temporary_users > 0
                self._temporary_users += temporary
            else:
                raise CriticError(
                    "critic is attached to another policy, not to the one that generates.",
                    "call critic.detach() first.",
                )
        try:
            yield
            self.raise_pending()
        finally:
            if temporary:
                with _attach_lock:
                    self._temporary_users -= 1
                    if self._temporary_users == 0:
                        self.detach()

    def raise_pending(self) -> None:
        """Raise errors of this thread's generation that were found asynchronously.

        Raises:
            DecodingError: if rows could not be matched to the policy's forward passes.
        """
        if self._capture is not None:
            self._capture.raise_pending(wait=True)

    @property
    def restarted(self) -> bool:
        """Whether this thread's latest forward pass started new sequences after one that continued from a cache."""
        return self._capture is not None and self._capture.restarted

    @property
    def attached_policy(self) -> Any | None:
        """The policy this critic reads, or None."""
        return self._capture.policy() if self._capture is not None else None

    def _on_attach(self, policy: CausalLM) -> None:
        """Move the critic to the device of the policy's hidden states."""
        self.to(states_device(policy))

    def _states(self, prefix_ids: Tensor) -> Tensor:
        if self._capture is None:
            raise CriticError(
                "critic is not attached to a policy, so there are no hidden states to read.",
                "call critic.attach(policy), or use mavis.generate, which attaches it for the call.",
            )
        return self._capture.states(prefix_ids)


class Attachment:
    """The attachment of a critic to a policy; ends with `detach()` or the `with` block.

    Examples:
        >>> import mavis
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> attachment = critic.attach(policy)
        >>> critic.attached_policy is policy
        True
        >>> attachment.detach()
        >>> critic.attached_policy is None
        True
    """

    def __init__(self, detach: Callable[[], None], raise_pending: Callable[[], None]) -> None:
        self._detach, self._raise_pending = detach, raise_pending

    def detach(self) -> None:
        """Remove the hooks, unless the critic was attached again since."""
        self._detach()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._raise_pending()
        finally:
            self.detach()


def generating_critic() -> Any:
    """Return the critic attached to the policy whose forward pass came last in this thread.

    Raises:
        CriticError: if there is none, or if several critics are attached to that policy.
    """
    return attached_critic(generating_policy())


def attached_critic(policy: CausalLM | None) -> Any:
    """Return the critic attached to a policy.

    Raises:
        CriticError: if there is none, or if several are attached.
    """
    critics = [capture.owner for capture in captures_on(policy)] if policy is not None else []
    if not critics:
        raise CriticError(
            "critic is None, and no critic is attached to the policy that is generating in this thread.",
            "attach one with critic.attach(policy), or pass it: MavisTilt(weights, critic).",
        )
    if len(critics) > 1:
        raise CriticError(
            f"critic is None, and {len(critics)} critics are attached to the policy that is generating.",
            "pass the one to use: MavisTilt(weights, critic).",
        )
    return critics[0]
