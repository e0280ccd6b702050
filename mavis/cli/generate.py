"""`mavis generate`: continue prompts under preference weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mavis.cli.app import as_trained, hydra_app, load_policy
from mavis.errors import ConfigError
from mavis.policies.devices import states_device


def continuations(
    policy: Any,
    tokenizer: Any,
    critic: Any,
    prompts: list[str],
    decoding: Any,
    *,
    weights: Any,
    beta: float | None,
    target_kl: float | None,
    samples: int = 1,
    greedy: bool = False,
) -> list[str]:
    """Continue each prompt `samples` times.

    Returns:
        Prompt and response together, those of one prompt side by side.
    """
    from mavis.decoding import generate

    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    device = states_device(policy)
    output = generate(
        policy,
        {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")},
        critic=critic,
        weights=weights,
        beta=beta,
        target_kl=target_kl,
        top_k=as_trained(decoding, "top_k", critic),
        temperature=as_trained(decoding, "temperature", critic),
        max_new_tokens=decoding.max_new_tokens,
        num_return_sequences=samples,
        do_sample=not greedy,
    )
    texts: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True)
    return texts


def _with_vectors(policy: Any, coefficients: Any) -> AbstractContextManager[Any]:
    """Add the alignment vectors of folders to a policy's weights, each with its coefficient."""
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
    from omegaconf import OmegaConf

    from mavis.critics import Critic
    from mavis.rollouts import load_prompts

    if (config.prompt is None) == (config.prompt_file is None):
        raise ConfigError(
            f"prompt is {config.prompt!r} and prompt_file is {config.prompt_file!r}; exactly one of them is needed.",
            "use prompt_file=- to read standard input.",
        )
    if config.prompt_file not in (None, "-") and not Path(config.prompt_file).expanduser().is_file():
        raise ConfigError(  # it may only be a file here; the hub is not asked
            f"prompt_file is {config.prompt_file!r}, which does not exist.", "give a file with one prompt a line, or -."
        )
    prompts = [str(config.prompt)] if config.prompt is not None else load_prompts(config.prompt_file, repeated=True)
    if not prompts[0].strip():
        raise ConfigError("prompt is empty.", "give at least one word to go on from.")
    if config.samples < 1:
        raise ConfigError(f"samples is {config.samples}, expected ≥ 1.", "samples=3 continues each prompt three times.")
    if config.greedy and config.samples > 1:
        raise ConfigError(
            f"samples is {config.samples} and greedy is {config.greedy}, but greedy has one answer only.",
            "the likeliest tokens are the same every time; leave one of them out.",
        )
    critic = Critic.from_pretrained(config.checkpoint)
    given: Any = OmegaConf.to_container(config, resolve=True)
    weights = given["weights"]
    if weights is None:
        weights = [1 / len(critic.objectives)] * len(critic.objectives)
    policy, tokenizer = load_policy(config.policy)
    with _with_vectors(policy, given["vectors"]):
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
        print(texts[0])
        return
    for index, text in enumerate(texts):  # stories have lines of their own, so only a heading tells them apart
        print(f"--- prompt {index // config.samples + 1}, sample {index % config.samples + 1}\n{text}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("generate")(_run)()


if __name__ == "__main__":
    main()
