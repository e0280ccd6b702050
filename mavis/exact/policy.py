"""A world as a causal LM, for `generate`, the critics and the tilt.

A value model cannot start from a copy of it, as it would have no counters; give it a `backbone` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from mavis.errors import CriticError
from mavis.exact.world import World


class WorldConfig(PreTrainedConfig):
    """The configuration of a `WorldPolicy`.

    Args:
        tokens: V; padding is one more.
        caps: where the counters stop.
        steps: T.
    """

    model_type = "mavis_world"

    def __init__(self, tokens: int = 2, caps: Sequence[int] = (1,), steps: int = 1, **others: Any) -> None:
        self.tokens, self.vocab_size = tokens, tokens + 1
        self.caps = list(caps)
        self.steps = steps
        self.hidden_size = tokens + steps + 1 + sum(cap + 1 for cap in self.caps)
        self.num_hidden_layers = self.num_attention_heads = 1
        super().__init__(**others)


class WorldPolicy(PreTrainedModel, GenerationMixin):
    """The reference policy of a world.

    The last hidden state is one-hot in the last token, the step and every count; the output embedding reads the token
    and gives log π_ref. The cache holds per-token counts that are summed at every step, so beams, crops and padding on
    the left rearrange them as they do the keys and values of an attention layer. The first token is the prompt and is
    not counted; all later ones are response tokens, even if they are part of the input.

    Examples:
        >>> import torch
        >>> from mavis.exact import World, WorldPolicy
        >>> policy = WorldPolicy.of(World.random("conflicting", seed=0, tokens=10, steps=4))
        >>> policy.generate(torch.tensor([[3]]), do_sample=True).shape
        torch.Size([1, 5])
    """

    config_class = WorldConfig
    main_input_name = "input_ids"

    def __init__(self, config: WorldConfig) -> None:
        super().__init__(config)
        # Padding embeds to zero and is never drawn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.tokens)
        self.counters = nn.Embedding(config.vocab_size, len(config.caps))
        self.lm_head = nn.Linear(config.hidden_size, config.tokens, bias=False)
        self.post_init()

    @classmethod
    def of(cls, world: World) -> WorldPolicy:
        """Build the policy of a world; its responses end after T tokens."""
        policy = cls(WorldConfig(world.tokens, world.caps, world.steps, pad_token_id=world.tokens))
        with torch.no_grad():
            policy.embed_tokens.weight.copy_(torch.eye(world.tokens + 1)[:, :-1])
            policy.counters.weight.copy_(F.pad(world.counted.T, (0, 0, 0, 1)))
            policy.lm_head.weight.zero_()
            policy.lm_head.weight[:, : world.tokens] = world.logprobs.T
        policy.generation_config.max_new_tokens = world.steps
        return policy.eval().requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the layer that gives log π_ref."""
        return self.lm_head

    def encode(self, tokens: Tensor, step: Tensor, counts: Tensor) -> Tensor:
        """Encode states as hidden states.

        Args:
            tokens: (...) integer, the last token; V stands for padding.
            step: (...) integer, the number of response tokens so far, at most T.
            counts: (..., C) integer, at most the caps.

        Returns:
            (..., H).
        """
        parts = [self.embed_tokens(tokens), F.one_hot(step, self.config.steps + 1)]
        parts += [F.one_hot(counts[..., c], cap + 1) for c, cap in enumerate(self.config.caps)]
        return torch.cat(parts, dim=-1).to(self.lm_head.weight.dtype)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Compute log π_ref after every position, (B, S, V)."""
        new = input_ids.shape[1]
        cache = past_key_values if past_key_values is not None else DynamicCache(config=self.config)
        seen = cache.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), seen + new)
        is_token = attention_mask.bool()
        step = (is_token.long().cumsum(1) - 1).clamp_min(0)[:, -new:]
        is_response = is_token[:, -new:] & (step > 0)
        counted = (self.counters(input_ids) * is_response[:, :, None])[:, None]  # (B, one head, S, C)
        every, _ = cache.update(counted, counted, 0)
        caps = torch.tensor(self.config.caps, device=every.device)
        counts = every[:, 0].cumsum(1)[:, -new:].round().long().minimum(caps)
        states = self.encode(input_ids, step.clamp_max(self.config.steps), counts)
        kept = states[:, -logits_to_keep:] if logits_to_keep else states
        return CausalLMOutputWithPast(
            logits=self.lm_head(kept), past_key_values=cache if use_cache is not False else None
        )

    def state_grid(self) -> Tensor:
        """Encode every state: (T, S, V, H) by step, counts and last token."""
        sizes = [torch.arange(cap + 1) for cap in self.config.caps]
        counts = torch.cartesian_prod(*sizes).reshape(-1, len(sizes))
        shape = self.config.steps, len(counts), self.config.tokens
        return self.encode(
            torch.arange(shape[2]).expand(shape),
            torch.arange(shape[0])[:, None, None].expand(shape),
            counts[None, :, None, :].expand(*shape, -1),
        )

    @torch.no_grad()
    def tilts(self, critic: Any, lam: Tensor) -> Tensor:
        """Compute a critic's tilt in every state, in the layout of `evaluate_tilt`.

        Args:
            critic: a hidden-state critic of this policy, without memory: one state is sufficient.
            lam: (M,), λ = β·w.

        Returns:
            (T, S, V, V) float64 by step, counts, last token and token.

        Raises:
            CriticError: if the critic reads more than one state.
        """
        if getattr(critic, "kind", None) != "hidden_state" or critic.memory is not None:
            raise CriticError(
                f"critic is a {type(critic).__name__} that reads more than one state.",
                "use a HiddenStateCritic without memory; evaluate others by sampling with generate.",
            )
        grid = self.state_grid()
        inputs = critic.response_inputs(grid.flatten(0, 2)[:, None])[:, 0]
        tilt: Tensor = critic.tilt_from_inputs(inputs, None, lam.float().expand(len(inputs), -1))
        return tilt.double().view(*grid.shape[:3], -1)


def world_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Build a tokenizer that writes tokens as the words `t0`, `t1`, ... separated by spaces.

    Examples:
        >>> from mavis.exact import World, world_tokenizer
        >>> world_tokenizer(World.random("linear", seed=0))("t3 t11")["input_ids"]
        [3, 11]
    """
    words = {f"t{token}": token for token in range(world.tokens)} | {"<pad>": world.tokens}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


class WorldObjective:
    """One objective of a world, which scores texts.

    Args:
        world: the world.
        objective: the index of one of its M rewards.

    Examples:
        >>> from mavis.exact import World, WorldObjective
        >>> world = World.random("linear", seed=0, tokens=10, steps=4)
        >>> rewards = WorldObjective(world, 0)(["t0", "t0"], ["t1 t1 t1 t1", "t2 t1 t1 t1"])
        >>> len(rewards)
        2
    """

    def __init__(self, world: World, objective: int) -> None:
        self._world, self._rewards = world, world.rewards[:, objective]

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        following = self._world.next_counts.tolist()
        scores = []
        for response in responses:
            counts = 0
            for word in response.split():
                counts = following[counts][int(word.removeprefix("t"))]
            scores.append(float(self._rewards[counts]))
        return scores
