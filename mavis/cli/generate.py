"""`mavis generate`: continue prompts under preference weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.build import load_policy, plain
from mavis.cli.console import terminal_text
from mavis.cli.hydra_app import hydra_app
from mavis.errors import ConfigError
from mavis.policies.devices import states_device

if TYPE_CHECKING:
    from mavis.critics import Critic
    from mavis.decoding.weights import Weights
    from mavis.policies import Prompt


def continuations(
    policy: Any,
    tokenizer: Any,
    critic: Critic,
    prompts: Sequence[Prompt],
    decoding: Any,
    *,
    weights: Weights,
    beta: float | None,
    target_kl: float | None,
    samples: int = 1,
    greedy: bool = False,
) -> list[str]:
    """Continue each prompt `samples` times.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: steers the policy.
        prompts: B texts.
        decoding: a `decoding` group: `max_new_tokens`, `top_k` and `temperature`.
        weights: see `mavis.generate`.
        beta: see `mavis.generate`.
        target_kl: see `mavis.generate`.
        samples: responses per prompt.
        greedy: whether to choose the most likely token at every step instead of sampling.

    Returns:
        B × samples texts, prompt and response together; those of one prompt are adjacent.
    """
    from mavis.decoding import generate
    from mavis.decoding.settings import AS_TRAINED, trained_length
    from mavis.policies import encode_prompts

    length = decoding.max_new_tokens
    inputs = encode_prompts(tokenizer, prompts)
    device = states_device(policy)
    output = generate(
        policy,
        {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")},
        critic=critic,
        weights=weights,
        beta=beta,
        target_kl=target_kl,
        top_k=decoding.top_k,
        temperature=decoding.temperature,
        max_new_tokens=trained_length(critic) if length == AS_TRAINED else length,
        num_return_sequences=samples,
        do_sample=not greedy,
    )
    texts: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True)
    return texts


def _check(config: Any) -> None:
    if (config.prompt is None) == (config.prompt_file is None):
        raise ConfigError(
            f"prompt is {config.prompt!r} and prompt_file is {config.prompt_file!r}; expected exactly one of them.",
            "prompt_file=- reads standard input.",
        )
    if config.prompt_file not in (None, "-") and not Path(config.prompt_file).expanduser().is_file():
        raise ConfigError(  # otherwise the name would be looked up on the hub
            f"prompt_file is {config.prompt_file!r}, which does not exist.",
            "name a file with one prompt per line, or - for standard input.",
        )
    if config.samples < 1:
        raise ConfigError(f"samples is {config.samples}, expected ≥ 1.", "samples=3 continues each prompt three times.")
    if config.greedy and config.samples > 1:
        raise ConfigError(
            f"samples is {config.samples} and greedy is {config.greedy}, but greedy decoding gives one text.",
            "leave one of them out.",
        )


def _read_prompts(config: Any) -> list[Prompt]:
    from mavis.rollouts import load_prompts

    if config.prompt is None:
        return load_prompts(config.prompt_file, repeated=True)
    if not str(config.prompt).strip():
        raise ConfigError("prompt is empty.", "give at least one word to continue.")
    return [str(config.prompt)]


def _with_vectors(policy: Any, coefficients: Any) -> AbstractContextManager[Any]:
    """Add alignment vectors to a policy's weights.

    Args:
        policy: the policy, which gets its own weights back at the end of the `with` block.
        coefficients: by the folder of each vector; None adds nothing.
    """
    if coefficients is None:
        return nullcontext()
    if not isinstance(coefficients, Mapping) or not coefficients:
        raise ConfigError(
            f"vectors is {coefficients!r}, expected a coefficient for each folder.",
            "e.g. vectors='{outputs/medical: 0.5}'.",
        )
    from mavis.vectors import Vectors

    by_folder = {str(folder): coefficient for folder, coefficient in coefficients.items()}
    return Vectors({folder: folder for folder in by_folder}).applied(policy, by_folder)


def _run(config: Any) -> None:
    from mavis.critics import Critic

    _check(config)
    prompts = _read_prompts(config)
    critic = Critic.from_pretrained(config.checkpoint)
    weights = plain(config.weights)
    if weights is None:
        weights = [1 / len(critic.objectives)] * len(critic.objectives)
    policy, tokenizer = load_policy(config.policy)
    with _with_vectors(policy, plain(config.vectors)):
        texts = continuations(
            policy,
            tokenizer,
            critic,
            prompts,
            config.decoding,
            weights=weights,
            beta=config.beta,
            target_kl=config.target_kl,
            samples=config.samples,
            greedy=config.greedy,
        )
    if len(texts) == 1:
        print(terminal_text(texts[0]))
        return
    for index, text in enumerate(texts):  # texts can span lines, so each gets a heading
        print(f"--- prompt {index // config.samples + 1}, sample {index % config.samples + 1}\n{terminal_text(text)}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("generate")(_run)()


if __name__ == "__main__":
    main()
