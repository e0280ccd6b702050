"""Pairs of responses of which a user chose one: their reward differences, and the file format of answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis.critics import Critic
from mavis.critics.group import as_critic
from mavis.data import Pair
from mavis.errors import DataError, ObjectiveError, PreferenceError, closest
from mavis.rewards import Objective, score
from mavis.utils.files import atomic_file


def reward_differences(
    pairs: Sequence[Pair], objectives: Mapping[str, Objective], critic: Critic | Sequence[Critic]
) -> Tensor:
    """Compute how much more reward the chosen responses earn than the rejected ones.

        d_nm = (R_m(chosen_n) − R_m(rejected_n)) / std_m

    Args:
        pairs: N pairs.
        objectives: the critic's M objectives by name, in any order; others are not scored.
        critic: one or several; gives the order of the columns and the normalisation, so that a unit is a standard
            deviation of the reference policy's rewards.

    Returns:
        (N, M) float64, in the order of `critic.objectives`.

    Raises:
        PreferenceError: if there is no pair.
        ObjectiveError: if an objective of the critic is not among `objectives`, or returns something other than one
            finite number per response.

    Examples:
        >>> import mavis
        >>> from mavis.preference import Pair, reward_differences
        >>> from mavis.rewards import Dialogue, Positive
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> pair = Pair("The dog", ' was happy and loved. "Good!"', " was sad and lost.")
        >>> differences = reward_differences([pair], {"positive": Positive(), "dialogue": Dialogue()}, critic)
        >>> differences.shape, bool((differences > 0).all())
        (torch.Size([1, 2]), True)
    """
    if not pairs:
        raise PreferenceError("pairs is empty, expected at least one.", "about ten choices are a good start.")
    critic = as_critic(critic)
    ordered = critic_objectives(critic, objectives)
    prompts = [pair.prompt for pair in pairs]
    raw = score(ordered, prompts * 2, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    chosen, rejected = critic.normalise(torch.from_numpy(raw)).chunk(2)
    return chosen - rejected


def critic_objectives(critic: Critic, objectives: Mapping[str, Objective]) -> dict[str, Objective]:
    """Select a critic's objectives, in its order.

    Raises:
        ObjectiveError: if one is missing.
    """
    for name in critic.objectives:
        if name not in objectives:
            raise ObjectiveError(
                f"objectives lacks the critic's {name!r} and has: {', '.join(objectives) or 'none'}.",
                closest(name, objectives),
            )
    return {name: objectives[name] for name in critic.objectives}


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Read pairs from a JSON Lines file.

        {"prompt": "Once", "chosen": " upon a time.", "rejected": " more."}

    Args:
        path: of the file, UTF-8. Empty lines, and questions that the user skipped (`"skipped"`), are ignored.

    Returns:
        The pairs in the order of the file, possibly none.

    Raises:
        DataError: if the file is missing, or a line is not such an object; names the line.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from mavis.preference import read_pairs
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "pairs.jsonl"
        ...     _ = path.write_text(json.dumps({"prompt": "Once", "chosen": " upon a time.", "rejected": " more."}))
        ...     read_pairs(path)
        [Pair(prompt='Once', chosen=' upon a time.', rejected=' more.')]
    """
    return [pair for pair, is_skipped in read_answers(path) if not is_skipped]


def read_answers(path: str | os.PathLike[str]) -> list[tuple[Pair, bool]]:
    """Read what `write_answers` wrote; see `read_pairs` for the file and its errors.

    Returns:
        Every question in the order of the file, and whether it was skipped.
    """
    shown = repr(os.fspath(path))
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"path is {shown}, which cannot be read: {error.strerror}.", "pass a file with one pair per line."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"path is {shown}, which is not UTF-8 text.", "save it as UTF-8.") from error
    # `splitlines` would also split at other characters, which a response may contain.
    lines = text.split("\n")
    return [_answer(line, f"line {number} of {shown}") for number, line in enumerate(lines, 1) if line.strip()]


def write_answers(path: str | os.PathLike[str], answers: Sequence[tuple[Pair, bool]]) -> None:
    """Write questions atomically, as `read_answers` reads them.

    Args:
        path: of the file.
        answers: pairs, and whether the question was skipped, in which case neither response is preferred.
    """
    rows = [
        {"prompt": pair.prompt, "skipped": [pair.chosen, pair.rejected]}
        if is_skipped
        else {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair, is_skipped in answers
    ]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _answer(line: str, where: str) -> tuple[Pair, bool]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}.", "write one object per line.") from error
    fields: Any = row if isinstance(row, dict) else {}
    is_skipped = "skipped" in fields
    responses = fields.get("skipped") if is_skipped else [fields.get("chosen"), fields.get("rejected")]
    texts = [fields.get("prompt"), *(responses if isinstance(responses, list) else [])]
    if len(texts) != 3 or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where} is {line[:60]!r}, expected an object with the texts prompt, chosen and rejected.",
            'write e.g. {"prompt": "Once", "chosen": " upon a time.", "rejected": " more."}.',
        )
    return Pair(*texts), is_skipped
