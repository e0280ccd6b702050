"""The base class of critics with value heads: tilt and values from one vector per state."""

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
    """Computes the values of all tokens from a vector z of the state, by one product per token.

        Q_m(s, a) = V_m(z) + ⟨A_m(z), u_a⟩,     u_a = P e_a

    where e_a is the token's row of the policy's input embedding (scaled to unit variance) and P a learnt projection.
    Everything but the product with u_a is shared by all candidates. In the `conditioned` composition, A and V also read
    λ, and an additional head predicts K(s, a; λ), the KL still to come:

        independent:  tilt = Σ_m λ_m Q_m(s, a)
        conditioned:  tilt = Σ_m λ_m Q_m(s, a; λ) − K(s, a; λ)

    Args:
        objectives: M distinct names.
        fingerprint: of the policy that the critic is for; determines V.
        composition: how the objectives' values become a tilt.
        input_size: I, size of z.
        embedding_size: E, width of the policy's input embedding.
        hidden: width of each head; 0 for linear heads, which read no λ.
        rank: r, size of u_a; 0 for heads with V alone, whose z has read the token already. K is then 1 in the shapes
            below, and candidate ids are ignored.

    Raises:
        CriticError: if a size or the composition is invalid, or a name is repeated.

    Source: the tilting function of MAVIS (arXiv 2508.13415).
    """

    token_table: Tensor
    reads_states: ClassVar[bool]
    """Whether z is computed from the policy's own hidden states."""

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
                "pass hidden=128, or composition='independent' (improvement=independent).",
            )
        conditions = len(self.objectives) if self.conditioned else 0
        self.heads = ValueHeads(input_size, len(self.objectives) + self.conditioned, hidden, rank, conditions)
        self.projection = nn.Linear(embedding_size, rank, bias=False) if rank else None
        if rank:  # a trailing 1 in every row makes the product include V
            self.register_buffer("token_table", torch.zeros(fingerprint.vocab_size, rank + 1))

    @abstractmethod
    def rollout_inputs(self, ids: Tensor, is_token: Tensor, states: Tensor) -> Tensor:
        """Compute the inputs of the heads at every step of whole responses, with gradients.

        Args:
            ids: (B, P + T) integer, prompts padded on the left and responses on the right.
            is_token: (B, P + T) bool, False on padding.
            states: (B, T, H) floating, the policy's states from which the response tokens were drawn; H is 0 for a
                critic that does not read them.

        Returns:
            (B, T, I) float32.
        """

    @abstractmethod
    def _inputs(self, prefix_ids: Tensor) -> Tensor:
        """Compute the inputs of the heads for the next token of every row: (B, I) float32."""

    def tilt(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """See `Critic.tilt`."""
        with torch.no_grad():
            inputs = self._inputs(prefix_ids)
            return self.tilt_from_inputs(inputs, *_moved(inputs.device, candidate_ids, lam))

    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """See `Critic.values`."""
        with torch.no_grad():
            inputs = self._inputs(prefix_ids)
            return self.values_from_inputs(inputs, *_moved(inputs.device, candidate_ids, lam))

    def tilt_from_inputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """Compute the tilt from the inputs of the heads.

        Args:
            inputs: (B, I) float32.
            candidate_ids: (B, K) integer, or None for all tokens.
            lam: (B, M) float32.

        Returns:
            (B, K) float32, nats.
        """
        coefficients = tilt_coefficients(lam) if self.conditioned else lam
        combined = self.heads.weighted_sum(inputs, coefficients, lam)
        if self.projection is None:
            return combined
        if candidate_ids is None:
            return combined @ self.token_table.T
        return torch.bmm(F.embedding(candidate_ids, self.token_table), combined[:, :, None]).squeeze(2)

    def values_from_inputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """Compute the values from the inputs of the heads.

        Args:
            inputs: (B, I) float32.
            candidate_ids: (B, K) integer, or None for all tokens.
            lam: (B, M) float32, the λ whose policy's values are wanted, see `Critic.values`.

        Returns:
            (B, K, M) float32.

        Raises:
            CriticError: if λ is given and the critic is not conditioned.
        """
        self.check_lambda_supported(lam)
        return self._outputs(inputs, candidate_ids, lam)[..., : len(self.objectives)]

    def kl_to_come_from_inputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """Compute K(s, a; λ), the KL of the tilted policy that is still to come after a token.

        Args:
            inputs: (B, I) float32.
            candidate_ids: (B, K) integer, or None for all tokens.
            lam: (B, M) float32.

        Returns:
            (B, K) float32, nats.

        Raises:
            CriticError: if the critic is not conditioned, so it has no such head.
        """
        if not self.conditioned:
            raise CriticError(
                "composition is 'independent', so the critic does not predict the KL to come.",
                "train one with composition='conditioned'.",
            )
        return self._outputs(inputs, candidate_ids, lam)[..., -1] * kl_unit(lam)

    @torch.no_grad()
    def refresh_token_table(self, embeddings: Tensor) -> None:
        """Recompute u_a = P e_a for every token after P was trained.

        Args:
            embeddings: (V, E) float32, from `token_embeddings`.
        """
        if self.projection is not None:
            self.token_table[:, :-1] = self.projection(embeddings.to(self.projection.weight.device))
            self.token_table[:, -1] = 1.0

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of a pretrained trunk, which are trained at a lower rate than the heads."""
        return []

    def settings(self) -> dict[str, Any]:
        """See `Critic.settings`."""
        return {
            "hidden": self.heads.hidden,
            "rank": self.heads.rank,
            "composition": self.composition,
        }

    def _normed(self, states: Tensor) -> Tensor:
        # In large models the scale of states varies between tokens; after a layer norm one learning rate fits all.
        return F.layer_norm(states.float(), states.shape[-1:])

    def _outputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor | None) -> Tensor:
        """Compute the outputs of all heads: (B, K, O)."""
        if lam is None:
            lam = inputs.new_zeros(1, len(self.objectives)).expand(len(inputs), -1)
        heads = self.heads(inputs, lam)
        if self.projection is None:
            return heads.transpose(1, 2)
        if candidate_ids is None:
            return (heads @ self.token_table.T).transpose(1, 2)
        return torch.bmm(F.embedding(candidate_ids, self.token_table), heads.transpose(1, 2))


def _moved(device: torch.device, candidate_ids: Tensor | None, lam: Any) -> tuple[Tensor | None, Any]:
    """Move candidate ids and λ to the critic: `generate` keeps scores where the ids are, which may be elsewhere."""
    return candidate_ids.to(device) if candidate_ids is not None else None, lam.to(device) if lam is not None else None


def check_sizes(least: int = 1, **sizes: object) -> None:
    """Check that the sizes of a network are whole numbers of at least `least`.

    Raises:
        CriticError: if one is not.
    """
    check_whole(CriticError, "64 and 128 are good sizes.", least, **sizes)
