"""`mavis.respond`, from prompts to responses as texts: conversations or texts in, what was written and spent out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mavis.critics import Critic
from mavis.critics.attachment import attached_critic
from mavis.critics.group import as_critic
from mavis.decoding.generation import generate_tilted
from mavis.decoding.settings import AS_TRAINED, AsTrained, trained_length
from mavis.decoding.weights import Weights
from mavis.errors import DecodingError, check_whole
from mavis.policies.chat import Prompt, warn_unsuitable
from mavis.policies.devices import states_device
from mavis.policies.encoding import encode_prompts, response_texts, unpadded_ids, until_end
from mavis.policies.generation_config import end_token_ids
from mavis.policies.limits import check_prompts_fit


@dataclass(frozen=True)
class Response:
    """One response to a prompt.

    Args:
        text: without special tokens.
        token_ids: of the response, up to and including its end token.
        finished: whether it ended with an end token; else it was cut off at the limit.
        kl: the KL to the reference policy of each token's step, in nats.

    Examples:
        >>> from mavis.decoding import Response
        >>> Response("Hello.", [23, 7, 2], finished=True, kl=[0.5, 0.25, 0.0]).spent
        0.75
    """

    text: str
    token_ids: list[int]
    finished: bool
    kl: list[float]

    @property
    def spent(self) -> float:
        """The KL of the whole response in nats, which `target_kl` is a budget for."""
        return sum(self.kl)


def respond(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    weights: Weights,
    critic: Critic | Sequence[Critic] | None = None,
    beta: float | Sequence[float] | Tensor | None = None,
    target_kl: float | None = None,
    top_k: int | AsTrained | None = AS_TRAINED,
    temperature: float | AsTrained = AS_TRAINED,
    max_new_tokens: int | AsTrained = AS_TRAINED,
    min_new_tokens: int = 0,
    samples: int = 1,
    greedy: bool = False,
    continue_final_message: bool = False,
    streamer: Any = None,
) -> list[list[Response]]:
    """Respond to prompts under preference weights.

    Conversations are rendered by the tokenizer's chat template and answered; texts are continued. Sampling uses torch's
    global generator: seed it by `torch.manual_seed`.

    Args:
        policy: a causal LM.
        tokenizer: its tokenizer.
        prompts: B texts or conversations.
        weights: see `MavisTilt`; one row per prompt gives each its own.
        critic: one, or several under one tilt; None takes the one attached to the policy.
        beta: see `MavisTilt`.
        target_kl: mean KL to the reference, in nats per response of up to `max_new_tokens`; see `MavisTilt`.
        top_k: see `MavisTilt`.
        temperature: T > 0; `as_trained` takes what the critic was trained at.
        max_new_tokens: the longest response in tokens, ≥ 1; `as_trained` takes the length that the critic was trained
            with.
        min_new_tokens: n ≥ 0: no end token is among a response's first n tokens, for policies that stop at once.
        samples: responses to each prompt, ≥ 1.
        greedy: take the most likely token at every step instead of sampling.
        continue_final_message: let the policy continue a last message of the assistant's instead of refusing it.
        streamer: of transformers, which is told the tokens as they are drawn; for one response at a time.

    Returns:
        B lists of `samples` responses.

    Raises:
        DecodingError: if a number is out of range, or there are no prompts; else see `MavisTilt`.
        PromptError: if a conversation cannot be rendered.
        PolicyError: if the tokenizer writes tokens that the policy has no embedding of.
        ConfigError: if the longest prompt and response have more positions than the policy or a value model has learnt.

    Examples:
        >>> import mavis
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> [[response]] = mavis.respond(
        ...     policy, tokenizer, ["The dog"], critic=critic, weights={"dialogue": 1.0}, greedy=True, max_new_tokens=32
        ... )
        >>> response.finished, len(response.kl)
        (False, 32)
    """
    if isinstance(prompts, str) or not prompts:
        raise DecodingError(f"prompts is {prompts!r}, expected at least one prompt.", "pass a list of prompts.")
    check_whole(DecodingError, "1 is one response to each prompt.", samples=samples)
    check_whole(DecodingError, "0 lets responses end at once.", 0, min_new_tokens=min_new_tokens)
    if greedy and samples > 1:
        raise DecodingError(f"samples is {samples}, but greedy decoding gives one response.", "leave one of them out.")
    warn_unsuitable(policy, tokenizer, prompts)
    chosen = as_critic(critic if critic is not None else attached_critic(policy))
    length = trained_length(chosen) if max_new_tokens == AS_TRAINED else max_new_tokens
    check_whole(DecodingError, "as_trained takes the critic's length.", max_new_tokens=length)
    if min_new_tokens > length:
        raise DecodingError(
            f"min_new_tokens is {min_new_tokens}, but max_new_tokens {length}.", "0 lets responses end at once."
        )
    continued = {"continue_final_message": continue_final_message}
    check_prompts_fit(policy, tokenizer, prompts, length, chosen.max_positions, **continued)
    inputs = encode_prompts(tokenizer, prompts, **continued)
    device, width = states_device(policy), inputs["input_ids"].shape[1]
    generate_arguments = {
        "max_new_tokens": length,
        "min_new_tokens": min_new_tokens,
        "num_return_sequences": samples,
        "do_sample": not greedy,
        "streamer": streamer,
    }
    if tokenizer.pad_token_id is not None:  # the policy's own may have no embedding
        generate_arguments["pad_token_id"] = tokenizer.pad_token_id
    output, tilt = generate_tilted(
        policy,
        {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")},
        chosen,
        generate_arguments,
        weights=weights,
        beta=beta,
        target_kl=target_kl,
        top_k=top_k,
        temperature=temperature,
        record_kl=True,
    )
    ends = end_token_ids(policy)
    written = [until_end(row, ends) for row in output[:, width:].tolist()]
    asked = [ids for ids in unpadded_ids(inputs) for _ in range(samples)]
    responses = [
        Response(text, ids, bool(ids) and ids[-1] in ends, kl[: len(ids)])
        for text, ids, kl in zip(response_texts(tokenizer, asked, written), written, tilt.kl.tolist(), strict=True)
    ]
    return [responses[start : start + samples] for start in range(0, len(responses), samples)]
