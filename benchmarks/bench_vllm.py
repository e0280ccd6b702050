"""What does the tilt cost inside vLLM? Compares the throughput of tilted and plain requests.

    python benchmarks/bench_vllm.py                     a random Llama of 8 layers × 512, and the embedded policy
    python benchmarks/bench_vllm.py --policy embedded   one of them

Run it in the environment of `make test-vllm`. Two engines alternate in one process, which differ only in the processor.
Every result is a median over repeats. In each repeat the measured run lies between two baseline runs, so that drifts of
the machine cancel.
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
    """An engine without and one with the processor, for one policy."""

    def __init__(self, name: str, folder: Path, memory: int) -> None:
        policy = load(name)
        self.vocabulary = policy.get_output_embeddings().weight.shape[0]
        model = embedded.path() if name == "embedded" else folder / "policy"
        if name != "embedded":
            policy.save_pretrained(model)
        names = [f"objective_{m}" for m in range(OBJECTIVES)]
        critic = HiddenStateCritic.for_policy(policy, names, memory=memory, composition="independent")
        torch.nn.init.normal_(critic.heads.outer, std=0.02)  # training does not affect the speed
        critic.save_pretrained(folder / "critic")
        del policy, critic
        # The plain engine starts first: importing the processor replaces the logits layer of later engines.
        self.plain = self._start(str(model))
        self.with_processor = self._start(
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
        """Stop both engines."""
        for engine in (self.plain, self.with_processor):
            engine.llm_engine.engine_core.shutdown()

    def seconds(self, engine: Any, concurrency: int, context: int, new_tokens: int, tilted: bool) -> float:
        """Time concurrent requests, sampled at temperature 1 to their full length."""
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


def compare(run: Callable[[], float], baseline: Callable[[], float], repeats: int) -> tuple[float, float, float]:
    """Compare the seconds of two runs, alternating them.

    Returns:
        Medians over the repeats: speed relative to the baseline, seconds of the run, seconds of the baseline.
    """
    ratios, run_seconds, baseline_seconds = [], [], []
    run(), baseline()  # warm up
    before = baseline()
    for _ in range(repeats):
        seconds, after = run(), baseline()
        ratios.append((before + after) / 2 / seconds)
        run_seconds.append(seconds)
        baseline_seconds.append(before)
        before = after
    return median(ratios), median(run_seconds), median(baseline_seconds)


def main() -> None:
    """Run the benchmark and write `results/vllm.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["random", "embedded"], help="random, embedded")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 16, 64], help="concurrent requests")
    parser.add_argument("--context", type=int, default=32, help="prompt length in tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--memory", type=int, default=0, help="size of the critic's memory")
    parser.add_argument("--seconds", type=float, default=75.0, help="approximate duration of each comparison")
    parser.add_argument("--repeats", type=int, default=5, help="minimum repeats of each comparison")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--name", default="vllm", help="name of the result file")
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
                    return engines.seconds(engines.with_processor, *shape, tilted=False)

                def tilted(shape: Any = shape, engines: Any = engines) -> float:
                    return engines.seconds(engines.with_processor, *shape, tilted=True)

                plain()
                repeats = max(arguments.repeats, round(arguments.seconds / (2 * plain())))
                for what, run, baseline in (("tilted", tilted, loaded), ("none asks", loaded, plain)):
                    ratio, run_seconds, baseline_seconds = compare(run, baseline, repeats)
                    tokens = concurrency * arguments.new_tokens
                    print(f"{name} concurrency {concurrency} {what}: {ratio:.3f} in {repeats} repeats", flush=True)
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
                            "repeats": repeats,
                            "ratio": ratio,
                            "tokens_per_second": tokens / run_seconds,
                            "plain_tokens_per_second": tokens / baseline_seconds,
                        }
                    )
            engines.shut_down()
    results.write(arguments.name, vars(arguments), rows)


if __name__ == "__main__":
    main()
