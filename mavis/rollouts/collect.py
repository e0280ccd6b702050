"""Sampling rollouts shard by shard on all processes, so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis.critics import Critic, CriticGroup
from mavis.critics.head_critic import HeadCritic
from mavis.distributed import join_processes
from mavis.errors import DataError
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import Fingerprint, embedding_shape, output_embedding
from mavis.policies.generation_config import check_replayable
from mavis.rewards import Objective, score
from mavis.rollouts.replay import ROWS_PER_PASS, Sequences, replay
from mavis.rollouts.sampler import GENERATE_SAMPLER, SampledResponses, Sampler, sampler_identity
from mavis.rollouts.sampling import RolloutSettings, shard_seed
from mavis.rollouts.shards import store_missing
from mavis.utils.files import atomic_folder, matches_manifest, write_json


@dataclass(frozen=True)
class RolloutPlan:
    """What to sample: one row per response.

    Args:
        prompts: N texts.
        weights: (N, M) float64.
        betas: (N,) float64, in 1 / reward.
    """

    prompts: Sequence[str]
    weights: Tensor
    betas: Tensor

    @classmethod
    def reference(cls, prompts: Sequence[str], objectives: int) -> RolloutPlan:
        """RolloutPlan plain responses of the reference policy."""
        rows = len(prompts)
        return cls(
            prompts,
            torch.zeros(rows, objectives, dtype=torch.float64),
            torch.zeros(rows, dtype=torch.float64),
        )

    def shards(self, size: int) -> list[RolloutPlan]:
        """Cut the plan into pieces of at most `size` rows."""
        return [
            RolloutPlan(self.prompts[at : at + size], self.weights[at : at + size], self.betas[at : at + size])
            for at in range(0, len(self.prompts), size)
        ]

    def digest(self) -> str:
        """Hash what is planned."""
        content = json.dumps([list(self.prompts), self.weights.tolist(), self.betas.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def collect(
    policy: Any,
    tokenizer: Any,
    objectives: Mapping[str, Objective],
    plan: RolloutPlan,
    folder: str | os.PathLike[str],
    settings: RolloutSettings,
    *,
    critic: Critic | None = None,
    truncate_reference: bool = False,
    sampler: Sampler = GENERATE_SAMPLER,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Any]:
    """Sample, score and store a plan, yielding each shard as it is on disk.

    Shards that are on disk already are read back and not sampled again; each shard has its own seed, so a run that was
    killed and started again ends with the same rollouts as an unbroken one.

    Several processes share the missing shards out among them, each writes those that it samples, and all yield all
    shards in their order, once the last is there. So the rollouts are the same whatever the number of processes; a
    multiple of it as the number of shards keeps all of them busy. The folder must be on a disk that all of them see.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        objectives: M objectives by name, in the critic's order.
        plan: the rows.
        folder: where the shards go, one Arrow dataset each.
        settings: how to sample.
        critic: tilts rows whose λ is not 0; None samples every row from the reference policy.
        truncate_reference: without a critic, sample from the top-k of the reference policy instead of from all of it,
            so that iteration 0 samples from the same candidates as later ones; the truncation is counted as KL.
        sampler: draws the responses; by default the policy's own `generate`.
        progress: called with how many rows are on disk and how many there will be, as they come.

    Yields:
        `datasets.Dataset` with columns prompt, response, prompt_ids, response_ids, weights, beta, kl and rewards (raw);
        one row per response; kl has one entry per response token.

    Raises:
        ConfigError: if the policy has fewer tokens than `top_k`, or its own configuration bans or forces tokens.
        DataError: if the folder holds rollouts of another plan, or shards that cannot be read.
        ObjectiveError: if an objective returns something other than one finite number per response.
        ProcessError: if the processes are not about to sample the same, or one has stopped.
    """
    target, processes = Path(folder), join_processes(states_device(policy))
    settings.check(policy)
    sampler.check(policy, critic)
    check_replayable(policy)
    claim = {
        "plan": plan.digest(),
        "settings": asdict(settings),
        "objectives": list(objectives),
        "policy": Fingerprint.of(policy).to_json(),
        "critic": critic_digest(critic),
        "truncate_reference": truncate_reference,
        **sampler_identity(sampler),
    }
    processes.check_agreement("plan of rollouts", claim)
    if processes.is_main and not matches_manifest(target / "plan.json", claim, "rollouts with different"):
        write_json(target / "plan.json", claim)
    processes.barrier()
    processes.check_shared_path(target / "plan.json")
    shards = plan.shards(settings.shard_size)
    paths = [target / f"shard-{index:05d}" for index in range(len(shards))]

    def store(index: int) -> None:
        rows = _sample(sampler, policy, tokenizer, shards[index], settings, critic, truncate_reference, index)
        raw = score(objectives, rows["prompt"], rows["response"])
        _write_shard(paths[index], rows | {"rewards": raw.tolist()})

    def tell(done: int) -> None:
        if progress is not None:
            progress(min(done * settings.shard_size, len(plan.prompts)), len(plan.prompts))

    try:
        for index in store_missing(paths, store, processes, tell):
            yield _read_shard(paths[index], len(shards[index].prompts))
    finally:
        sampler.release()


def load_shards(plan: RolloutPlan, folder: str | os.PathLike[str], settings: RolloutSettings) -> list[Any]:
    """Read the shards of a plan that has been collected.

    Args:
        plan: the rows.
        folder: where the shards are.
        settings: how they were sampled.

    Returns:
        The datasets that `collect` yielded.

    Raises:
        DataError: if a shard is missing or cannot be read.
    """
    return [
        _read_shard(Path(folder) / f"shard-{index:05d}", len(shard.prompts))
        for index, shard in enumerate(plan.shards(settings.shard_size))
    ]


def critic_digest(critic: Critic | None) -> str | None:
    """Hash the settings and weights of a critic, so that a folder tells what was sampled or asked under it."""
    if critic is None:
        return None
    digest = hashlib.sha256()
    members: list[Any] = list(critic.critics) if isinstance(critic, CriticGroup) else [critic]
    for one in members:
        digest.update(json.dumps([one.kind, one.objectives, one.settings()], sort_keys=True).encode())
        for name, tensor in sorted(one.state_dict().items()):
            in_bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + in_bytes.numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(
    sampler: Sampler,
    policy: Any,
    tokenizer: Any,
    shard: RolloutPlan,
    settings: RolloutSettings,
    critic: Critic | None,
    truncate_reference: bool,
    index: int,
) -> dict[str, list[Any]]:
    cut = settings.top_k if critic is None and truncate_reference else None
    lam = shard.betas[:, None] * shard.weights if critic is not None else None
    seed = shard_seed(settings.seed, shard.digest(), index)
    drawn = sampler.draw(policy, tokenizer, shard.prompts, settings, seed, top_k=cut, critic=critic, lam=lam)
    steps = drawn.kl if drawn.kl is not None else _kl(policy, drawn, settings, cut, critic, lam)
    kl = [row[: len(response)] for row, response in zip(steps.tolist(), drawn.response_ids, strict=True)]
    return {
        "prompt": list(shard.prompts),
        "response": response_texts(tokenizer, drawn.prompt_ids, drawn.response_ids),
        "prompt_ids": drawn.prompt_ids,
        "response_ids": drawn.response_ids,
        "weights": shard.weights.tolist(),
        "beta": shard.betas.tolist(),
        "kl": kl,
    }


def _kl(
    policy: Any,
    drawn: SampledResponses,
    settings: RolloutSettings,
    cut: int | None,
    critic: Critic | None,
    lam: Tensor | None,
) -> Tensor:
    """Read responses again for the KL (B, T) of their steps; that of plain rows is 0."""
    sequences = Sequences.pack(drawn.prompt_ids, drawn.response_ids)
    if critic is None and cut is None:
        return torch.zeros(sequences.is_response.shape)
    assert critic is None or isinstance(critic, HeadCritic)  # no other is drawn from without the KL
    nothing = torch.zeros(embedding_shape(output_embedding(policy))[1], 1)
    parts = [
        replay(
            policy,
            sequences.rows(rows),
            nothing,
            critic=critic,
            lam=lam[rows].float() if lam is not None else None,
            top_k=settings.top_k,
            temperature=settings.temperature,
        ).kl.cpu()
        for rows in (slice(at, at + ROWS_PER_PASS) for at in range(0, len(sequences.ids), ROWS_PER_PASS))
    ]
    kl = torch.cat(parts)
    return kl if lam is None else kl.masked_fill(~lam.any(1, keepdim=True), 0.0)


def response_texts(tokenizer: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
    """Decode responses in their places: alone, some decoders would drop a leading space.

    Args:
        tokenizer: of the policy.
        prompts: B lists of token ids.
        responses: B lists of token ids, each to the prompt at the same index.

    Returns:
        B texts, without special tokens.
    """
    before = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    whole = tokenizer.batch_decode(
        [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)], skip_special_tokens=True
    )
    alone = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [
        text[len(start) :] if text.startswith(start) else other
        for start, text, other in zip(before, whole, alone, strict=True)
    ]


def _write_shard(path: Path, columns: dict[str, list[Any]]) -> None:
    import datasets

    with atomic_folder(path) as temporary, _quiet(datasets):
        datasets.Dataset.from_dict(columns).save_to_disk(str(temporary))


def _read_shard(path: Path, rows: int) -> Any:
    import datasets

    try:
        shard = datasets.load_from_disk(str(path), keep_in_memory=True)
        if len(shard) != rows:
            raise ValueError(f"it has {len(shard)} rows instead of {rows}.")
    except Exception as error:  # whatever Arrow says about a damaged file, the remedy is the same
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"shard {str(path)!r} cannot be read: {said}", "delete that folder; it is sampled again."
        ) from error
    return shard


class _quiet:
    """Silence the datasets library's own progress bars, which would flash up for every shard."""

    def __init__(self, datasets: Any) -> None:
        self._datasets = datasets

    def __enter__(self) -> None:
        self._enabled = not self._datasets.are_progress_bars_disabled()
        self._datasets.disable_progress_bars()

    def __exit__(self, *error: object) -> None:
        if self._enabled:
            self._datasets.enable_progress_bars()
