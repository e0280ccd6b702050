"""The critic that reads the policy's own last hidden state: no second model, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mavis.critics.base import Composition, Critic
from mavis.critics.fingerprint import Fingerprint, embedding_shape, output_embedding
from mavis.critics.heads import ValueHeads
from mavis.critics.memory import Memory, MemoryRows
from mavis.errors import CriticError
from mavis.math.mixture import kl_unit, tilt_coefficients


class HiddenStateCritic(Critic):
    """Values from the state that the policy's output embedding reads, and from a memory of the response's states.

        Q_m(s, a) = V_m(z) + ⟨A_m(z), u_a⟩,     u_a = P e_a,     z = (layer_norm(h_s), m_s)

    where h_s is the policy's last hidden state at s, m_s the memory of a small recurrent network that has read the
    response's states so far, e_a the token's row of the policy's input embedding (scaled to unit variance) and P a
    learnt projection. Everything but the product with u_a is shared by all candidates. In the `conditioned` composition
    A and V also read λ, and one more head predicts K(s, a; λ), the KL still to come:

        independent:  tilt = Σ_m λ_m Q_m(s, a)
        conditioned:  tilt = Σ_m λ_m Q_m(s, a; λ) − K(s, a; λ)

    Args:
        objectives: M distinct names.
        fingerprint: the policy this critic is for; gives H and V.
        embedding_size: E, width of the policy's input embedding.
        hidden: width of each head, ≥ 1.
        rank: r, size of u_a, ≥ 1.
        memory: size of the memory, ≥ 0; 0 for none.
        composition: how the objectives' values become a tilt.

    Raises:
        CriticError: if a size or the composition is impossible, or a name is repeated.

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
        memory: int = 0,
        composition: Composition = "independent",
    ) -> None:
        super().__init__(objectives, fingerprint, composition)
        sizes = (("embedding_size", embedding_size, 1), ("hidden", hidden, 1), ("rank", rank, 1), ("memory", memory, 0))
        for name, size, least in sizes:
            if not isinstance(size, int) or size < least:
                raise CriticError(
                    f"{name} is {size!r}, expected a whole number ≥ {least}.", "128, 64 and 128 are good sizes."
                )
        conditions = len(self.objectives) if self.conditioned else 0
        self.heads = ValueHeads(
            fingerprint.hidden_size + memory, len(self.objectives) + self.conditioned, hidden, rank, conditions
        )
        self.memory = Memory(fingerprint.hidden_size, memory) if memory else None
        self.projection = nn.Linear(embedding_size, rank, bias=False)
        # A trailing 1 in every row lets one product add V to ⟨A, u⟩.
        self.register_buffer("token_table", torch.zeros(fingerprint.vocab_size, rank + 1))
        self._memory_rows: MemoryRows | None = None

    @classmethod
    def for_policy(
        cls,
        policy: Any,
        objectives: Sequence[str],
        *,
        hidden: int = 128,
        rank: int = 64,
        memory: int = 0,
        composition: Composition = "independent",
        seed: int = 0,
    ) -> HiddenStateCritic:
        """Build an untrained critic that fits a policy; it predicts 0 until it is trained.

        Args:
            policy: a causal LM with input and output embeddings.
            objectives: M distinct names.
            hidden: width of each head.
            rank: size of a token's vector.
            memory: size of the memory of a response; 0 for none.
            composition: `independent` or `conditioned`.
            seed: of the initial weights.

        Raises:
            PolicyError: if the policy has no output embedding.
            CriticError: if a size or the composition is impossible, or a name is repeated.
        """
        fingerprint = Fingerprint.of(policy)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = policy.get_input_embeddings().weight.shape[1]
            critic = cls(objectives, fingerprint, width, hidden, rank, memory, composition)
        critic.refresh_token_table(token_embeddings(policy))
        return critic

    def tilt(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """See `Critic.tilt`."""
        with torch.no_grad():
            return self.tilt_of_inputs(self._inputs(prefix_ids), candidate_ids, lam)

    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """See `Critic.values`."""
        with torch.no_grad():
            return self.values_of_inputs(self._inputs(prefix_ids), candidate_ids, lam)

    def inputs_of_responses(self, states: Tensor) -> Tensor:
        """Compute what the heads read at every step of whole responses.

        Args:
            states: (B, T, H), floating: the states from which the tokens of B responses were drawn.

        Returns:
            (B, T, I) float32.
        """
        normed = self._normed(states)
        return torch.cat([normed, self.memory(normed)], dim=-1) if self.memory is not None else normed

    def tilt_of_inputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
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
        if candidate_ids is None:
            return mixed @ self.token_table.T
        return torch.bmm(F.embedding(candidate_ids, self.token_table), mixed[:, :, None]).squeeze(2)

    def values_of_inputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """Compute the values for what the heads read.

        Args:
            inputs: (B, I) float32.
            candidate_ids: (B, K) integer, or None for every token.
            lam: (B, M) float32, of the policy whose values they are; None is the reference policy. A critic of the
                `independent` composition does not read it.

        Returns:
            (B, K, M) float32.
        """
        return self._outputs(inputs, candidate_ids, lam)[..., : len(self.objectives)]

    def kl_to_come_of_inputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
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
        self.token_table[:, :-1] = self.projection(embeddings.to(self.projection.weight.device))
        self.token_table[:, -1] = 1.0

    def settings(self) -> dict[str, Any]:
        """See `Critic.settings`."""
        return {
            "embedding_size": self.projection.in_features,
            "hidden": self.heads.hidden,
            "rank": self.heads.rank,
            "memory": self.memory.network.hidden_size if self.memory is not None else 0,
            "composition": self.composition,
        }

    def _on_attach(self, policy: Any) -> None:
        super()._on_attach(policy)
        self._memory_rows = MemoryRows() if self.memory is not None else None

    def detach(self) -> None:
        """See `Critic.detach`."""
        super().detach()
        self._memory_rows = None

    def _inputs(self, prefix_ids: Tensor) -> Tensor:
        normed = self._normed(self._states(prefix_ids))
        if self.memory is None:
            return normed
        assert self._capture is not None
        assert self._memory_rows is not None
        lengths, begins = self._capture.place(prefix_ids)
        ids = prefix_ids.to(normed.device)
        remembered = self._memory_rows.advance(self.memory, ids, lengths, normed, begins, self._capture.lost)
        return torch.cat([normed, remembered], dim=-1)

    def _normed(self, states: Tensor) -> Tensor:
        # States of large models differ in scale from token to token; layer norm makes one learning rate fit all.
        return F.layer_norm(states.float(), states.shape[-1:])

    def _outputs(self, inputs: Tensor, candidate_ids: Tensor | None, lam: Tensor | None) -> Tensor:
        """Compute what every head says: (B, K, O)."""
        if lam is None:
            lam = inputs.new_zeros(1, len(self.objectives)).expand(len(inputs), -1)
        heads = self.heads(inputs, lam)
        if candidate_ids is None:
            return (heads @ self.token_table.T).transpose(1, 2)
        return torch.bmm(F.embedding(candidate_ids, self.token_table), heads.transpose(1, 2))


def token_embeddings(policy: Any) -> Tensor:
    """Return the policy's input embedding, scaled so that its entries have unit variance over the vocabulary.

    Returns:
        (V, E) float32, where V is the size of the *output* vocabulary: rows beyond it are dropped, missing ones are 0.
    """
    weight = policy.get_input_embeddings().weight.detach().float()
    _, vocabulary = embedding_shape(output_embedding(policy))
    weight = F.pad(weight[:vocabulary], (0, 0, 0, max(0, vocabulary - weight.shape[0])))
    return weight / weight.std().clamp_min(1e-12)
