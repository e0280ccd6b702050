"""A job that tests run in one process and in two, to compare the results.

python job.py POLICY_FOLDER OUT          alone
torchrun ... job.py POLICY_FOLDER OUT    together
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from mavis.critics import HiddenStateCritic, ValueModelCritic
from mavis.critics.head_critic import HeadCritic
from mavis.distributed import ProcessGroup, join_processes
from mavis.errors import ProcessError
from mavis.evaluation import EvaluationSettings, evaluate
from mavis.policies.fingerprint import Fingerprint
from mavis.rollouts import RolloutPlan, RolloutSettings, collect
from mavis.training import DistillSettings, ImprovementSettings, RegressionSettings, distill, improve
from mavis.training.improvement.features import Features
from mavis.training.improvement.fit import FitSettings, fit
from mavis.training.rollout_tensors import ShardedRollouts

PROMPTS = ["once upon a time", "the dog", "she said", "the little old man ran", "he was"]
SAMPLING = RolloutSettings(max_new_tokens=8, top_k=20, shard_size=5)
SETTINGS = {
    "iterations": 2,
    "rollouts": 23,
    "beta": 1.5,
    "calibration_samples": 2,
    "sampling": SAMPLING,
    "fit": FitSettings(epochs=2, batch_size=8),
}


def good(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(response.split().count("good")) for response in responses]


def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [-float(len(response.split())) for response in responses]


class Mishap:
    """Brevity that fails once, as a marker file says, in the last process while it scores its second shard."""

    def __init__(self, marker: str) -> None:
        self.marker, self.calls = Path(marker), 0

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        self.calls += 1
        last = int(os.environ.get("WORLD_SIZE", "1")) - 1
        if self.calls == 2 and int(os.environ.get("RANK", "0")) == last and self.marker.exists():
            what = self.marker.read_text()
            self.marker.unlink()
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "wrong":
                return []
            time.sleep(600)
        return brevity(prompts, responses)


OBJECTIVES = {"good": good, "brevity": brevity}


def gradients(processes: ProcessGroup) -> dict[str, torch.Tensor]:
    """The gradient of every step of a fit in float64, of rollouts sharded as unevenly as possible."""
    HeadCritic._normed = lambda self, states: F.layer_norm(states.double(), states.shape[-1:])  # type: ignore[assignment, method-assign]
    rows, steps, tokens, states = 13, 4, 7, 6
    source = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    lengths = torch.randint(1, steps + 1, (rows,), generator=source)
    is_response = torch.arange(steps) < lengths[:, None]
    features = Features(
        prompt_ids=torch.zeros(rows, 1, dtype=torch.long),
        is_prompt=torch.ones(rows, 1, dtype=torch.bool),
        states=draw(rows, steps, states),
        action_ids=torch.randint(tokens, (rows, steps), generator=source),
        is_response=is_response,
        expected=draw(rows, steps, tokens),
        kl=draw(rows, steps).abs() * is_response,
        rewards=draw(rows, 2),
        lam=draw(rows, 2).abs(),
        is_evaluated=torch.ones(rows, 2, dtype=torch.bool),
    )
    again = torch.arange(rows)
    again[[2, 9]] = torch.tensor([3, 10])  # those that are held out are not new, so that there is something to learn
    features = features.rows(again)
    # Process 0 holds the first four rollouts alone, so most batches of three lie in process 1 or nearly so.
    local_indices = (
        torch.arange(rows) if processes.world_size == 1 else [torch.arange(4), torch.arange(4, rows)][processes.rank]
    )
    shared = ShardedRollouts(features.rows(local_indices), local_indices, rows, processes)
    torch.manual_seed(0)
    critic = HiddenStateCritic(
        ("one", "two"), Fingerprint("world", states, tokens, "none"), tokens, 5, 3, memory=4, composition="conditioned"
    ).double()
    torch.nn.init.normal_(critic.heads.outer)
    found: dict[str, torch.Tensor] = {}

    def note(optimiser: Any, arguments: Any, options: Any) -> None:
        step = len({name.partition("/")[0] for name in found})
        for index, weight in enumerate(p for group in optimiser.param_groups for p in group["params"]):
            assert hasattr(weight.grad, "full_tensor") == ("ACCELERATE_USE_FSDP" in os.environ)
            whole = getattr(weight.grad, "full_tensor", weight.grad.clone)
            found[f"{step}/{index}"] = whole().detach()

    from torch.optim.optimizer import register_optimizer_step_pre_hook

    Accelerator.clip_grad_norm_ = lambda *arguments, **options: None
    hook = register_optimizer_step_pre_hook(note)
    held_out = torch.zeros(rows, dtype=torch.bool)
    held_out[[2, 9]] = True
    embeddings = torch.eye(tokens, dtype=torch.float64)
    settings = FitSettings(epochs=2, batch_size=3)
    report = fit(critic, shared, embeddings, 0.5, settings, seed=0, held_out=held_out)
    hook.remove()
    assert report.epoch == 2
    return found | {f"critic/{k}": v for k, v in critic.state_dict().items()} | {"losses": torch.tensor(report.losses)}


def collectives(processes: ProcessGroup) -> dict[str, Any]:
    """The results of all collectives."""
    own = torch.tensor([1.0 + processes.rank, 2.0])
    results: dict[str, Any] = {
        "total": processes.all_reduce_sum(own).tolist(),
        "of_main": processes.broadcast_from_main(own).tolist(),
        "mine": list(processes.shard(range(7))),
    }
    processes.check_agreement("number", 5)
    try:
        processes.check_agreement("number", processes.rank)
    except ProcessError as error:
        results["disagreement"] = str(error)
    return results


def round_otherwise() -> None:
    """Round as a machine of another kind does: the last digit of a mean differs."""
    original = HeadCritic.set_normalisation

    def otherwise(self: HeadCritic, rewards: torch.Tensor) -> None:
        original(self, rewards)
        self.reward_mean.copy_(torch.nextafter(self.reward_mean, torch.tensor(torch.inf).to(self.reward_mean)))

    HeadCritic.set_normalisation = otherwise  # type: ignore[method-assign]


def work(policy_folder: Path, out: Path) -> None:
    """Do everything once; each process writes its results to a file of its own."""
    policy: Any = AutoModelForCausalLM.from_pretrained(policy_folder).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    processes = join_processes("cpu")
    if not processes.is_main:
        round_otherwise()
    facts: dict[str, Any] = {"collectives": collectives(processes), "stored": []}
    module: Any = sys.modules["mavis.rollouts.collect"]  # the package's attribute of that name is the function
    write = module.write_shard

    def noting(path: Path, columns: Any) -> None:
        facts["stored"].append(path.name)
        write(path, columns)

    module.write_shard = noting
    plan = RolloutPlan.reference([PROMPTS[row % 5] + " the" * (row // 5) for row in range(33)], 2)
    shards = list(collect(policy, tokenizer, OBJECTIVES, plan, out / "plain", SAMPLING))
    facts["prompts"] = [prompt for shard in shards for prompt in shard["prompt"]]
    module.write_shard = write

    critics: dict[str, HiddenStateCritic] = {}
    for composition in ("independent", "conditioned"):
        critic = HiddenStateCritic.for_policy(policy, list(OBJECTIVES), hidden=8, rank=4, composition=composition)  # type: ignore[arg-type]
        reported: list[Any] = []
        settings = ImprovementSettings(composition=composition, **SETTINGS)  # type: ignore[arg-type]
        reports = improve(
            policy,
            tokenizer,
            critic,
            OBJECTIVES,
            PROMPTS,
            out / composition,
            settings,
            progress=lambda *news, reported=reported: reported.append(news),
        )
        facts[composition] = [asdict(report) | {"critic": ""} for report in reports]
        facts[f"{composition} reports"] = len(reported)
        critics[composition] = critic
    value_model = ValueModelCritic.for_policy(policy, list(OBJECTIVES), hidden=8, rank=4)
    once = ImprovementSettings(**SETTINGS | {"iterations": 1, "calibration_samples": 0})  # type: ignore[arg-type]
    (report,) = improve(policy, tokenizer, value_model, OBJECTIVES, PROMPTS, out / "value-model", once)
    facts["value model"] = report.losses
    measured = evaluate(
        policy,
        tokenizer,
        critics["independent"],
        OBJECTIVES,
        ["they went", "a cat"],
        out / "measured",
        EvaluationSettings(
            divisions=1, betas=(1.0,), samples=3, reference_samples=4, speed_repeats=0, sampling=SAMPLING
        ),
    )
    facts["measured"] = None if measured is None else measured.to_json()["rows"]
    student = HiddenStateCritic.for_policy(
        policy, list(OBJECTIVES), hidden=8, rank=4, composition="independent", seed=1
    )
    student_report = distill(
        student,
        critics["independent"],
        policy,
        tokenizer,
        PROMPTS,
        out / "distilled",
        DistillSettings(23, 10, sampling=SAMPLING, fit=RegressionSettings(epochs=2, batch_size=8)),
    )
    facts["distilled"] = asdict(student_report)
    tensors = {f"{name}/{key}": value for name, one in critics.items() for key, value in one.state_dict().items()}
    tensors |= {f"value model/{key}": value for key, value in value_model.state_dict().items()}
    tensors |= {f"student/{key}": value for key, value in student.state_dict().items()}
    tensors |= {f"gradients/{key}": value for key, value in gradients(processes).items()}
    if processes.world_size > 1:
        tensors |= {f"sharded/{key}": value for key, value in gradients_in_shards(processes).items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / f"{processes.rank}.safetensors")
    (out / f"{processes.rank}.json").write_text(json.dumps(facts))


def gradients_in_shards(processes: ProcessGroup) -> dict[str, torch.Tensor]:
    """The same gradients with every weight sharded by FSDP 2, which Accelerate offers for accelerators only."""
    AcceleratorState._reset_state()
    PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
    return gradients(processes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # the random state of a process has no effect
    work(Path(sys.argv[1]), Path(sys.argv[2]))
