"""Samples rollouts shard by shard, on all processes, so that interrupted runs resume when rerun."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis.critics import Critic, CriticGroup
from mavis.critics.head_critic import HeadCritic
from mavis.critics.io.load import RENAMED_TENSORS
from mavis.distributed import join_processes
from mavis.policies.chat import warn_unsuitable
from mavis.policies.devices import states_device
from mavis.policies.encoding import response_texts
from mavis.policies.fingerprint import Fingerprint, embedding_shape, output_embedding
from mavis.policies.generation_config import check_replayable
from mavis.policies.limits import check_prompts_fit
from mavis.rewards import Objective, check_batch_independence, score
from mavis.rewards.identity import keep_identities
from mavis.rollouts.manifest import matches_scored_manifest, settings_manifest, write_scored_manifest
from mavis.rollouts.plan import RolloutPlan
from mavis.rollouts.replay import ROWS_PER_PASS, Sequences, replay
from mavis.rollouts.sampler import GENERATE_SAMPLER, SampledResponses, Sampler, sampler_identity
from mavis.rollouts.sampling import RolloutSettings, shard_seed
from mavis.rollouts.shards import read_shard, store_missing, write_shard
from mavis.utils.locks import locked_folder


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
    """Sample, score and store the rollouts of a plan, yielding each shard once it is on disk.

    Shards already on disk are read, not sampled again. Each shard has its own seed, so interrupted runs resume when
    rerun and end with the rollouts of an uninterrupted one.

    With several processes each samples and writes a share of the missing shards, and all yield every shard in order
    once the last is on disk. The rollouts are the same for any number of processes; a number of shards that is a
    multiple of it keeps all of them busy. The folder must be on a disk that all of them see.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        objectives: M objectives by name, in the critic's order.
        plan: the responses to sample.
        folder: receives the shards, one Arrow dataset each.
        settings: how to sample.
        critic: tilts rows whose λ is not 0; None samples every row from the reference policy.
        truncate_reference: without a critic, sample from the top-k of the reference policy instead of from all of it,
            so that iteration 0 has the candidates of later ones; the truncation counts as KL.
        sampler: draws the responses; by default with the policy's own `generate`.
        progress: called with the numbers of rows on disk and in the plan.

    Yields:
        `datasets.Dataset` with columns prompt, response, prompt_ids, response_ids, weights, beta, kl and rewards (raw);
        one row per response; kl has one entry per response token. Where the sampler records it, also log_ratio.

    Raises:
        ConfigError: if the policy has fewer tokens than `top_k`, its own configuration bans or forces tokens, or the
            longest prompt and response have more positions than it has learnt.
        PolicyError: if the tokenizer writes tokens that the policy has no embedding of.
        DataError: if the folder holds rollouts of another plan, rewards of objectives that have changed since, or
            shards that cannot be read, or another run is writing it.
        ObjectiveError: if an objective fails, returns something other than one finite number per response, or scores
            responses of the first shard differently in another batch.
        ProcessError: if the processes were called with different arguments, or one has stopped.

    Examples:
        >>> import tempfile
        >>> import mavis
        >>> from mavis.rewards import Brevity
        >>> from mavis.rollouts import RolloutPlan, RolloutSettings, collect
        >>> policy, tokenizer = mavis.embedded.load()
        >>> plan = RolloutPlan.reference(["Once upon a time"] * 3, objectives=1)
        >>> settings = RolloutSettings(max_new_tokens=4, shard_size=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = list(collect(policy, tokenizer, {"short": Brevity()}, plan, folder, settings))
        >>> [len(shard) for shard in shards], shards[0]["rewards"][0]
        ([2, 1], [-0.03])
    """
    target, processes = Path(folder), join_processes(states_device(policy))
    settings.check(policy)
    sampler.check(policy, critic)
    check_replayable(policy)
    warn_unsuitable(policy, tokenizer, plan.prompts)
    most = critic.max_positions if critic is not None else None
    check_prompts_fit(policy, tokenizer, plan.prompts, settings.max_new_tokens, most)
    manifest = {
        "plan": plan.digest(),
        "settings": settings_manifest(settings),
        "objectives": list(objectives),
        "policy": Fingerprint.of(policy).to_json(),
        "critic": critic_digest(critic),
        "truncate_reference": truncate_reference,
        **sampler_identity(sampler),
    }
    processes.check_agreement("plan of rollouts", manifest)
    shards = plan.shards(settings.shard_size)
    paths = _shard_paths(target, len(shards))
    is_complete = all(path.exists() for path in (target / "plan.json", *paths))  # runs may read it side by side
    with locked_folder(target, processes.is_main and not is_complete):
        if processes.is_main and not matches_scored_manifest(
            target / "plan.json", manifest, objectives, "rollouts with different"
        ):
            write_scored_manifest(target / "plan.json", manifest, objectives)
        processes.barrier()
        processes.check_shared_path(target / "plan.json")

        def store(index: int) -> None:
            rows = _sample(sampler, policy, tokenizer, shards[index], settings, critic, truncate_reference, index)
            raw = score(objectives, rows["prompt"], rows["response"])
            if index == 0:
                with keep_identities(objectives.values()):  # one by one they are scored, and may share a cache
                    check_batch_independence(objectives, rows["prompt"], rows["response"], raw)
            write_shard(paths[index], rows | {"rewards": raw.tolist()})

        def report_progress(done: int) -> None:
            if progress is not None:
                progress(min(done * settings.shard_size, len(plan.prompts)), len(plan.prompts))

        try:
            for index in store_missing(paths, store, processes, report_progress):
                yield read_shard(paths[index], len(shards[index].prompts))
        finally:
            sampler.release()


def load_shards(plan: RolloutPlan, folder: str | os.PathLike[str], settings: RolloutSettings) -> list[Any]:
    """Read the shards of a plan that has been collected.

    Args:
        plan: the responses that were sampled.
        folder: holds the shards.
        settings: how they were sampled.

    Returns:
        The datasets that `collect` yielded.

    Raises:
        DataError: if a shard is missing or cannot be read.

    Examples:
        >>> import tempfile
        >>> import mavis
        >>> from mavis.rewards import Brevity
        >>> from mavis.rollouts import RolloutPlan, RolloutSettings, collect, load_shards
        >>> policy, tokenizer = mavis.embedded.load()
        >>> plan, settings = RolloutPlan.reference(["Once upon a time"], 1), RolloutSettings(max_new_tokens=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for _ in collect(policy, tokenizer, {"short": Brevity()}, plan, folder, settings):
        ...         pass
        ...     shards = load_shards(plan, folder, settings)
        >>> shards[0]["prompt"][0]
        'Once upon a time'
    """
    shards = plan.shards(settings.shard_size)
    paths = _shard_paths(Path(folder), len(shards))
    return [read_shard(path, len(shard.prompts)) for path, shard in zip(paths, shards, strict=True)]


_FORMAT_1_NAMES = {new: old for old, new in RENAMED_TENSORS.items()}


def critic_digest(critic: Critic | None) -> str | None:
    """Hash the settings and weights of a critic, to identify it in a folder's manifest."""
    if critic is None:
        return None
    digest = hashlib.sha256()
    members: list[Any] = list(critic.critics) if isinstance(critic, CriticGroup) else [critic]
    for member in members:
        digest.update(json.dumps([member.kind, member.objectives, member.settings()], sort_keys=True).encode())
        # Hashed under the names of format 1, so that runs which version 0.1 started can resume.
        tensors = {_FORMAT_1_NAMES.get(name, name): tensor for name, tensor in member.state_dict().items()}
        for name, tensor in sorted(tensors.items()):
            as_bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + as_bytes.numpy().tobytes())
    return digest.hexdigest()[:16]


def _shard_paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"shard-{index:05d}" for index in range(count)]


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
    """Sample one shard; returns its columns without the rewards."""
    reference_top_k = settings.top_k if critic is None and truncate_reference else None
    lam = shard.betas[:, None] * shard.weights if critic is not None else None
    seed = shard_seed(settings.seed, shard.digest(), index)
    drawn = sampler.draw(
        policy, tokenizer, shard.prompts, settings, seed, top_k=reference_top_k, critic=critic, lam=lam
    )
    kl = drawn.kl if drawn.kl is not None else _replayed_kl(policy, drawn, settings, reference_top_k, critic, lam)
    columns: dict[str, list[Any]] = {
        "prompt": list(shard.prompts),
        "response": response_texts(tokenizer, drawn.prompt_ids, drawn.response_ids),
        "prompt_ids": drawn.prompt_ids,
        "response_ids": drawn.response_ids,
        "weights": shard.weights.tolist(),
        "beta": shard.betas.tolist(),
        "kl": [row[: len(response)] for row, response in zip(kl.tolist(), drawn.response_ids, strict=True)],
    }
    return columns if drawn.log_ratio is None else columns | {"log_ratio": drawn.log_ratio.tolist()}


def _replayed_kl(
    policy: Any,
    drawn: SampledResponses,
    settings: RolloutSettings,
    reference_top_k: int | None,
    critic: Critic | None,
    lam: Tensor | None,
) -> Tensor:
    """Compute the per-step KL (B, T) of sampled responses by replaying them; 0 for rows of the reference policy."""
    sequences = Sequences.pack(drawn.prompt_ids, drawn.response_ids)
    if critic is None and reference_top_k is None:
        return torch.zeros(sequences.is_response.shape)
    assert critic is None or isinstance(critic, HeadCritic)  # samplers know the KL of every other critic
    no_embeddings = torch.zeros(embedding_shape(output_embedding(policy))[1], 1)
    parts = [
        replay(
            policy,
            sequences.rows(rows),
            no_embeddings,
            critic=critic,
            lam=lam[rows].float() if lam is not None else None,
            top_k=settings.top_k,
            temperature=settings.temperature,
            min_new_tokens=settings.min_new_tokens,
        ).kl.cpu()
        for rows in (slice(start, start + ROWS_PER_PASS) for start in range(0, len(sequences.ids), ROWS_PER_PASS))
    ]
    kl = torch.cat(parts)
    return kl if lam is None else kl.masked_fill(~lam.any(1, keepdim=True), 0.0)
