"""What every critic offers: objectives by name, a tilt over candidates, attachment to a policy."""

from __future__ import annotations

import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mavis.critics.calibration import Calibration
from mavis.critics.capture import Capture
from mavis.critics.fingerprint import Fingerprint, states_device
from mavis.errors import CriticError, closest

Composition = Literal["independent", "conditioned"]
"""How objectives' values become a tilt: each of its own policy, or all of the policy that λ makes."""

_borrowing = threading.Lock()


class Critic(nn.Module, ABC):
    """Predicts, for each objective, the normalised reward still to come.

    Args:
        objectives: M distinct names, in the order of every tensor's last dimension.
        fingerprint: the policy this critic is for.
        composition: how the objectives' values become a tilt.

    Raises:
        CriticError: if there is no objective, a name is empty or comes twice, or the composition is unknown.
    """

    kind: ClassVar[str]
    catches_up: bool = True
    """Whether steps may be left out: what it needs of them it finds when it is next asked."""
    reward_mean: Tensor
    reward_std: Tensor
    about: dict[str, Any]
    """What its model card tells besides, plain data: `policy`, `data`, `training`, `efficiency`, as far as known."""
    trained_up_to: Tensor
    """The largest |λ| = Σ_m λ_m of the rollouts that a conditioned critic was trained on; 0 if not known."""

    def __init__(
        self, objectives: Sequence[str], fingerprint: Fingerprint, composition: Composition = "independent"
    ) -> None:
        super().__init__()
        names = [objectives] if isinstance(objectives, str) else list(objectives)
        if not names or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
            raise CriticError(
                f"objectives is {names}, expected at least one name and every name once.",
                "pass e.g. objectives=['positive', 'dialogue'].",
            )
        self.objectives: tuple[str, ...] = tuple(names)
        if composition not in get_args(Composition):
            raise CriticError(f"composition is {composition!r}.", closest(str(composition), get_args(Composition)))
        self.composition: Composition = composition
        self.fingerprint = fingerprint
        self.calibration: Calibration | None = None
        self.about: dict[str, Any] = {}
        self.register_buffer("reward_mean", torch.zeros(len(names), dtype=torch.float64))
        self.register_buffer("reward_std", torch.ones(len(names), dtype=torch.float64))
        self.register_buffer("trained_up_to", torch.zeros((), dtype=torch.float64))
        self._capture: Capture | None = None
        self._borrowers = 0

    @abstractmethod
    def tilt(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """Compute the tilt of every candidate.

            independent:  tilt(s, a) = Σ_m λ_m Q_m(s, a)
            conditioned:  tilt(s, a) = Σ_m λ_m Q_m(s, a; λ) − K(s, a; λ)

        Args:
            prefix_ids: (B, L) integer, the ids the logits processor is called with.
            candidate_ids: (B, K) integer, or None for every token in order (K = V).
            lam: (B, M) float32, λ = β·w.

        Returns:
            (B, K) float32, in nats.

        Raises:
            CriticError: if the critic is attached to no policy.
            DecodingError: if the rows cannot be matched to a forward pass.
        """

    @abstractmethod
    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """Compute Q_m(s, a), the value behind the tilt, for every candidate and objective.

        Args:
            prefix_ids: (B, L) integer, the ids the logits processor is called with.
            candidate_ids: (B, K) integer, or None for every token in order (K = V).
            lam: (B, M) float32, of the policy whose values are asked for, if the critic is conditioned; None is then
                λ = 0, the reference policy, which lies a little outside what it was trained on.

        Returns:
            (B, K, M) float32, on the normalised reward scale.

        Raises:
            CriticError: if λ is given and the critic is not conditioned.
        """

    @property
    def conditioned(self) -> bool:
        """Whether the heads read λ."""
        return self.composition == "conditioned"

    def check_asks(self, lam: Tensor | None) -> None:
        """Refuse to tell the values of a policy that the critic does not know.

        Args:
            lam: what `values` was given.

        Raises:
            CriticError: if it is a λ and the critic is not conditioned.
        """
        if lam is not None and not self.conditioned:
            raise CriticError(
                "lam is given, but composition is 'independent': its values are the same for every λ.",
                "leave lam out, or train a critic with composition='conditioned'.",
            )

    def check_range(self, lam: Tensor) -> None:
        """Warn where a conditioned critic is asked for a λ that it was not trained on.

        Args:
            lam: (R, M), λ = β·w.
        """
        most = float(self.trained_up_to)
        if not self.conditioned or not most:
            return
        outside = (lam < 0).any(dim=1) | (lam.abs().sum(dim=1) > most * (1 + 1e-6))
        if bool(outside.any()):
            row = [round(x, 4) for x in lam[outside][0].tolist()]
            warnings.warn(
                f"lambda = beta · weights is {row}, but the critic was trained on lambda ≥ 0 with a sum of at most "
                f"{most:g}; beyond that its values are guesses.",
                UserWarning,
                stacklevel=4,
            )

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the constructor's own arguments as plain data, for the critic folder."""

    def normalise(self, raw_rewards: Tensor) -> Tensor:
        """Put raw rewards on the scale of the values.

            R = (raw − mean) / std

        Args:
            raw_rewards: (..., M).

        Returns:
            (..., M) float64.
        """
        return (raw_rewards.double() - self.reward_mean.cpu()) / self.reward_std.cpu()

    def set_normalisation(self, raw_rewards: Tensor) -> None:
        """Estimate mean and standard deviation from rewards of reference-policy rollouts.

        Args:
            raw_rewards: (N, M), finite, N ≥ 2.

        Raises:
            CriticError: if an objective gave every response the same reward.
        """
        std, mean = torch.std_mean(raw_rewards.double(), dim=0)
        for name, deviation in zip(self.objectives, std.tolist(), strict=True):
            if not deviation > 1e-12:
                raise CriticError(
                    f"objective {name!r} gives every one of the {len(raw_rewards)} reference responses the same "
                    "reward, so there is nothing to learn.",
                    "use prompts or an objective whose rewards differ, or more rollouts.",
                )
        self.reward_mean.copy_(mean)
        self.reward_std.copy_(std)

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
        self._capture = Capture(policy, self)
        return Attachment(partial(self._let_go, self._capture), partial(self._capture.settle, wait=True))

    def detach(self) -> None:
        """Stop reading; leaves no hook behind and is harmless when nothing is attached."""
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    def _let_go(self, captured: Capture) -> None:
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
            self.settle()
        finally:
            if borrowed:
                with _borrowing:
                    self._borrowers -= 1
                    if self._borrowers == 0:
                        self.detach()

    def settle(self) -> None:
        """Raise if something that was wrong in this thread's generation has been found out since.

        Raises:
            DecodingError: if rows could not be matched to the policy's forward passes.
        """
        if self._capture is not None:
            self._capture.settle(wait=True)

    @property
    def restarted(self) -> bool:
        """Whether the latest forward pass in this thread began a new sequence after one that went on from a cache."""
        return self._capture is not None and self._capture.restarted

    @property
    def attached_policy(self) -> Any | None:
        """The policy this critic reads, or None."""
        return self._capture.policy() if self._capture is not None else None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the critic as `config.json` and `model.safetensors` with a model card, whole or not at all."""
        from mavis.critics.checkpoint import save_critic

        save_critic(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        message: str = "Upload a critic",
        token: str | None = None,
    ) -> str:
        """Upload the critic with its model card in one commit; `mavis.load_critic(repo_id)` reads it.

        Args:
            repo_id: `owner/name` on the hub; made if it does not exist.
            private: whether a repository that is made is private; None is the owner's default.
            revision: branch to commit to, made if it does not exist; None is the default branch.
            message: of the commit.
            token: of a user who may write there; None is the one that is logged in.

        Returns:
            The address of the commit.

        Raises:
            CriticError: if the hub cannot be reached or refuses.
        """
        from mavis.critics.hub import push_critic

        return push_critic(self, repo_id, private=private, revision=revision, message=message, token=token)

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

    def __init__(self, detach: Callable[[], None], settle: Callable[[], None]) -> None:
        self._detach, self._settle = detach, settle

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
