"""The base class of critics: named objectives, a tilt over candidates, attachment to a policy, saving and loading."""

from __future__ import annotations

import os
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
from mavis.errors import CriticError, closest, warn_user
from mavis.policies.fingerprint import Fingerprint

Composition = Literal["independent", "conditioned"]
"""How the objectives' values become a tilt: each under its own policy, or all under the policy of λ."""


class Critic(Attachable, nn.Module, ABC):
    """Predicts, for each objective, the normalised reward still to come.

    Args:
        objectives: M distinct names, in the order of every tensor's last dimension.
        fingerprint: of the policy that the critic is for.
        composition: how the objectives' values become a tilt.

    Raises:
        CriticError: if there is no objective, a name is empty or repeated, or the composition is unknown.

    Examples:
        >>> import mavis, torch
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> critic.objectives, critic.composition
        (('positive', 'dialogue'), 'conditioned')

        Attached to its policy, it computes the tilt of candidate tokens for λ = β·w; λ = 0 tilts nothing:

        >>> prompts = ["Once upon a time", "Lily was"]
        >>> inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        >>> candidate_ids = torch.tensor([[10, 20, 30], [10, 20, 30]])
        >>> with critic.attach(policy), torch.no_grad():
        ...     logits = policy(**inputs).logits
        ...     tilt = critic.tilt(inputs["input_ids"], candidate_ids, torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> tilt.shape, tilt[1].tolist()
        (torch.Size([2, 3]), [0.0, 0.0, 0.0])

        A critic is saved as one folder, and can be uploaded with `push_to_hub`:

        >>> critic.save_pretrained("critic")
        >>> mavis.Critic.from_pretrained("critic").objectives
        ('positive', 'dialogue')
    """

    kind: ClassVar[str]
    """The name of this class in `config.json` of a critic folder."""
    _kinds: ClassVar[dict[str, type[Critic]]] = {}
    can_skip_steps: bool = True
    """Whether `tilt` may be skipped at some steps, because the critic catches up at the next call."""
    reward_mean: Tensor
    reward_std: Tensor
    about: dict[str, Any]
    """Information for the model card, JSON-compatible: `policy`, `data`, `training` and `efficiency`, where known."""
    max_trained_lambda: Tensor
    """The largest |λ| = Σ_m λ_m in the rollouts that a conditioned critic was trained on; 0 if unknown."""

    def __init__(
        self, objectives: Sequence[str], fingerprint: Fingerprint, composition: Composition = "independent"
    ) -> None:
        super().__init__()
        names = [objectives] if isinstance(objectives, str) else list(objectives)
        if (
            not names
            or len(set(names)) != len(names)
            or not all(isinstance(n, str) and n and n.isprintable() for n in names)
        ):
            raise CriticError(
                f"objectives is {names}, expected at least one name of printable characters, each of them once.",
                "pass e.g. objectives=['positive', 'dialogue'].",
            )
        self.objectives: tuple[str, ...] = tuple(names)
        if composition not in get_args(Composition):
            raise CriticError(
                f"composition is {composition!r}, expected {' or '.join(map(repr, get_args(Composition)))}.",
                closest(str(composition), get_args(Composition)),
            )
        self.composition: Composition = composition
        self.fingerprint = fingerprint
        self.calibration: Calibration | None = None
        self.decoding: TrainedDecoding | None = None
        self.about: dict[str, Any] = {}
        self.register_buffer("reward_mean", torch.zeros(len(names), dtype=torch.float64))
        self.register_buffer("reward_std", torch.ones(len(names), dtype=torch.float64))
        self.register_buffer("max_trained_lambda", torch.zeros((), dtype=torch.float64))

    def __init_subclass__(cls, *, has_folder: bool = True, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" not in vars(cls) or not has_folder:
            return
        known = cls._kinds.get(cls.kind)
        # The same class again is a module that was reloaded.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise CriticError(
                f"kind is {cls.kind!r} in {cls.__qualname__}, but {known.__qualname__} is saved and loaded under it.",
                "give the class a kind of its own.",
            )
        cls._kinds[cls.kind] = cls

    @abstractmethod
    def tilt(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """Compute the tilt of every candidate.

            independent:  tilt(s, a) = Σ_m λ_m Q_m(s, a)
            conditioned:  tilt(s, a) = Σ_m λ_m Q_m(s, a; λ) − K(s, a; λ)

        Args:
            prefix_ids: (B, L) integer, the ids that the logits processor is called with.
            candidate_ids: (B, K) integer, or None for all tokens in order (K = V).
            lam: (B, M) float32, λ = β·w.

        Returns:
            (B, K) float32, in nats.

        Raises:
            CriticError: if the critic is not attached to a policy.
            DecodingError: if the rows cannot be matched to a forward pass.
        """

    @abstractmethod
    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """Compute Q_m(s, a), the value behind the tilt, for every candidate and objective.

        Args:
            prefix_ids: (B, L) integer, the ids that the logits processor is called with.
            candidate_ids: (B, K) integer, or None for all tokens in order (K = V).
            lam: (B, M) float32, the λ whose policy's values are wanted from a conditioned critic; None means λ = 0, the
                reference policy, which is just outside the range that it was trained on.

        Returns:
            (B, K, M) float32, on the normalised reward scale.

        Raises:
            CriticError: if λ is given and the critic is not conditioned.
        """

    @property
    def conditioned(self) -> bool:
        """Whether the heads read λ."""
        return self.composition == "conditioned"

    @property
    def max_positions(self) -> int | None:
        """The most tokens of prompt and response that the critic can read; None for any number."""
        return None

    def check_lambda_supported(self, lam: Tensor | None) -> None:
        """Check that the critic's values depend on λ, if one is given.

        Args:
            lam: the argument of `values`.

        Raises:
            CriticError: if it is not None and the critic is not conditioned.
        """
        if lam is not None and not self.conditioned:
            raise CriticError(
                "lam is given, but composition is 'independent': its values are the same for every λ.",
                "leave lam out, or train a critic with composition='conditioned'.",
            )

    def warn_outside_trained_range(self, lam: Tensor) -> None:
        """Warn if a λ is outside the range that a conditioned critic was trained on.

        Args:
            lam: (R, M), λ = β·w.
        """
        most = float(self.max_trained_lambda)
        if not self.conditioned or not most:
            return
        outside = (lam < 0).any(dim=1) | (lam.abs().sum(dim=1) > most * (1 + 1e-6))
        if bool(outside.any()):
            row = [round(x, 4) for x in lam[outside][0].tolist()]
            warn_user(
                f"lambda = beta · weights is {row}, but the critic was trained on lambda ≥ 0 with a sum of at most "
                f"{most:g}; beyond that its values are extrapolated."
            )

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor as JSON-compatible data, for `config.json`."""

    def normalise(self, raw_rewards: Tensor) -> Tensor:
        """Convert raw rewards to the normalised scale.

            R = (raw − mean) / std

        Args:
            raw_rewards: (..., M).

        Returns:
            (..., M) float64.
        """
        return (raw_rewards.double() - self.reward_mean.cpu()) / self.reward_std.cpu()

    def set_normalisation(self, raw_rewards: Tensor) -> None:
        """Set mean and standard deviation to those of rewards of reference-policy rollouts.

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
        """Write the critic to a folder: `config.json`, `model.safetensors` and a model card.

        The folder is written completely or not at all.

        Args:
            folder: the target; an existing critic is replaced.

        Raises:
            CriticError: if `folder` holds something other than a critic, or the critic is a `CriticGroup`.
        """
        save_critic(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Load a critic from a folder or from the hub.

        Args:
            folder: a folder that `save_pretrained` wrote, or the `owner/name` of a hub repository that `push_to_hub`
                uploaded, if there is no such local folder.
            revision: branch, tag or commit on the hub; None for the default branch.

        Returns:
            The critic on the CPU, in evaluation mode, of the class that its `config.json` names.

        Raises:
            CriticError: if the folder exists neither locally nor on the hub, is not a critic folder, has no weights in
                safetensors, is corrupt or truncated, or holds a critic that is not of this class.
            MissingPackageError: if its trunk has adapters and peft is not installed.
        """
        return cls._checked(load_critic(folder, cls._kinds, revision), folder)

    @classmethod
    def describe(cls, folder: str | os.PathLike[str]) -> Self:
        """Load everything of a critic but the weights of its networks, to inspect it without the memory.

        Args:
            folder: a folder that `save_pretrained` wrote.

        Returns:
            The critic on the meta device, with its objectives, fingerprint, calibration, normalisation and range of λ.
            It cannot be attached or compute tilts.

        Raises:
            CriticError: as in `from_pretrained`.
        """
        return cls._checked(describe_critic(folder, cls._kinds), folder)

    @classmethod
    def _checked(cls, critic: Critic, folder: str | os.PathLike[str]) -> Self:
        if not isinstance(critic, cls):
            raise CriticError(
                f"folder {str(folder)!r} holds a {type(critic).__name__}, expected a {cls.__name__}.",
                f"use {type(critic).__name__}.from_pretrained, or Critic.from_pretrained for any class.",
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
        """Upload the critic and its model card to the hub, in one commit.

        Args:
            repo_id: `owner/name` on the hub; created if it does not exist.
            private: whether a new repository is private; None for the owner's default.
            revision: branch to commit to, created if it does not exist; None for the default branch.
            commit_message: the summary of the commit.
            token: access token with write permission; None for the one of `hf auth login`.

        Returns:
            The URL of the commit.

        Raises:
            CriticError: if the hub cannot be reached or rejects the upload.
        """
        return push_critic(self, repo_id, private=private, revision=revision, message=commit_message, token=token)
