"""The critic that reads the policy's own last hidden state: no second model, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mavis.critics.base import Critic
from mavis.critics.fingerprint import Fingerprint, embedding_shape, output_embedding
from mavis.critics.heads import ValueHeads
from mavis.errors import CriticError


class HiddenStateCritic(Critic):
    """Values from the state that the policy's output embedding reads.

        Q_m(s, a) = V_m(h_s) + ⟨A_m(h_s), u_a⟩,     u_a = P e_a

    where h_s is the policy's last hidden state at s, e_a the token's row of the policy's input embedding (scaled to
    unit variance) and P a learnt projection. Everything but the product with u_a is shared by all candidates.

    Args:
        objectives: M distinct names.
        fingerprint: the policy this critic is for; gives H and V.
        embedding_size: E, width of the policy's input embedding.
        hidden: width of each head, ≥ 1.
        rank: r, size of u_a, ≥ 1.

    Raises:
        CriticError: if a size is not positive or a name is repeated.

    Source: the tilting function of MAVIS (arXiv 2508.13415), read from the policy's own state instead of from a
    separate value model.
    """

    kind = "hidden_state"
    token_table: Tensor

    def __init__(
        self,
        objectives: Sequence[str],
        fingerprint: Fingerprint,
        embedding_size: int,
        hidden: int = 128,
        rank: int = 64,
    ) -> None:
        super().__init__(objectives, fingerprint)
        for name, size in (("embedding_size", embedding_size), ("hidden", hidden), ("rank", rank)):
            if not isinstance(size, int) or size < 1:
                raise CriticError(f"{name} is {size!r}, expected a whole number ≥ 1.", "128 and 64 are good sizes.")
        self.heads = ValueHeads(fingerprint.hidden_size, len(self.objectives), hidden, rank)
        self.projection = nn.Linear(embedding_size, rank, bias=False)
        # A trailing 1 in every row lets one product add V to ⟨A, u⟩.
        self.register_buffer("token_table", torch.zeros(fingerprint.vocab_size, rank + 1))

    @classmethod
    def for_policy(
        cls, policy: Any, objectives: Sequence[str], *, hidden: int = 128, rank: int = 64, seed: int = 0
    ) -> HiddenStateCritic:
        """Build an untrained critic that fits a policy; it predicts 0 until it is trained.

        Args:
            policy: a causal LM with input and output embeddings.
            objectives: M distinct names.
            hidden: width of each head.
            rank: size of a token's vector.
            seed: of the initial weights.

        Raises:
            PolicyError: if the policy has no output embedding.
            CriticError: if a size is not positive or a name is repeated.
        """
        fingerprint = Fingerprint.of(policy)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = policy.get_input_embeddings().weight.shape[1]
            critic = cls(objectives, fingerprint, width, hidden, rank)
        critic.refresh_token_table(token_embeddings(policy))
        return critic

    def tilt(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """See `Critic.tilt`."""
        with torch.no_grad():
            return self.tilt_of_states(self._states(prefix_ids), candidate_ids, lam)

    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None) -> Tensor:
        """See `Critic.values`."""
        with torch.no_grad():
            return self.values_of_states(self._states(prefix_ids), candidate_ids)

    def tilt_of_states(self, states: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """Compute the tilt for given hidden states.

        Args:
            states: (B, H), floating.
            candidate_ids: (B, K) integer, or None for every token.
            lam: (B, M) float32.

        Returns:
            (B, K) float32.
        """
        mixed = self.heads.mixed(states, lam)
        if candidate_ids is None:
            return mixed @ self.token_table.T
        return torch.bmm(F.embedding(candidate_ids, self.token_table), mixed[:, :, None]).squeeze(2)

    def values_of_states(self, states: Tensor, candidate_ids: Tensor | None) -> Tensor:
        """Compute the values for given hidden states.

        Args:
            states: (B, H), floating.
            candidate_ids: (B, K) integer, or None for every token.

        Returns:
            (B, K, M) float32.
        """
        heads = self.heads(states)
        if candidate_ids is None:
            return (heads @ self.token_table.T).transpose(1, 2)
        return torch.bmm(F.embedding(candidate_ids, self.token_table), heads.transpose(1, 2))

    @torch.no_grad()
    def refresh_token_table(self, embeddings: Tensor) -> None:
        """Recompute u_a = P e_a for every token, after P has been trained.

        Args:
            embeddings: (V, E) float32, from `token_embeddings`.
        """
        self.token_table[:, :-1] = self.projection(embeddings.to(self.projection.weight.device))
        self.token_table[:, -1] = 1.0

    def settings(self) -> dict[str, Any]:
        """See `Critic.settings`."""
        return {
            "embedding_size": self.projection.in_features,
            "hidden": self.heads.hidden,
            "rank": self.heads.rank,
        }


def token_embeddings(policy: Any) -> Tensor:
    """Return the policy's input embedding, scaled so that its entries have unit variance over the vocabulary.

    Returns:
        (V, E) float32, where V is the size of the *output* vocabulary: rows beyond it are dropped, missing ones are 0.
    """
    weight = policy.get_input_embeddings().weight.detach().float()
    _, vocabulary = embedding_shape(output_embedding(policy))
    weight = F.pad(weight[:vocabulary], (0, 0, 0, max(0, vocabulary - weight.shape[0])))
    return weight / weight.std().clamp_min(1e-12)
