"""What critics with value heads share: a tilt and values from one vector per state, wherever that is read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mavis.critics.base import Composition, Critic
from mavis.critics.value_heads import ValueHeads
from mavis.errors import CriticError, check_whole
from mavis.math.mixture import kl_unit, tilt_coefficients
from mavis.policies.fingerprint import Fingerprint


class HeadCritic(Critic):
    """Value heads that read a vector z of the state and tell every token's value by one product.

        Q_m(s, a) = V_m(z) + ⟨A_m(z), u_a⟩,     u_a = P e_a

    where e_a is the token's row of the policy's input embedding (scaled to unit variance) and P a learnt projection.
    Everything but the product with u_a is shared by all candidates. In the `conditioned` composition A and V also read
    λ, and one more head predicts K(s, a; λ), the KL still to come:

        independent:  tilt = Σ_m λ_m Q_m(s, a)
        conditioned:  tilt = Σ_m λ_m Q_m(s, a; λ) − K(s, a; λ)

    Args:
        objectives: M distinct names.
        fingerprint: the policy this critic is for; gives V.
        composition: how the objectives' values become a tilt.
        input_size: I, size of z.
        embedding_size: E, width of the policy's input embedding.
        hidden: width of each head; 0 for linear heads, which read no λ.
        rank: r, size of u_a; 0 leaves V alone, for a z that has read the token: then K = 1 below, whatever the ids.

    Raises:
        CriticError: if a size or the composition is impossible, or a name is repeated.

    Source: the tilting function of MAVIS (arXiv 2508.13415).
    """

    token_table: Tensor
    reads_states: ClassVar[bool]
    """Whether z is made of the policy's own hidden states."""

    def __init__(
        self,
        objectives: Sequence[str],
        fingerprint: Fingerprint,
        composition: Composition,
        *,
        input_size: int,
        embedding_size: int,
        hidden: int,
        rank: int,
    ) -> None:
        super().__init__(objectives, fingerprint, composition)
        check_sizes(embedding_size=embedding_size)
        check_sizes(0, hidden=hidden, rank=rank)
        if self.conditioned and not hidden:
            raise CriticError(
                "hidden is 0, but linear heads cannot read λ, which composition='conditioned' needs.",
                "give hidden=128, or composition='independent' (improvement=independent).",
            )
        conditions = len(self.objectives) if self.conditioned else 0
        self.heads = ValueHeads(input_size, len(self.objectives) + self.conditioned, hidden, rank, conditions)
        self.projection = nn.Linear(embedding_size, rank, bias=False) if rank else None
        if rank:  # a trailing 1 in every row lets one product add V to ⟨A, u⟩
            self.register_buffer("token_table", torch.zeros(fingerprint.vocab_size, rank + 1))

    @abstractmethod
    def rollout_inputs(self, ids: Tensor, is_token: Tensor, states: Tensor) -> Tensor:
        """Compute what the heads read at every step of whole responses; gradients flow to what is trained.

        Args:
            ids: (B, P + T) integer, prompts padded on the left and responses on the right.
            is_token: (B, P + T) bool, False on padding.
            states: (B, T, H) floating, the policy's states from which the tokens of the responses were drawn; H is 0
                for a critic that does not read them.

        Returns:
            (B, T, I) float32.
        """

    @abstractmethod
    def _inputs(self, prefix_ids: Tensor) -> Tensor:
        """Read what the heads need for the next token of every row: (B, I) float32."""

    def tilt(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """See `Critic.tilt`."""
        with torch.no_grad():
            return self.tilt_from_inputs(self._inputs(prefix_ids), candidate_ids, lam)

    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """See `Critic.values`."""
        with torch.no_grad():
            return self.values_from_inputs(self._inputs(prefix_ids), candidate_ids, lam)

    def tilt_from_inputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """Compute the tilt for what the heads read.

        Args:
            inputs: (B, I) float32.
            candidate_ids: (B, K) integer, or None for every token.
            lam: (B, M) float32.

        Returns:
            (B, K) float32, nats.
        """
        coefficients = tilt_coefficients(lam) if self.conditioned else lam
        mixed = self.heads.mixed(inputs, coefficients, lam)
        if self.projection is None:
            return mixed
        if candidate_ids is None:
            return mixed @ self.token_table.T
        return torch.bmm(F.embedding(candidate_ids, self.token_table), mixed[:, :, None]).squeeze(2)

    def values_from_inputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """Compute the values for what the heads read.

        Args:
            inputs: (B, I) float32.
            candidate_ids: (B, K) integer, or None for every token.
            lam: (B, M) float32, of the policy whose values they are, see `Critic.values`.

        Returns:
            (B, K, M) float32.

        Raises:
            CriticError: if λ is given and the critic is not conditioned.
        """
        self.check_lambda_supported(lam)
        return self._outputs(inputs, candidate_ids, lam)[..., : len(self.objectives)]

    def kl_to_come_from_inputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """Compute K(s, a; λ), the KL that the tilted policy will spend after a token.

        Args:
            inputs: (B, I) float32.
            candidate_ids: (B, K) integer, or None for every token.
            lam: (B, M) float32.

        Returns:
            (B, K) float32, nats.

        Raises:
            CriticError: if the critic is not conditioned and so has no head for it.
        """
        if not self.conditioned:
            raise CriticError(
                "composition is 'independent', so the critic predicts no KL to come.",
                "train one with composition='conditioned'.",
            )
        return self._outputs(inputs, candidate_ids, lam)[..., -1] * kl_unit(lam)

    @torch.no_grad()
    def refresh_token_table(self, embeddings: Tensor) -> None:
        """Recompute u_a = P e_a for every token, after P has been trained.

        Args:
            embeddings: (V, E) float32, from `token_embeddings`.
        """
        if self.projection is not None:
            self.token_table[:, :-1] = self.projection(embeddings.to(self.projection.weight.device))
            self.token_table[:, -1] = 1.0

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Name the parameters of a pretrained trunk, which a fit moves more slowly than the heads."""
        return []

    def settings(self) -> dict[str, Any]:
        """See `Critic.settings`."""
        return {
            "hidden": self.heads.hidden,
            "rank": self.heads.rank,
            "composition": self.composition,
        }

    def _normed(self, states: Tensor) -> Tensor:
        # States of large models differ in scale from token to token; layer norm makes one learning rate fit all.
        return F.layer_norm(states.float(), states.shape[-1:])

    def _outputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor | None) -> Tensor:
        """Compute what every head says: (B, K, O)."""
        if lam is None:
            lam = inputs.new_zeros(1, len(self.objectives)).expand(len(inputs), -1)
        heads = self.heads(inputs, lam)
        if self.projection is None:
            return heads.transpose(1, 2)
        if candidate_ids is None:
            return (heads @ self.token_table.T).transpose(1, 2)
        return torch.bmm(F.embedding(candidate_ids, self.token_table), heads.transpose(1, 2))


def check_sizes(least: int = 1, **sizes: object) -> None:
    """Refuse sizes that are no whole numbers or too small.

    Raises:
        CriticError: naming the first of them.
    """
    check_whole(CriticError, "128, 64 and 128 are good sizes.", least, **sizes)
