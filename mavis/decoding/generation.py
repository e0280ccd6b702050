"""`mavis.generate`, which sets the tilt and the policy's `generate` to agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList

from mavis.critics import Critic
from mavis.critics.attachment import attached_critic
from mavis.critics.group import as_critic
from mavis.decoding.logits_processor import MavisTilt
from mavis.decoding.settings import AS_TRAINED, AsTrained, trained_length, trained_temperature
from mavis.decoding.weights import Weights
from mavis.errors import PAD_ON_THE_LEFT, DecodingError
from mavis.policies.generation_config import neutral_generation_config
from mavis.policies.limits import check_inputs_fit


def generate(
    policy: Any,
    inputs: Mapping[str, Tensor] | Tensor,
    *,
    weights: Weights,
    critic: Critic | Sequence[Critic] | None = None,
    beta: float | Sequence[float] | Tensor | None = None,
    target_kl: float | None = None,
    top_k: int | AsTrained | None = AS_TRAINED,
    temperature: float | AsTrained = AS_TRAINED,
    entropy_gate: float | None = None,
    **generate_arguments: Any,
) -> Any:
    """Generate from a policy under preference weights.

    Samples from

        π(a|s) ∝ π_ref(a|s)^{1/T} · exp(Σ_m β w_m Q_m(s, a)),   a ∈ top-k of π_ref(·|s)

    Temperature, top-k, top-p, penalties, beams, limits of time and forms of output in the policy's own
    `generation_config` are ignored unless they are passed to this call. A `generation_config` that is passed sets
    beams, limits and output, but neither temperature nor filters nor penalties: pass these by name.

    Args:
        policy: a causal LM that can `generate`.
        inputs: the tokenizer's output (`input_ids` and `attention_mask`), padded on the left, or ids (B, L).
        weights: see `MavisTilt`.
        critic: one, or several under one tilt, attached for this call unless attached already; None takes the one
            attached to the policy.
        beta: see `MavisTilt`.
        target_kl: mean KL to the reference, in nats per response of up to `max_new_tokens`; see `MavisTilt`.
        top_k: see `MavisTilt`.
        temperature: T > 0, for the tilt and for `generate`; `as_trained` takes what the critic was trained at.
        entropy_gate: see `MavisTilt`.
        generate_arguments: any other argument of `policy.generate`, such as `max_new_tokens` (by default the length
            that the critic was trained with, unless the policy's configuration has one), `num_beams`, `do_sample` (True
            unless given) or further logits processors, which run before the tilt.

    Returns:
        The output of `policy.generate`: ids (B, L + new), or its output object.

    Raises:
        CriticError: if no critic is given or attached, or it is attached to another policy.
        DecodingError, WeightsError: see `MavisTilt`; also for inputs that are not tensors, are padded on the right,
            hold tokens that the policy has no embedding of, or leave too few positions for the response, and for a
            policy whose `generation_config` bans, forces or watermarks tokens unasked.

    Examples:
        >>> import mavis
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> inputs = tokenizer("The little girl", return_tensors="pt")
        >>> for objective in ("dialogue", "positive"):
        ...     ids = mavis.generate(
        ...         policy,
        ...         inputs,
        ...         critic=critic,
        ...         weights={objective: 1.0},
        ...         target_kl=2.0,
        ...         do_sample=False,
        ...         max_new_tokens=22,
        ...     )
        ...     print(tokenizer.decode(ids[0], skip_special_tokens=True))
        The little girl was very curious. She asked her mom, "What is that?" Her mom said, "It's a
        The little girl was very happy. She loved to play with her toys and play with her friends. One day, she went
    """
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    if not isinstance(inputs, Mapping | Tensor):
        raise DecodingError(
            f"inputs is a {type(inputs).__name__}, expected the tokenizer's output or token ids.",
            PAD_ON_THE_LEFT,
        )
    mask = arguments.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all()):
        raise DecodingError(
            "inputs is padded on the right, so that responses would follow padding.",
            PAD_ON_THE_LEFT,
        )
    duplicates = sorted(set(arguments) & set(generate_arguments))
    if duplicates:
        raise DecodingError(f"{duplicates[0]} is given twice, in inputs and by name.", "give it once.")
    chosen = as_critic(critic if critic is not None else attached_critic(policy))
    output, _ = generate_tilted(
        policy,
        arguments,
        chosen,
        generate_arguments,
        weights=weights,
        beta=beta,
        target_kl=target_kl,
        top_k=top_k,
        temperature=temperature,
        entropy_gate=entropy_gate,
    )
    return output


def generate_tilted(
    policy: Any,
    inputs: Mapping[str, Tensor],
    critic: Critic,
    generate_arguments: dict[str, Any],
    *,
    weights: Weights,
    temperature: float | AsTrained,
    **tilt_arguments: Any,
) -> tuple[Any, MavisTilt]:
    """Generate under a tilt, with both sides set to agree; see `generate`.

    Args:
        policy: a causal LM.
        inputs: of `policy.generate`.
        critic: steers the policy.
        generate_arguments: other arguments of `policy.generate`.
        weights: see `MavisTilt`.
        temperature: T of both.
        tilt_arguments: other arguments of `MavisTilt`.

    Returns:
        The output of `policy.generate`, and the tilt, which holds what it has recorded.
    """
    others = generate_arguments.pop("logits_processor", None)
    config, remaining = neutral_generation_config(policy, trained_temperature(temperature, critic), generate_arguments)
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = trained_length(critic)
    ids = next((inputs[name] for name in ("input_ids", "inputs") if inputs.get(name) is not None), None)
    length = config.max_new_tokens
    if length is None and ids is not None:
        length = max(1, config.max_length - ids.shape[1])
    tilt = MavisTilt(weights, critic, temperature=temperature, max_new_tokens=length, **tilt_arguments)
    tilt.checks_generate = False  # what this call names may act after the tilt
    if ids is not None:
        several = len(ids) * (config.num_return_sequences or 1) * (config.num_beams or 1) > 1
        padding_id = config.pad_token_id if several else None
        check_inputs_fit(policy, ids, inputs.get("attention_mask"), length, padding_id, critic.max_positions)
    processors = LogitsProcessorList([*(others if others is not None else []), tilt])
    with critic.attached_to(policy):
        return policy.generate(**inputs, generation_config=config, logits_processor=processors, **remaining), tilt
