"""Continue one prompt under two choices of weights, and read the KL that each response spends.

python examples/steer.py --prompt "Tom and his mom went to the" --target-kl 4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import mavis


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Continue one prompt under two choices of weights.")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--target-kl", type=float, default=3.0, help="budget in nats per response")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--responses", type=int, default=2, help="for each choice of weights")
    options = parser.parse_args(arguments)

    policy, tokenizer = mavis.embedded.load()
    critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
    inputs = tokenizer(options.prompt, return_tensors="pt")
    for weights in ({"positive": 1.0}, {"dialogue": 1.0}):
        torch.manual_seed(0)
        with critic.attach(policy):
            # The logits processor, rather than mavis.generate, because it records the KL of every step.
            tilt = mavis.MavisTilt(
                weights,
                critic,
                target_kl=options.target_kl,
                max_new_tokens=options.max_new_tokens,
                record_kl=True,
            )
            output = policy.generate(
                **inputs,
                logits_processor=tilt,
                do_sample=True,
                temperature=tilt.temperature,
                top_k=0,  # the tilt chooses the candidates
                max_new_tokens=options.max_new_tokens,
                num_return_sequences=options.responses,
            )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        for text, nats in zip(texts, tilt.kl.sum(dim=1).tolist(), strict=True):
            print(f"{weights}, {nats:.2f} nats:\n  {text}\n")


if __name__ == "__main__":
    main()
