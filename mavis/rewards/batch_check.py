"""A cheap check that a reward does not depend on what else is scored in the same call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mavis.errors import ObjectiveError, warn_user
from mavis.rewards.protocol import BATCH_TOLERANCE, Objective, score

_ROWS = 8  # how many responses are scored again, twice each


def check_batch_independence(
    objectives: Mapping[str, Objective], prompts: Sequence[str], responses: Sequence[str], rewards: np.ndarray
) -> None:
    """Score a few responses again, in another order and in smaller batches, and compare.

        |R'_m − R_m| ≤ tolerance · max(|R_m|) + 1e-5,   the maximum over all responses, tolerance = 1e-3

    An objective with an attribute `batch_tolerance` is compared at that tolerance.

    Args:
        objectives: M named objectives.
        prompts: B prompts.
        responses: B responses, each to the prompt at the same index.
        rewards: (B, M), what `score` returned for them.

    Raises:
        ObjectiveError: if the rewards differ, although the objective repeats the first call exactly: it depends on the
            batch.

    Warns:
        UserWarning: if the objective does not repeat the first call either: it is random.

    Examples:
        >>> from mavis.rewards import Brevity, check_batch_independence, score
        >>> texts = ["One two three.", "One two.", "One."]
        >>> check_batch_independence({"short": Brevity()}, texts, texts, score({"short": Brevity()}, texts, texts))
        >>> def relative(prompts, responses):
        ...     longest = max(map(len, responses))
        ...     return [len(response) / longest for response in responses]
        >>> check_batch_independence({"long": relative}, texts, texts, score({"long": relative}, texts, texts))
        Traceback (most recent call last):
        mavis.errors.ObjectiveError: objective 'long' scores response 1 as 0.571429 in a batch of 3, but as 1 ...
    """
    count = len(responses)
    if not count:
        return
    chosen = sorted({i * (count - 1) // (_ROWS - 1) for i in range(_ROWS)})
    half = len(chosen) // 2
    # Last first, and in halves, one of which lacks the largest; a single response is scored beside itself.
    groups = [chosen[::-1], chosen[:half], chosen[half:]] if half else [chosen * 2]
    for column, (name, objective) in enumerate(objectives.items()):
        relative = float(getattr(objective, "batch_tolerance", BATCH_TOLERANCE))
        tolerance = relative * float(np.abs(rewards[:, column]).max()) + 1e-5
        difference, found = 0.0, ""
        for rows in groups:
            again = score({name: objective}, [prompts[i] for i in rows], [responses[i] for i in rows])[:, 0]
            before = rewards[rows, column]
            worst = int(np.abs(again - before).argmax())
            if abs(again[worst] - before[worst]) > max(difference, tolerance):
                difference = abs(again[worst] - before[worst])
                found = (
                    f"objective {name!r} scores response {rows[worst]} as {before[worst]:.6g} in a batch of {count}, "
                    f"but as {again[worst]:.6g} in a batch of {len(rows)}"
                )
        if not found:
            continue
        repeated = score({name: objective}, prompts, responses)[:, 0]
        if np.abs(repeated - rewards[:, column]).max() <= tolerance:
            raise ObjectiveError(
                f"{found}: it depends on what else is scored.",
                "score each response by itself, without ranks, means or padding that leak from the others.",
            )
        warn_user(
            f"{found}, and otherwise again when the same call is repeated: it is random or keeps a state, so that an "
            "interrupted run does not resume exactly."
        )
