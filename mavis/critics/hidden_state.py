"""The hidden-state critic: value heads on the policy's own last hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mavis.critics.base import Composition
from mavis.critics.head_critic import HeadCritic, check_sizes
from mavis.critics.recurrent import RecurrentMemory, SequenceMemories
from mavis.policies.embeddings import embedding_width
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.protocol import CausalLM
from mavis.policies.token_embeddings import token_embeddings


class HiddenStateCritic(HeadCritic):
    """Reads values from the policy's last hidden state, and optionally from a recurrent memory of the response.

        Q_m(s, a) = V_m(z) + ⟨A_m(z), u_a⟩,     z = (layer_norm(h_s), m_s)

    where h_s is the policy's last hidden state at s, the input of its output embedding, and m_s the memory of a small
    recurrent network that has read the states of the response so far. See `HeadCritic` for the other symbols. There is
    no second model, so a decoding step costs little more than a plain one.

    Args:
        objectives: M distinct names.
        fingerprint: of the policy that the critic is for; determines H and V.
        embedding_size: E, width of the policy's input embedding.
        hidden: width of each head, ≥ 1.
        rank: r, size of u_a, ≥ 1.
        memory: size of the memory, ≥ 0; 0 for none.
        composition: how the objectives' values become a tilt.

    Raises:
        CriticError: if a size or the composition is invalid, or a name is repeated.

    Examples:
        >>> import mavis
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.HiddenStateCritic.for_policy(policy, ["positive", "dialogue"], memory=64)
        >>> critic.settings()
        {'hidden': 128, 'rank': 64, 'composition': 'conditioned', 'embedding_size': 128, 'memory': 64}

        It is attached for a forward pass, then gives the value of every token; untrained heads predict 0:

        >>> inputs = tokenizer("Once upon a time", return_tensors="pt")
        >>> with critic.attach(policy):
        ...     logits = policy(**inputs).logits
        ...     values = critic.values(inputs["input_ids"], None)
        >>> values.shape, float(values.abs().max())
        (torch.Size([1, 2048, 2]), 0.0)

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
        self._sequence_memories: SequenceMemories | None = None

    @classmethod
    def for_policy(
        cls,
        policy: CausalLM,
        objectives: Sequence[str],
        *,
        hidden: int = 128,
        rank: int = 64,
        memory: int = 0,
        composition: Composition = "conditioned",
        seed: int = 0,
    ) -> HiddenStateCritic:
        """Build an untrained critic for a policy; it predicts 0 until it is trained.

        Args:
            policy: a causal LM with input and output embeddings.
            objectives: M distinct names.
            hidden: width of each head.
            rank: size of a token's vector.
            memory: size of the recurrent memory of a response; 0 for none.
            composition: `conditioned` on λ = β·w, which converges to the optimum for all weights, or `independent`, as
                the paper, whose values can be combined with those of other critics.
            seed: of the initial weights.

        Raises:
            PolicyError: if the policy has no output embedding.
            CriticError: if a size or the composition is invalid, or a name is repeated.
        """
        fingerprint = Fingerprint.of(policy)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            critic = cls(objectives, fingerprint, embedding_width(policy), hidden, rank, memory, composition)
        critic.refresh_token_table(token_embeddings(policy))
        return critic

    def rollout_inputs(self, ids: Tensor, is_token: Tensor, states: Tensor) -> Tensor:
        """See `HeadCritic.rollout_inputs`."""
        return self.response_inputs(states)

    def response_inputs(self, states: Tensor) -> Tensor:
        """Compute the inputs of the heads at every step of whole responses.

        Args:
            states: (B, T, H) floating, the policy's states from which the tokens of the responses were drawn.

        Returns:
            (B, T, I) float32.
        """
        normed = self._normed(states)
        return torch.cat([normed, self.memory(normed)], dim=-1) if self.memory is not None else normed

    def step_inputs(self, states: Tensor, memories: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute the inputs of the heads at one step, for callers that store the memories themselves.

        Args:
            states: (B, H) floating, the policy's states from which the next tokens are drawn.
            memories: (B, D) float32, the memories after the previous step, 0 at the first token of a response; None
                for a critic without memory.

        Returns:
            (B, I) float32, and the memories (B, D) after this step, or None without memory.
        """
        normed = self._normed(states)
        if self.memory is None:
            return normed, None
        memories = self.memory.step(normed, memories)
        return torch.cat([normed, memories], dim=-1), memories

    def settings(self) -> dict[str, Any]:
        """See `Critic.settings`."""
        assert self.projection is not None
        memory = self.memory.network.hidden_size if self.memory is not None else 0
        return super().settings() | {"embedding_size": self.projection.in_features, "memory": memory}

    def _on_attach(self, policy: CausalLM) -> None:
        super()._on_attach(policy)
        self._sequence_memories = SequenceMemories() if self.memory is not None else None

    def detach(self) -> None:
        """See `Critic.detach`."""
        super().detach()
        self._sequence_memories = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_sequence_memories": None}

    def _inputs(self, prefix_ids: Tensor) -> Tensor:
        normed = self._normed(self._states(prefix_ids))
        if self.memory is None:
            return normed
        assert self._capture is not None
        assert self._sequence_memories is not None
        ids, position = prefix_ids.to(normed.device), self._capture.position(prefix_ids)
        memories = self._sequence_memories.advance(self.memory, ids, normed, position, self._capture.raise_if_unknown)
        return torch.cat([normed, memories], dim=-1)
