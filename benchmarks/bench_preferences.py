"""How fast do choices reveal a user's weights, for selected and for random pairs, and are the intervals calibrated?

    python benchmarks/bench_preferences.py

Simulated users choose between two responses of the embedded policy to the same prompt with P = σ(w · d), where d is the
difference in normalised rewards. Their weights do not follow the prior of the inference: the shares |w_m| / Σ|w| are
uniform on the simplex, each is negative with probability ¼, and the decisiveness Σ|w| is log-uniform from 1 (the better
response is chosen in two thirds of the cases) to 8 (nine tenths). Both strategies ask the same users about the same
pool of pairs.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from itertools import combinations

import torch
from lib import results
from torch import Tensor

from mavis.evaluation.statistics import mean_and_stderr
from mavis.math.bradley_terry import information_gain, posterior_draws
from mavis.policies import embedded
from mavis.rewards import Brevity, Dialogue, Objective, Positive, Readability
from mavis.rollouts import RolloutPlan, RolloutSettings, collect

OBJECTIVES: dict[str, Objective] = {
    "positive": Positive(),
    "dialogue": Dialogue(),
    "brevity": Brevity(),
    "readability": Readability(),
}
PROMPTS = ["Once upon a time", "One day, a little girl", "Tom and Jane were", "The old man looked at", "Lily wanted to"]


def reward_pool(responses: int) -> Tensor:
    """Sample plain responses and return the normalised reward differences (P, 4) of all pairs to the same prompt."""
    policy, tokenizer = embedded.load()
    plan = RolloutPlan.reference([prompt for prompt in PROMPTS for _ in range(responses)], len(OBJECTIVES))
    settings = RolloutSettings(max_new_tokens=64, top_k=None, temperature=0.8)
    with tempfile.TemporaryDirectory() as folder:
        shards = list(collect(policy, tokenizer, OBJECTIVES, plan, folder, settings))
    raw = torch.cat([torch.tensor(shard["rewards"], dtype=torch.float64) for shard in shards])
    groups = (raw / raw.std(dim=0)).split(responses)
    return torch.stack([rows[i] - rows[j] for rows in groups for i, j in combinations(range(responses), 2)])


def draw_users(users: int, objectives: int, generator: torch.Generator) -> Tensor:
    """Draw the weights (U, M) of users; see the module docstring."""
    shares = torch.empty(users, objectives, dtype=torch.float64).exponential_(generator=generator)
    signs = torch.where(torch.rand(users, objectives, generator=generator) < 0.25, -1.0, 1.0)
    decisiveness = torch.exp(math.log(8) * torch.rand(users, 1, generator=generator, dtype=torch.float64))
    return decisiveness * signs * shares / shares.sum(1, keepdim=True)


def interview(weights: Tensor, pool: Tensor, uniform: Tensor, how: str) -> Tensor:
    """Ask one user about pairs of the pool, and infer the weights after each answer.

    This does what `next_pair` and `infer_weights` do, but shares the posterior draws between the two.

    Args:
        weights: (M,), the user's.
        pool: (P, M), reward differences.
        uniform: (N,) in [0, 1), the random number behind each answer.
        how: "random" takes the first N pairs of the pool, "chosen" those with the highest expected information gain.

    Returns:
        (N, 3, M), inferred weights and the bounds of their 95 % intervals after each answer.
    """
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    answered = torch.zeros(0, len(weights), dtype=torch.float64)
    draws = posterior_draws(answered)
    left = torch.ones(len(pool), dtype=torch.bool)
    found = []
    for turn, chance in enumerate(uniform.tolist()):
        index = turn
        if how == "chosen":
            gains = information_gain(pool, draws).where(left, torch.tensor(-math.inf))
            index = int(gains.argmax())
        left[index] = False
        likes_first = chance < torch.sigmoid(weights @ pool[index])
        answered = torch.cat([answered, (pool[index] if likes_first else -pool[index])[None]])
        draws = posterior_draws(answered)
        found.append(torch.cat([draws.mean(0, keepdim=True), torch.quantile(draws, tails, dim=0)]))
    return torch.stack(found)


def angle(inferred: Tensor, weights: Tensor) -> float:
    """Return the angle between two vectors in degrees, from 0 to 180."""
    return math.degrees(math.acos(float(torch.cosine_similarity(inferred, weights, dim=0).clamp(-1, 1))))


def main() -> None:
    """Run the study and write `results/preferences.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument(
        "--objectives", nargs="+", type=int, default=[2, 3, 4], help="numbers of objectives, from 1 to 4"
    )
    parser.add_argument("--pairs", type=int, default=10, help="pairs per user")
    parser.add_argument("--candidates", type=int, default=64, help="size of each user's pool of pairs")
    parser.add_argument("--responses", type=int, default=64, help="responses per prompt")
    parser.add_argument("--name", default="preferences", help="name of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    all_pairs = reward_pool(arguments.responses)
    rows = []
    for objectives in arguments.objectives:
        generator = torch.Generator().manual_seed(arguments.seed)
        differences = all_pairs[:, :objectives]
        differences = differences[differences.any(dim=1)]
        users = draw_users(arguments.users, objectives, generator)
        pools = [
            differences[torch.randperm(len(differences), generator=generator)[: arguments.candidates]] for _ in users
        ]
        uniform = torch.rand(arguments.users, arguments.pairs, generator=generator)
        for how in ("random", "chosen"):
            interviews = torch.stack([interview(*user, how) for user in zip(users, pools, uniform, strict=True)])
            for turn in range(arguments.pairs):
                inferred, low, high = interviews[:, turn].unbind(1)
                angles = mean_and_stderr([angle(*pair) for pair in zip(inferred, users, strict=True)])
                distances = mean_and_stderr((inferred - users).norm(dim=1))
                covered = mean_and_stderr(((low <= users) & (users <= high)).double().mean(dim=1))
                rows.append(
                    {
                        "users": arguments.users,
                        "objectives": objectives,
                        "how": how,
                        "pairs": turn + 1,
                        "angle": round(angles[0], 3),
                        "angle_stderr": round(angles[1] or 0.0, 3),
                        "distance": round(distances[0], 4),
                        "distance_stderr": round(distances[1] or 0.0, 4),
                        "coverage": round(covered[0], 4),
                        "coverage_stderr": round(covered[1] or 0.0, 4),
                        "width": round(float((high - low).mean()), 4),
                    }
                )
            last = rows[-1]
            print(
                f"{objectives} objectives, {how}: angle",
                " ".join(f"{row['angle']:.1f}" for row in rows[-arguments.pairs :]),
                f"degrees (± {last['angle_stderr']:.1f}), coverage {last['coverage']:.3f}",
                flush=True,
            )
    results.write(arguments.name, vars(arguments), rows)


if __name__ == "__main__":
    main()
