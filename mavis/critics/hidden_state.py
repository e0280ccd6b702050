"""The critic that reads the policy's own last hidden state: no second model, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mavis.critics.base import Composition
from mavis.critics.head_critic import HeadCritic, check_sizes
from mavis.critics.recurrent import RecurrentMemory, SequenceMemories
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.token_embeddings import token_embeddings


class HiddenStateCritic(HeadCritic):
    """Values from the state that the policy's output embedding reads, and from a memory of the response's states.

        Q_m(s, a) = V_m(z) + ⟨A_m(z), u_a⟩,     z = (layer_norm(h_s), m_s)

    where h_s is the policy's last hidden state at s and m_s the memory of a small recurrent network that has read the
    response's states so far; see `HeadCritic` for the rest.

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
    reads_states = True

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
        check_sizes(0, memory=memory)
        check_sizes(hidden=hidden, rank=rank)
        super().__init__(
            objectives,
            fingerprint,
            composition,
            input_size=fingerprint.hidden_size + memory,
            embedding_size=embedding_size,
            hidden=hidden,
            rank=rank,
        )
        self.memory = RecurrentMemory(fingerprint.hidden_size, memory) if memory else None
        self.can_skip_steps = self.memory is None
        self._memory_rows: SequenceMemories | None = None

    @classmethod
    def for_policy(
        cls,
        policy: Any,
        objectives: Sequence[str],
        *,
        hidden: int = 128,
        rank: int = 64,
        memory: int = 0,
        composition: Composition = "conditioned",
        seed: int = 0,
    ) -> HiddenStateCritic:
        """Build an untrained critic that fits a policy; it predicts 0 until it is trained.

        Args:
            policy: a causal LM with input and output embeddings.
            objectives: M distinct names.
            hidden: width of each head.
            rank: size of a token's vector.
            memory: size of the memory of a response; 0 for none.
            composition: `conditioned` on λ = β·w, which comes to the optimum of every mixture, or `independent`, whose
                values go with any weights and can be put together with those of other critics.
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

    def rollout_inputs(self, ids: Tensor, is_token: Tensor, states: Tensor) -> Tensor:
        """See `HeadCritic.rollout_inputs`."""
        return self.response_inputs(states)

    def response_inputs(self, states: Tensor) -> Tensor:
        """Compute what the heads read at every step of whole responses.

        Args:
            states: (B, T, H), floating: the states from which the tokens of B responses were drawn.

        Returns:
            (B, T, I) float32.
        """
        normed = self._normed(states)
        return torch.cat([normed, self.memory(normed)], dim=-1) if self.memory is not None else normed

    def step_inputs(self, states: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute what the heads read at one step of each sequence, for callers who keep the memories themselves.

        Args:
            states: (B, H), floating: the states from which the next tokens are drawn.
            before: (B, D) float32, the memories of the response's earlier states, 0 at its first token; None without
                a memory.

        Returns:
            (B, I) float32, and the memories (B, D) after these states, None without one.
        """
        normed = self._normed(states)
        if self.memory is None:
            return normed, None
        after = self.memory.step(normed, before)
        return torch.cat([normed, after], dim=-1), after

    def settings(self) -> dict[str, Any]:
        """See `Critic.settings`."""
        assert self.projection is not None
        memory = self.memory.network.hidden_size if self.memory is not None else 0
        return super().settings() | {"embedding_size": self.projection.in_features, "memory": memory}

    def _on_attach(self, policy: Any) -> None:
        super()._on_attach(policy)
        self._memory_rows = SequenceMemories() if self.memory is not None else None

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
        ids, position = prefix_ids.to(normed.device), self._capture.position(prefix_ids)
        remembered = self._memory_rows.advance(self.memory, ids, normed, position, self._capture.raise_if_unknown)
        return torch.cat([normed, remembered], dim=-1)
