"""What does the tilt cost? Compares the speed of tilted decoding with plain `generate`.

    python benchmarks/bench_decode.py                         a random Llama of 8 layers × 512, and the embedded policy
    python benchmarks/bench_decode.py --policy path/or/hub-id one policy

Each case is paired with a plain run of its own. The two alternate step by step, so that drifts of the machine cancel,
and the ratio of their times is a median over repeats. A control pairs plain decoding with itself. Time to first token
and assisted decoding are measured on whole runs. The decoding step of the official scripts is included for comparison.
An interrupted run resumes when rerun.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from lib import results
from lib.interleaved import copy_sharing_weights, time_interleaved
from lib.official_step import OfficialStep
from lib.peak_memory import peak_mib
from lib.policies import llama, load
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LogitsProcessorList, StoppingCriteria
from transformers.utils import logging

from mavis import HiddenStateCritic, MavisTilt, ValueModelCritic
from mavis.critics.base import Composition
from mavis.utils.files import matches_manifest, write_json

OFFICIAL = "official step"


@dataclass(frozen=True)
class Case:
    """A critic and the settings that it decodes with."""

    critic: str
    readout: str | None = None
    objectives: int = 2
    top_k: int = 40
    composition: Composition = "independent"

    def __str__(self) -> str:
        name = " ".join(filter(None, (self.critic, self.readout, self.composition)))
        return f"{name} M {self.objectives} k {self.top_k}"


# Objectives and candidates: the main setting first, then variations of each.
AXES = [(2, 40), (1, 40), (8, 40), (2, 10), (2, 200)]
HIDDEN = [Case("hidden_state", None, m, k) for m, k in AXES]
TOKEN = [Case("value_model", "token", m, k) for m, k in AXES]
CANDIDATES = [Case("value_model", "candidates", m, 40) for m in (2, 1, 8)]
# With one objective the official step costs as much as their distilled model, which has one trunk like ours.
OFFICIALS = [Case(OFFICIAL, None, m, 40) for m in (2, 1)]
FIRST = [HIDDEN[0], TOKEN[0], CANDIDATES[0]]
# These have one more head, and all heads read λ.
CONDITIONED = [replace(case, composition="conditioned") for case in FIRST[:2]]


class Lab:
    """Builds and times all cases for one policy; the critics are untrained, which does not affect their speed."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.critics: dict[Case, Any] = {}
        self.vocabulary = policy.get_output_embeddings().weight.shape[0]
        # A value model has half the layers and half the width of the policy.
        config = policy.config
        self.backbone = llama(self.vocabulary, max(1, config.num_hidden_layers // 2), max(64, config.hidden_size // 2))

    def detach_all(self) -> None:
        """Detach all critics, so that the hooks of an idle one cost nothing."""
        for critic in self.critics.values():
            critic.detach()

    def build(self, case: Case) -> Any:
        """Build the critic of a case."""
        names = [f"objective_{m}" for m in range(case.objectives)]
        if case.readout is None:
            critic: Any = HiddenStateCritic.for_policy(self.policy, names, composition=case.composition)
        else:
            critic = ValueModelCritic.for_policy(
                self.policy, names, backbone=self.backbone, readout=case.readout, composition=case.composition
            )
        torch.nn.init.normal_(critic.heads.outer, std=0.02)
        return critic

    def critic(self, case: Case) -> Any:
        """Return the critic of a case, built once."""
        key = replace(case, top_k=0)
        if key not in self.critics:
            self.critics[key] = self.build(case)
        return self.critics[key]

    def processor(self, case: Case) -> Any:
        """Attach the critic of a case and build its processor."""
        self.detach_all()
        if case.critic == OFFICIAL:
            key = replace(case, top_k=0)
            if key not in self.critics:
                self.critics[key] = _Official(self.backbone, case.objectives)
            return self.critics[key].step(case.top_k)
        critic = self.critic(case)
        critic.attach(self.policy)
        return tilt(case, critic)

    def seconds(
        self, cases: Sequence[Case | None], inputs: Any, new_tokens: int, repeats: int
    ) -> dict[Case | None, list[tuple[float, float]]]:
        """Time each case, None for plain, interleaved with plain decoding.

        Returns:
            Seconds (plain, case) of every repeat, without a first one as warm-up.
        """
        self.detach_all()

        def run(policy: Any, processor: Any, end_of_step: StoppingCriteria) -> None:
            policy.generate(
                **inputs,
                do_sample=True,
                top_k=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                logits_processor=processor,
                stopping_criteria=[end_of_step],
            )

        setups: dict[Case | None, tuple[Any, Callable[[], Any]]] = {}
        critics = []
        for case in cases:
            policy = copy_sharing_weights(self.policy)
            if case is None:
                setups[case] = policy, list
            elif case.critic == OFFICIAL:
                setups[case] = policy, partial(self.processor, case)
            else:
                critics.append(self.build(case))
                critics[-1].attach(policy)
                setups[case] = policy, partial(tilt, case, critics[-1])
        found: dict[Case | None, list[tuple[float, float]]] = {case: [] for case in cases}
        for repeat in range(repeats + 1):
            for case, (policy, processor) in setups.items():
                runs = {"plain": partial(run, self.policy, []), "case": partial(run, policy, processor())}
                seconds = time_interleaved(runs, repeat)
                found[case].append((seconds["plain"], seconds["case"]))
        for critic in critics:
            critic.detach()
        return {case: measured[1:] for case, measured in found.items()}


def tilt(case: Case, critic: Any) -> MavisTilt:
    """Build the tilt of a case for one generation."""
    return MavisTilt([1.0] * case.objectives, critic, beta=1.0, top_k=case.top_k)


class _Official:
    """The value models of the official scripts, one per objective."""

    def __init__(self, config: LlamaConfig, objectives: int) -> None:
        self.trunks = [AutoModel.from_config(config, dtype=torch.float32).eval() for _ in range(objectives)]
        self.scores = [torch.nn.Linear(config.hidden_size, 1, bias=False) for _ in range(objectives)]

    def step(self, top_k: int) -> LogitsProcessorList:
        return LogitsProcessorList([OfficialStep(self.trunks, self.scores, top_k=top_k, beta=1.0)])

    def detach(self) -> None:
        """Do nothing: it has no hooks."""


def prompts(lab: Lab, batch: int, context: int) -> dict[str, torch.Tensor]:
    """Draw random prompts of equal length."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, lab.vocabulary, (batch, context), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def row(what: str, policy: str, case: Case | None, batch: int, context: int, **metrics: Any) -> dict[str, Any]:
    """Build one row of the results."""
    return {
        "what": what,
        "policy": policy,
        "critic": case.critic if case else None,
        "readout": case.readout if case else None,
        "composition": case.composition if case and case.critic != OFFICIAL else None,
        "engine": "transformers",
        "batch": batch,
        "top_k": case.top_k if case else None,
        "objectives": case.objectives if case else None,
        "context": context,
        **metrics,
    }


def speed_rows(
    name: str, lab: Lab, cases: Sequence[Case | None], batch: int, context: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time cases at one batch size and context; None is the control."""
    seconds = lab.seconds(cases, prompts(lab, batch, context), arguments.new_tokens, arguments.repeats)
    tokens, rows = batch * arguments.new_tokens, []
    for case, measured in seconds.items():
        ratios = [plain / tilted for plain, tilted in measured]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        summary = f"{median(ratios):.3f} ({low:.3f} to {high:.3f})"
        print(f"{name} batch {batch} context {context} {case or 'plain'}: {summary}", flush=True)
        metrics = {
            "ratio": median(ratios),
            "ratio_quartiles": [low, high],
            "tokens_per_second": tokens / median(tilted for _, tilted in measured),
            "plain_tokens_per_second": tokens / median(plain for plain, _ in measured),
        }
        rows.append(row("speed" if case else "control", name, case, batch, context, **metrics))
    return rows


def first_token_rows(name: str, lab: Lab, context: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the time to the first token, and the peak memory of a whole generation.

    The official step reads a long prompt once per candidate, so it runs only once.
    """
    inputs, rows = prompts(lab, 1, context), []
    cases: list[Case | None] = [None, *FIRST, Case(OFFICIAL)]
    seconds: dict[Case | None, list[float]] = {case: [] for case in cases}

    def prepare(case: Case | None, new_tokens: int) -> Callable[[], Any]:
        lab.detach_all()
        processor = lab.processor(case) if case else []
        length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        return lambda: lab.policy.generate(**inputs, do_sample=False, **length, logits_processor=processor)

    for repeat in range(arguments.repeats + 1):
        for case in cases if repeat == 1 else cases[:-1]:
            run = prepare(case, 1)
            start = time.perf_counter()
            run()
            seconds[case].append(time.perf_counter() - start)
    for case in cases:
        peak = median(peak_mib(prepare(case, arguments.new_tokens)) for _ in range(3 if case in cases[:-1] else 1))
        rows.append(
            row(
                "first token",
                name,
                case,
                1,
                context,
                milliseconds=1e3 * median(seconds[case][-arguments.repeats :]),
                peak_mib=peak,
            )
        )
        print(
            f"{name} context {context} {case or 'plain'}: first token after {rows[-1]['milliseconds']:.1f} ms, "
            f"{peak} MiB at the peak",
            flush=True,
        )
    lab.detach_all()
    return rows


def ragged_rows(name: str, lab: Lab) -> list[dict[str, Any]]:
    """Compare the values of 16 prompts of different lengths in one batch with those of each prompt alone."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randint(3, lab.vocabulary, (1, length), generator=generator) for length in range(3, 35, 2)]
    width = max(ids.shape[1] for ids in alone)
    padded = torch.cat([torch.nn.functional.pad(ids, (width - ids.shape[1], 0)) for ids in alone])
    mask = torch.cat([torch.arange(width)[None] >= width - ids.shape[1] for ids in alone])
    candidates = torch.randint(3, lab.vocabulary, (16, 40), generator=generator)
    for case in FIRST:
        lab.detach_all()
        critic = lab.critic(case)
        critic.attach(lab.policy)

        def values(
            ids: torch.Tensor, mask: torch.Tensor, candidates: torch.Tensor, critic: Any = critic
        ) -> torch.Tensor:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
            with torch.no_grad():
                lab.policy(input_ids=ids, attention_mask=mask.long(), position_ids=positions)
            found: torch.Tensor = critic.values(ids, candidates)
            return found

        batched = values(padded, mask, candidates)
        one_by_one = [values(ids, torch.ones_like(ids) > 0, candidates[i : i + 1]) for i, ids in enumerate(alone)]
        difference = float((batched - torch.cat(one_by_one)).abs().max())
        print(f"{name} ragged {case}: {difference:.1g} of {float(batched.std()):.2g}", flush=True)
        rows.append(row("ragged", name, case, 16, width, max_difference=difference, spread=float(batched.std())))
    lab.detach_all()
    return rows


def assisted_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare assisted with unassisted greedy decoding, plain and tilted, for a draft model that mostly agrees.

    The draft is the policy's first layer; the other layers are scaled down until the two agree.
    """
    policy = load("random")
    policy.generation_config.eos_token_id = None
    for layer in policy.model.layers[1:]:
        layer.self_attn.o_proj.weight.mul_(0.02)
        layer.mlp.down_proj.weight.mul_(0.02)
    config = llama(32_000, layers=1, width=512)
    draft = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    draft.load_state_dict(policy.state_dict(), strict=False)
    lab, rows = Lab(policy), []
    inputs = prompts(lab, 1, arguments.context)
    methods = {"draft model": {"assistant_model": draft}, "prompt lookup": {"prompt_lookup_num_tokens": 5}}
    cases: list[Case | None] = [None, HIDDEN[0], TOKEN[0]]
    for case in cases:
        ratios: dict[str, list[float]] = {name: [] for name in methods}
        for repeat in range(2 * arguments.repeats + 1):
            ids, seconds = {}, {}
            for name, options in {"": {}, **methods}.items():
                lab.detach_all()
                processor = lab.processor(case) if case else []
                start = time.perf_counter()
                length = {"max_new_tokens": arguments.new_tokens}
                ids[name] = policy.generate(**inputs, do_sample=False, **length, **options, logits_processor=processor)
                seconds[name] = time.perf_counter() - start
            for name in methods:
                if not torch.equal(ids[name], ids[""]):
                    raise SystemExit(f"{case or 'plain'}: {name} gave different tokens from unassisted decoding")
                if repeat:
                    ratios[name].append(seconds[""] / seconds[name])
        for name, found in ratios.items():
            print(f"{case or 'plain'} with a {name}: {median(found):.2f} times as fast", flush=True)
            rows.append(row(name, "random, later layers scaled down", case, 1, arguments.context, ratio=median(found)))
    lab.detach_all()
    return rows


def main() -> None:
    """Run the benchmark and write `results/decode.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policy", nargs="+", default=["random", "embedded"], help="random, embedded, smollm2, a folder or a hub id"
    )
    parser.add_argument("--context", type=int, default=32, help="prompt length in tokens")
    parser.add_argument("--contexts", nargs="*", type=int, default=[128, 512, 2_048], help="longer prompts, at batch 1")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=6, help="timed repeats")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--folder", default="outputs/decode", help="of intermediate results")
    parser.add_argument("--name", default="decode", help="name of the result file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.folder)
    manifest = {name: value for name, value in vars(arguments).items() if name not in ("policy", "folder", "name")}
    manifest["timing"] = "interleaved steps"
    if not matches_manifest(folder / "bench.json", manifest, "a benchmark with different"):
        write_json(folder / "bench.json", manifest)
    rows = []
    for name in arguments.policy:
        for section, measure in sections(name, arguments):
            path = folder / f"{Path(name).name} {section}.json"
            if not path.is_file():
                gc.collect()  # outside the timing, and before peak memory is measured
                write_json(path, measure())
            rows += json.loads(path.read_text(encoding="utf-8"))
    results.write(arguments.name, vars(arguments), rows)


def sections(name: str, arguments: argparse.Namespace) -> list[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Return the measurements of a policy, each with a name under which its rows are kept."""
    lab = Lab(load(name))
    everything = [*HIDDEN, *TOKEN, *CANDIDATES, *CONDITIONED, *OFFICIALS]
    main = [*FIRST, *CONDITIONED, OFFICIALS[0]]
    several = {1: everything, 8: [*main, *TOKEN[1:]]} if name == "random" else {1: main, 8: main}
    longest = getattr(lab.policy.config, "max_position_embeddings", 0) - arguments.new_tokens
    timed = [
        (f"batch {batch}", batch, arguments.context, cases)
        for batch, cases in (several | {32: [*FIRST[:2], *CONDITIONED]}).items()
    ]
    timed += [(f"context {context}", 1, context, FIRST) for context in arguments.contexts if context <= longest]
    measurements: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = [
        (f"{control}{what}", partial(speed_rows, name, lab, compared, batch, context, arguments))
        for what, batch, context, cases in timed
        for control, compared in (("", cases), ("control of ", [None]))
    ]
    measurements.append(("ragged", partial(ragged_rows, name, lab)))
    measurements += [
        (f"first token {context}", partial(first_token_rows, name, lab, context, arguments))
        for context in (arguments.context, *arguments.contexts[-1:])
        if context <= longest
    ]
    return [*measurements, ("assisted", partial(assisted_rows, arguments))] if name == "random" else measurements


if __name__ == "__main__":
    main()
