"""What does the tilt cost? Tilted against plain `generate`, measured by turns.

    python benchmarks/bench_decode.py                         the random Llama of 8 layers × 512 and the embedded policy
    python benchmarks/bench_decode.py --policy path/or/hub-id one policy

Every figure is a median over rounds. In each round every way decodes once between two plain runs, and is compared with
their mean, so that drifts of the machine cancel.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import results
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from mavis import HiddenStateCritic, MavisTilt, embedded
from mavis.evaluation.speed import compare_speed

# (objectives, top_k): the case of the table, then one step along each axis.
CASES = [(2, 40), (1, 40), (8, 40), (2, 10), (2, 200)]


def random_llama() -> Any:
    """Build a random Llama of 8 layers × 512 with 32,000 tokens, fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1_376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4_096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def load(name: str) -> Any:
    """Load a policy by the name that the command line takes."""
    if name == "random":
        return random_llama()
    if name == "embedded":
        return embedded.load()[0]
    return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True).eval().requires_grad_(False)


def random_critic(policy: Any, objectives: int) -> HiddenStateCritic:
    """Build a critic that tilts at random; what it costs does not depend on what it has learnt."""
    critic = HiddenStateCritic.for_policy(policy, [f"objective_{m}" for m in range(objectives)])
    torch.nn.init.normal_(critic.heads.outer, std=0.02)
    return critic


def measure(name: str, policy: Any, batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all cases at one batch size."""
    vocabulary = policy.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, vocabulary, (batch, arguments.context), generator=generator)
    device = policy.get_output_embeddings().weight.device
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    critics = {m: random_critic(policy, m) for m in {m for m, _ in CASES}}

    def detach_all() -> None:
        for critic in critics.values():
            critic.detach()

    ways: dict[str, Callable[[], MavisTilt | None]] = {"plain": detach_all}
    for objectives, top_k in CASES:
        critic = critics[objectives]

        def make(critic: HiddenStateCritic = critic, top_k: int = top_k) -> MavisTilt:
            detach_all()  # an idle critic's hooks are no part of another's cost, nor of plain decoding's
            critic.attach(policy)
            return MavisTilt([1.0] * len(critic.objectives), critic, beta=1.0, top_k=top_k)

        ways[f"{objectives}/{top_k}"] = make
    # Runs of small batches are short, so single ratios scatter more and cost less.
    rounds = arguments.repeats * max(1, round(math.sqrt(32 / batch)))
    speeds = compare_speed(policy, inputs, ways, new_tokens=arguments.new_tokens, repeats=rounds)
    detach_all()
    return [
        {
            "policy": name,
            "critic": "hidden_state",
            "readout": None,
            "engine": "transformers",
            "batch": batch,
            "top_k": top_k,
            "objectives": objectives,
            "context": arguments.context,
            "ratio": speeds[f"{objectives}/{top_k}"]["ratio"],
            "tokens_per_second": speeds[f"{objectives}/{top_k}"]["tokens_per_second"],
            "plain_tokens_per_second": speeds["plain"]["tokens_per_second"],
        }
        for objectives, top_k in CASES
    ]


def main() -> None:
    """Run the benchmark and write `results/decode.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["random", "embedded"], help="random, embedded, folder, hub id")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=32, help="tokens in every prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9, help="rounds at batch 32; small batches get more")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--name", default="decode", help="of the result file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.policy:
        policy = load(name)
        for batch in arguments.batch:
            rows += measure(name, policy, batch, arguments)
            for row in rows[-len(CASES) :]:
                print(f"{name} batch {batch} M {row['objectives']} k {row['top_k']}: {row['ratio']:.3f}", flush=True)
    results.write(arguments.name, vars(arguments), rows)


if __name__ == "__main__":
    main()
