"""What does the tilt cost inside vLLM? Throughput of tilted requests against plain ones, measured by turns.

    python benchmarks/bench_vllm.py                     the random Llama of 8 layers × 512 and the embedded policy
    python benchmarks/bench_vllm.py --policy embedded   one of them

Run it in the environment of `make test-vllm`. Two engines take turns in one process, one without the processor and one
with it; nothing but the tilt differs. Every figure is a median over rounds, in each of which what is measured runs
between two runs of what it is compared with, so that drifts of the machine cancel.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from lib import results
from lib.policies import load

from mavis import HiddenStateCritic, embedded

OBJECTIVES, TOP_K = 2, 40


class Engines:
    """A plain engine and one with the processor, for one policy."""

    def __init__(self, name: str, folder: Path, memory: int) -> None:
        policy = load(name)
        self.vocabulary = policy.get_output_embeddings().weight.shape[0]
        model = embedded.path() if name == "embedded" else folder / "policy"
        if name != "embedded":
            policy.save_pretrained(model)
        names = [f"objective_{m}" for m in range(OBJECTIVES)]
        critic = HiddenStateCritic.for_policy(policy, names, memory=memory, composition="independent")
        torch.nn.init.normal_(critic.heads.outer, std=0.02)  # what a tilt costs does not depend on what was learnt
        critic.save_pretrained(folder / "critic")
        del policy, critic
        # The plain one comes first: once the processor's module is imported, every logits layer built is its own.
        self.plain = self._start(str(model))
        self.steered = self._start(
            str(model),
            logits_processors=["mavis.vllm.logits_processor:MavisLogitsProcessor"],
            additional_config={"mavis_critic": str(folder / "critic")},
        )

    def _start(self, model: str, **options: Any) -> Any:
        from vllm import LLM

        return LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_seqs=64,
            enable_prefix_caching=False,
            **options,
        )

    def shut_down(self) -> None:
        """End both."""
        for engine in (self.plain, self.steered):
            engine.llm_engine.engine_core.shutdown()

    def seconds(self, engine: Any, concurrency: int, context: int, new_tokens: int, tilted: bool) -> float:
        """Time so many requests at once, drawn at temperature 1 to their full length."""
        from vllm import SamplingParams, TokensPrompt

        generator = torch.Generator().manual_seed(concurrency)
        ids = torch.randint(3, self.vocabulary, (concurrency, context), generator=generator).tolist()
        extra = {"mavis_weights": [1.0] * OBJECTIVES, "mavis_beta": 1.0, "mavis_top_k": TOP_K} if tilted else None
        params = SamplingParams(
            temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, extra_args=extra
        )
        start = time.perf_counter()
        outputs = engine.generate([TokensPrompt(prompt_token_ids=one) for one in ids], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
        return seconds


def by_turns(one: Callable[[], float], other: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Compare one way with another.

    Returns:
        Medians over the rounds: speed of the one as a share of the other's, seconds of the one, seconds of the other.
    """
    ratios, own, others = [], [], []
    one(), other()  # caches fill and libraries load
    before = other()
    for _ in range(rounds):
        now, after = one(), other()
        ratios.append((before + after) / 2 / now)
        own.append(now)
        others.append(before)
        before = after
    return median(ratios), median(own), median(others)


def main() -> None:
    """Run the benchmark and write `results/vllm.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["random", "embedded"], help="random, embedded")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 16, 64], help="requests at once")
    parser.add_argument("--context", type=int, default=32, help="tokens in every prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--memory", type=int, default=0, help="size of the critic's memory")
    parser.add_argument("--seconds", type=float, default=75.0, help="about how long each comparison may take")
    parser.add_argument("--rounds", type=int, default=5, help="the least rounds of each comparison")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--name", default="vllm", help="of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.policy:
        with TemporaryDirectory() as folder:
            engines = Engines(name, Path(folder), arguments.memory)
            for concurrency in arguments.concurrency:
                shape = concurrency, arguments.context, arguments.new_tokens

                def plain(shape: Any = shape, engines: Any = engines) -> float:
                    return engines.seconds(engines.plain, *shape, tilted=False)

                def loaded(shape: Any = shape, engines: Any = engines) -> float:
                    return engines.seconds(engines.steered, *shape, tilted=False)

                def tilted(shape: Any = shape, engines: Any = engines) -> float:
                    return engines.seconds(engines.steered, *shape, tilted=True)

                plain()
                rounds = max(arguments.rounds, round(arguments.seconds / (2 * plain())))
                for what, one, other in (("tilted", tilted, loaded), ("none asks", loaded, plain)):
                    ratio, own, others = by_turns(one, other, rounds)
                    tokens = concurrency * arguments.new_tokens
                    print(f"{name} concurrency {concurrency} {what}: {ratio:.3f} in {rounds} rounds", flush=True)
                    rows.append(
                        {
                            "what": what,
                            "policy": name,
                            "critic": "hidden_state",
                            "readout": None,
                            "engine": "vllm",
                            "concurrency": concurrency,
                            "batch": concurrency,
                            "top_k": TOP_K,
                            "objectives": OBJECTIVES,
                            "context": arguments.context,
                            "rounds": rounds,
                            "ratio": ratio,
                            "tokens_per_second": tokens / own,
                            "plain_tokens_per_second": tokens / others,
                        }
                    )
            engines.shut_down()
    results.write(arguments.name, vars(arguments), rows)


if __name__ == "__main__":
    main()
