"""What does the tilt cost? Tilted against plain `generate`, step by step in turn.

    python benchmarks/bench_decode.py                         the random Llama of 8 layers × 512 and the embedded policy
    python benchmarks/bench_decode.py --policy path/or/hub-id one policy

Every way is paired with a plain run of its own; both take a step each in turn, so that drifts of the machine cancel,
and the ratio of their times is a median over rounds. A control pairs plain decoding with itself. First tokens and
assisted decoding are timed as whole runs. Beside the critics stands the step of the official scripts. A repeated call
goes on where it stopped.
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
from lib.in_turn import seconds_in_turn, twin
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
    """One way of decoding."""

    critic: str
    readout: str | None = None
    objectives: int = 2
    top_k: int = 40
    composition: Composition = "independent"

    def __str__(self) -> str:
        name = " ".join(filter(None, (self.critic, self.readout, self.composition)))
        return f"{name} M {self.objectives} k {self.top_k}"


# For every critic the case of the table, then steps along each axis.
AXES = [(2, 40), (1, 40), (8, 40), (2, 10), (2, 200)]
HIDDEN = [Case("hidden_state", None, m, k) for m, k in AXES]
TOKEN = [Case("value_model", "token", m, k) for m, k in AXES]
CANDIDATES = [Case("value_model", "candidates", m, 40) for m in (2, 1, 8)]
# One objective is what their distilled model costs, which has a trunk for all objectives as ours.
OFFICIALS = [Case(OFFICIAL, None, m, 40) for m in (2, 1)]
FIRST = [HIDDEN[0], TOKEN[0], CANDIDATES[0]]
# One head more, and all of them read λ.
CONDITIONED = [replace(case, composition="conditioned") for case in FIRST[:2]]


class Ways:
    """All ways of decoding with one policy; what a way costs does not depend on what its critic has learnt."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.critics: dict[Case, Any] = {}
        self.vocabulary = policy.get_output_embeddings().weight.shape[0]
        # Half the layers and half the width of the policy, as the random Llama's value model of 4 layers × 256.
        size = policy.config
        self.backbone = llama(self.vocabulary, max(1, size.num_hidden_layers // 2), max(64, size.hidden_size // 2))

    def detach_all(self) -> None:
        """An idle critic's hooks are no part of another's cost, nor of plain decoding's."""
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
        """Build the critic of a case, or find it."""
        key = replace(case, top_k=0)
        if key not in self.critics:
            self.critics[key] = self.build(case)
        return self.critics[key]

    def processor(self, case: Case) -> Any:
        """Set up a case's processor."""
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
        """Time each case, None for plain, in turn with plain decoding: (plain, its own) of all rounds but a first."""
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

        ways: dict[Case | None, tuple[Any, Callable[[], Any]]] = {}
        critics = []
        for case in cases:
            policy = twin(self.policy)
            if case is None:
                ways[case] = policy, list
            elif case.critic == OFFICIAL:
                ways[case] = policy, partial(self.processor, case)
            else:
                critics.append(self.build(case))
                critics[-1].attach(policy)
                ways[case] = policy, partial(tilt, case, critics[-1])
        found: dict[Case | None, list[tuple[float, float]]] = {case: [] for case in cases}
        for turn in range(repeats + 1):
            for case, (policy, processor) in ways.items():
                runs = {"plain": partial(run, self.policy, []), "own": partial(run, policy, processor())}
                seconds = seconds_in_turn(runs, turn)
                found[case].append((seconds["plain"], seconds["own"]))
        for critic in critics:
            critic.detach()
        return {case: rounds[1:] for case, rounds in found.items()}


def tilt(case: Case, critic: Any) -> MavisTilt:
    """Make a case's processor for a generation."""
    return MavisTilt([1.0] * case.objectives, critic, beta=1.0, top_k=case.top_k)


class _Official:
    """The official scripts' value models, one for each objective."""

    def __init__(self, config: LlamaConfig, objectives: int) -> None:
        self.trunks = [AutoModel.from_config(config, dtype=torch.float32).eval() for _ in range(objectives)]
        self.scores = [torch.nn.Linear(config.hidden_size, 1, bias=False) for _ in range(objectives)]

    def step(self, top_k: int) -> LogitsProcessorList:
        return LogitsProcessorList([OfficialStep(self.trunks, self.scores, top_k=top_k, beta=1.0)])

    def detach(self) -> None:
        """It hooks nothing."""


def prompts(ways: Ways, batch: int, context: int) -> dict[str, torch.Tensor]:
    """Draw random prompts of one length."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, ways.vocabulary, (batch, context), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def row(what: str, policy: str, case: Case | None, batch: int, context: int, **figures: Any) -> dict[str, Any]:
    """Lay out one result."""
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
        **figures,
    }


def speed_rows(
    name: str, ways: Ways, cases: Sequence[Case | None], batch: int, context: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time cases at one batch size and context; None is the control."""
    seconds = ways.seconds(cases, prompts(ways, batch, context), arguments.new_tokens, arguments.repeats)
    tokens, rows = batch * arguments.new_tokens, []
    for case, rounds in seconds.items():
        ratios = [plain / own for plain, own in rounds]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        told = f"{median(ratios):.3f} ({low:.3f} to {high:.3f})"
        print(f"{name} batch {batch} context {context} {case or 'plain'}: {told}", flush=True)
        figures = {
            "ratio": median(ratios),
            "ratio_quartiles": [low, high],
            "tokens_per_second": tokens / median(own for _, own in rounds),
            "plain_tokens_per_second": tokens / median(plain for plain, _ in rounds),
        }
        rows.append(row("speed" if case else "control", name, case, batch, context, **figures))
    return rows


def first_token_rows(name: str, ways: Ways, context: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time until the first token, which reads the prompt, and the memory that a whole generation takes at its peak.

    The official step, which reads a long prompt once for each candidate, runs once only.
    """
    inputs, rows = prompts(ways, 1, context), []
    cases: list[Case | None] = [None, *FIRST, Case(OFFICIAL)]
    seconds: dict[Case | None, list[float]] = {case: [] for case in cases}

    def ready(case: Case | None, new_tokens: int) -> Callable[[], Any]:
        ways.detach_all()
        processor = ways.processor(case) if case else []
        length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        return lambda: ways.policy.generate(**inputs, do_sample=False, **length, logits_processor=processor)

    for turn in range(arguments.repeats + 1):
        for case in cases if turn == 1 else cases[:-1]:
            run = ready(case, 1)
            start = time.perf_counter()
            run()
            seconds[case].append(time.perf_counter() - start)
    for case in cases:
        peak = median(peak_mib(ready(case, arguments.new_tokens)) for _ in range(3 if case in cases[:-1] else 1))
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
    ways.detach_all()
    return rows


def ragged_rows(name: str, ways: Ways) -> list[dict[str, Any]]:
    """Compare the values of 16 prompts of different length in one batch with those of each alone."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randint(3, ways.vocabulary, (1, length), generator=generator) for length in range(3, 35, 2)]
    width = max(ids.shape[1] for ids in alone)
    padded = torch.cat([torch.nn.functional.pad(ids, (width - ids.shape[1], 0)) for ids in alone])
    mask = torch.cat([torch.arange(width)[None] >= width - ids.shape[1] for ids in alone])
    candidates = torch.randint(3, ways.vocabulary, (16, 40), generator=generator)
    for case in FIRST:
        ways.detach_all()
        critic = ways.critic(case)
        critic.attach(ways.policy)

        def values(ids: torch.Tensor, mask: torch.Tensor, offered: torch.Tensor, critic: Any = critic) -> torch.Tensor:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
            with torch.no_grad():
                ways.policy(input_ids=ids, attention_mask=mask.long(), position_ids=positions)
            found: torch.Tensor = critic.values(ids, offered)
            return found

        together = values(padded, mask, candidates)
        one_by_one = [values(ids, torch.ones_like(ids) > 0, candidates[i : i + 1]) for i, ids in enumerate(alone)]
        difference = float((together - torch.cat(one_by_one)).abs().max())
        print(f"{name} ragged {case}: {difference:.1g} of {float(together.std()):.2g}", flush=True)
        rows.append(row("ragged", name, case, 16, width, max_difference=difference, spread=float(together.std())))
    ways.detach_all()
    return rows


def assisted_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare assisted greedy decoding with unassisted, plain and tilted, where a draft mostly agrees.

    The draft is the policy's first layer; the others are scaled down until it agrees.
    """
    policy = load("random")
    policy.generation_config.eos_token_id = None
    for layer in policy.model.layers[1:]:
        layer.self_attn.o_proj.weight.mul_(0.02)
        layer.mlp.down_proj.weight.mul_(0.02)
    config = llama(32_000, layers=1, width=512)
    draft = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    draft.load_state_dict(policy.state_dict(), strict=False)
    ways, rows = Ways(policy), []
    inputs = prompts(ways, 1, arguments.context)
    helps = {"draft model": {"assistant_model": draft}, "prompt lookup": {"prompt_lookup_num_tokens": 5}}
    cases: list[Case | None] = [None, HIDDEN[0], TOKEN[0]]
    for case in cases:
        ratios: dict[str, list[float]] = {name: [] for name in helps}
        for turn in range(2 * arguments.repeats + 1):
            ids, seconds = {}, {}
            for name, help_ in {"": {}, **helps}.items():
                ways.detach_all()
                processor = ways.processor(case) if case else []
                start = time.perf_counter()
                length = {"max_new_tokens": arguments.new_tokens}
                ids[name] = policy.generate(**inputs, do_sample=False, **length, **help_, logits_processor=processor)
                seconds[name] = time.perf_counter() - start
            for name in helps:
                if not torch.equal(ids[name], ids[""]):
                    raise SystemExit(f"{case or 'plain'}: {name} gave other tokens than unassisted decoding")
                if turn:
                    ratios[name].append(seconds[""] / seconds[name])
        for name, found in ratios.items():
            print(f"{case or 'plain'} with a {name}: {median(found):.2f} times as fast", flush=True)
            rows.append(row(name, "random, later layers scaled down", case, 1, arguments.context, ratio=median(found)))
    ways.detach_all()
    return rows


def main() -> None:
    """Run the benchmark and write `results/decode.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["random", "embedded"], help="random, embedded, folder, hub id")
    parser.add_argument("--context", type=int, default=32, help="tokens in every prompt")
    parser.add_argument("--contexts", nargs="*", type=int, default=[128, 512, 2_048], help="more of them, at batch 1")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=6, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--folder", default="outputs/decode", help="of what has been measured")
    parser.add_argument("--name", default="decode", help="of the result file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.folder)
    claim = {name: value for name, value in vars(arguments).items() if name not in ("policy", "folder", "name")}
    claim["speeds"] = "steps in turn"
    if not matches_manifest(folder / "bench.json", claim, "a benchmark with different"):
        write_json(folder / "bench.json", claim)
    rows = []
    for name in arguments.policy:
        for section, measure in sections(name, arguments):
            place = folder / f"{Path(name).name} {section}.json"
            if not place.is_file():
                gc.collect()  # nobody's time, and memory that is free before its peak is measured
                write_json(place, measure())
            rows += json.loads(place.read_text(encoding="utf-8"))
    results.write(arguments.name, vars(arguments), rows)


def sections(name: str, arguments: argparse.Namespace) -> list[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Name what is measured of a policy, each part by itself."""
    ways = Ways(load(name))
    everything = [*HIDDEN, *TOKEN, *CANDIDATES, *CONDITIONED, *OFFICIALS]
    main = [*FIRST, *CONDITIONED, OFFICIALS[0]]
    several = {1: everything, 8: [*main, *TOKEN[1:]]} if name == "random" else {1: main, 8: main}
    longest = getattr(ways.policy.config, "max_position_embeddings", 0) - arguments.new_tokens
    timed = [
        (f"batch {batch}", batch, arguments.context, cases)
        for batch, cases in (several | {32: [*FIRST[:2], *CONDITIONED]}).items()
    ]
    timed += [(f"context {context}", 1, context, FIRST) for context in arguments.contexts if context <= longest]
    made: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = [
        (f"{control}{what}", partial(speed_rows, name, ways, compared, batch, context, arguments))
        for what, batch, context, cases in timed
        for control, compared in (("", cases), ("control of ", [None]))
    ]
    made.append(("ragged", partial(ragged_rows, name, ways)))
    made += [
        (f"first token {context}", partial(first_token_rows, name, ways, context, arguments))
        for context in (arguments.context, *arguments.contexts[-1:])
        if context <= longest
    ]
    return [*made, ("assisted", partial(assisted_rows, arguments))] if name == "random" else made


if __name__ == "__main__":
    main()
