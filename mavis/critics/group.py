"""Several critics of one policy used as a single critic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mavis.critics.attachment import Attachment
from mavis.critics.base import Critic
from mavis.critics.head_critic import HeadCritic
from mavis.errors import CriticError
from mavis.policies.protocol import CausalLM


class CriticGroup(Critic, has_folder=False):
    """Combines the objectives of several critics; its tilt is the sum of theirs.

        tilt(s, a) = Σ_critics Σ_m λ_m Q_m(s, a)

    Args:
        critics: critics of the `independent` composition for policies of the same shape, with distinct objectives. They
            may already be attached, all to the same policy.

    Raises:
        CriticError: if there is none, two share an objective, one is conditioned (its values do not take the others'
            objectives into account), or they are for policies of different shapes.

    Examples:
        >>> import mavis
        >>> policy, tokenizer = mavis.embedded.load()
        >>> positive, brevity = (
        ...     mavis.HiddenStateCritic.for_policy(policy, [name], composition="independent")
        ...     for name in ("positive", "brevity")
        ... )
        >>> group = mavis.CriticGroup([positive, brevity])
        >>> group.objectives
        ('positive', 'brevity')
    """

    kind = "group"

    def __init__(self, critics: Sequence[Critic]) -> None:
        members = list(critics)
        if not members or not all(isinstance(critic, Critic) for critic in members):
            raise CriticError(
                f"critic is {[type(critic).__name__ for critic in members]}, expected critics.",
                "pass e.g. [one, another].",
            )
        names = [name for critic in members for name in critic.objectives]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise CriticError(
                f"objective {twice[0]!r} belongs to two of the critics.", "leave one of these critics out."
            )
        for critic in members:
            if critic.conditioned:
                raise CriticError(
                    f"the critic of {', '.join(critic.objectives)} is conditioned, so its values are only valid for "
                    "weights on its own objectives.",
                    "group critics of the independent composition, or train one conditioned critic for all objectives.",
                )
            shape = critic.fingerprint.hidden_size, critic.fingerprint.vocab_size
            first = members[0].fingerprint
            if shape != (first.hidden_size, first.vocab_size):
                raise CriticError(
                    f"the critics are for different policies: hidden size and vocabulary size are {shape} and "
                    f"{(first.hidden_size, first.vocab_size)}.",
                    "group critics of one policy.",
                )
        super().__init__(names, members[0].fingerprint)
        self.critics = nn.ModuleList(members)
        self.can_skip_steps = all(critic.can_skip_steps for critic in members)
        self._slices: list[slice] = []
        for critic in members:
            start = self._slices[-1].stop if self._slices else 0
            self._slices.append(slice(start, start + len(critic.objectives)))
        self.reward_mean.copy_(torch.cat([critic.reward_mean.cpu() for critic in members]))
        self.reward_std.copy_(torch.cat([critic.reward_std.cpu() for critic in members]))

    def tilt(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """See `Critic.tilt`."""
        tilts = [
            critic.tilt(prefix_ids, candidate_ids, lam[:, columns])
            for critic, columns in zip(self._members, self._slices, strict=True)
        ]
        return torch.stack(tilts).sum(0)

    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """See `Critic.values`."""
        self.check_lambda_supported(lam)
        return torch.cat([critic.values(prefix_ids, candidate_ids) for critic in self._members], dim=-1)

    def settings(self) -> dict[str, Any]:
        """Raise: a group is not saved as one folder.

        Raises:
            CriticError: always.
        """
        raise CriticError(
            f"critic is a group of {len(self._members)} critics, which has no folder of its own.",
            "save each of its critics, and load them as a list.",
        )

    def attach(self, policy: CausalLM) -> Attachment:
        """Attach every critic, or none if one of them fails; see `Critic.attach`."""
        with ExitStack() as undo:
            for critic in self._members:
                critic.attach(policy)
                undo.callback(critic.detach)
            undo.pop_all()
        return Attachment(self.detach, self.raise_pending)

    @contextmanager
    def attached_to(self, policy: CausalLM) -> Iterator[None]:
        """Attach every critic for a block; see `Critic.attached_to`."""
        with ExitStack() as attachments:
            for critic in self._members:
                attachments.enter_context(critic.attached_to(policy))
            yield

    def detach(self) -> None:
        """See `Critic.detach`."""
        for critic in self._members:
            critic.detach()

    def raise_pending(self) -> None:
        """See `Critic.raise_pending`."""
        for critic in self._members:
            critic.raise_pending()

    @property
    def max_positions(self) -> int | None:
        """See `Critic.max_positions`."""
        return min((most for critic in self._members if (most := critic.max_positions) is not None), default=None)

    @property
    def restarted(self) -> bool:
        """See `Critic.restarted`."""
        return self._members[0].restarted

    @property
    def attached_policy(self) -> Any | None:
        """The policy that every critic of the group is attached to, or None."""
        policies = [critic.attached_policy for critic in self._members]
        return policies[0] if all(policy is policies[0] for policy in policies) else None

    @property
    def _members(self) -> list[Any]:
        return list(self.critics)


def as_critic(critics: Critic | Sequence[Critic]) -> Critic:
    """Return a single critic as it is, and a list of several as a `CriticGroup`.

    Args:
        critics: a critic, or a list or tuple of critics.

    Raises:
        CriticError: if an element is not a critic, or the critics cannot be grouped.
    """
    if isinstance(critics, list | tuple):
        return critics[0] if len(critics) == 1 and isinstance(critics[0], Critic) else CriticGroup(critics)
    if not isinstance(critics, Critic):
        raise CriticError(
            f"critic is a {type(critics).__name__}, expected a critic.", "use mavis.Critic.from_pretrained(folder)."
        )
    return critics


def value_critics(critic: Critic) -> list[HeadCritic]:
    """Return the critics whose value heads a critic's objectives have, in order: itself, or the members of a group.

    Raises:
        CriticError: if one of them has no value heads.
    """
    found: list[HeadCritic] = []
    for member in critic.critics if isinstance(critic, CriticGroup) else [critic]:
        if not isinstance(member, HeadCritic):
            raise CriticError(
                f"the critic of {', '.join(critic.objectives)} is a {type(member).__name__}, expected one with value "
                "heads.",
                "only the values of hidden-state critics, value models and groups of these can be evaluated.",
            )
        found.append(member)
    return found
