"""What every critic offers: objectives by name, a tilt over candidates, attachment to a policy."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from mavis.critics.attachment import Attachable
from mavis.critics.calibration import Calibration
from mavis.critics.io.hub import push_critic
from mavis.critics.io.load import describe_critic, load_critic
from mavis.critics.io.save import save_critic
from mavis.critics.trained_decoding import TrainedDecoding
from mavis.errors import CriticError, closest
from mavis.policies.fingerprint import Fingerprint

Composition = Literal["independent", "conditioned"]
"""How objectives' values become a tilt: each of its own policy, or all of the policy that λ makes."""


class Critic(Attachable, nn.Module, ABC):
    """Predicts, for each objective, the normalised reward still to come.

    Args:
        objectives: M distinct names, in the order of every tensor's last dimension.
        fingerprint: the policy this critic is for.
        composition: how the objectives' values become a tilt.

    Raises:
        CriticError: if there is no objective, a name is empty or comes twice, or the composition is unknown.
    """

    kind: ClassVar[str]
    """What a critic folder calls this class of critics."""
    _kinds: ClassVar[dict[str, type[Critic]]] = {}
    can_skip_steps: bool = True
    """Whether steps may be left out: what it needs of them it finds when it is next asked."""
    reward_mean: Tensor
    reward_std: Tensor
    about: dict[str, Any]
    """What its model card tells besides, plain data: `policy`, `data`, `training`, `efficiency`, as far as known."""
    max_trained_lambda: Tensor
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
        self.decoding: TrainedDecoding | None = None
        self.about: dict[str, Any] = {}
        self.register_buffer("reward_mean", torch.zeros(len(names), dtype=torch.float64))
        self.register_buffer("reward_std", torch.ones(len(names), dtype=torch.float64))
        self.register_buffer("max_trained_lambda", torch.zeros((), dtype=torch.float64))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            cls._kinds[cls.kind] = cls

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

    def check_lambda_supported(self, lam: Tensor | None) -> None:
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

    def warn_outside_trained_range(self, lam: Tensor) -> None:
        """Warn where a conditioned critic is asked for a λ that it was not trained on.

        Args:
            lam: (R, M), λ = β·w.
        """
        most = float(self.max_trained_lambda)
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

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the critic as `config.json` and `model.safetensors` with a model card, whole or not at all.

        Args:
            folder: where; an older critic there is replaced.

        Raises:
            CriticError: if `folder` holds something that is not a critic, or this kind of critic has no folder.
        """
        save_critic(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Read a critic folder; its `config.json` says which kind of critic it is.

        Args:
            folder: what `save_pretrained` wrote; or, as a string, the `owner/name` on the hub of what `push_to_hub`
                uploaded, if there is no such folder here.
            revision: branch, tag or commit on the hub; None is the default branch.

        Returns:
            The critic on the CPU, in evaluation mode, attached to nothing.

        Raises:
            CriticError: if the folder is missing here and on the hub, is no critic folder, holds a pickle where
                safetensors belong, is corrupt or truncated, or holds another kind of critic than this class;
                MissingPackageError if its trunk has adapters and peft is not installed.
        """
        return cls._checked(load_critic(folder, cls._kinds, revision), folder)

    @classmethod
    def describe(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what a critic folder says of its critic, and none of its weights.

        Args:
            folder: what `save_pretrained` wrote.

        Returns:
            The critic on the meta device: objectives, fingerprint, calibration, normalisation and range are there, and
            it can neither tilt nor be attached.

        Raises:
            CriticError: as `from_pretrained`.
        """
        return cls._checked(describe_critic(folder, cls._kinds), folder)

    @classmethod
    def _checked(cls, critic: Critic, folder: str | os.PathLike[str]) -> Self:
        if not isinstance(critic, cls):
            raise CriticError(
                f"folder {str(folder)!r} holds a {type(critic).__name__}, expected a {cls.__name__}.",
                f"use {type(critic).__name__}.from_pretrained, or Critic.from_pretrained for any kind.",
            )
        return critic

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a critic",
        token: str | None = None,
    ) -> str:
        """Upload the critic with its model card in one commit; `Critic.from_pretrained(repo_id)` reads it.

        Args:
            repo_id: `owner/name` on the hub; made if it does not exist.
            private: whether a repository that is made is private; None is the owner's default.
            revision: branch to commit to, made if it does not exist; None is the default branch.
            commit_message: of the commit.
            token: of a user who may write there; None is the one that is logged in.

        Returns:
            The address of the commit.

        Raises:
            CriticError: if the hub cannot be reached or refuses.
        """
        return push_critic(self, repo_id, private=private, revision=revision, message=commit_message, token=token)
