"""The objective protocol, and `score`, through which all rewards pass."""

from __future__ import annotations

import inspect
import math
import sysconfig
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mavis.errors import MavisError, ObjectiveError
from mavis.policies import Prompt
from mavis.rewards.identity import keep_identities

_MAX_QUOTED = 60  # characters of a response in an error
_STANDARD_LIBRARY, _PACKAGES = (sysconfig.get_path(name) for name in ("stdlib", "purelib"))


BATCH_TOLERANCE = 1e-3
"""How far a reward may depend on the batch, relative to the largest, unless `batch_tolerance` says otherwise."""


class Objective(Protocol):
    """Any callable that scores responses: one raw reward per response, more is better.

    Called as `objective(prompts, responses)` with two sequences of B: a prompt is what the user gave, a text or a
    conversation (`mavis.policies.last_user_turn` returns what the user said last), and the response is the text that
    the policy wrote after it. Returns B finite numbers: a list, a numpy array (B,) or a tensor (B,). Equal prompts and
    responses must have equal rewards, whatever else is scored in the same call; `check_batch_independence` tries
    it once per run.

    Examples:
        A function will do:

        >>> from mavis.rewards import Objective, score
        >>> def polite(prompts, responses):
        ...     return [float("please" in response) for response in responses]
        >>> objective: Objective = polite
        >>> score({"polite": objective}, ["Ask."], ["A cup, please."]).tolist()
        [[1.0]]
    """

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[str], /
    ) -> Sequence[float] | np.ndarray | torch.Tensor: ...


class Signed:
    """Turn a cost into an objective, or an objective into its opposite.

        R'(prompt, response) = sign · R(prompt, response)

    Args:
        objective: the callable to wrap.
        sign: 1 or −1.

    Raises:
        ObjectiveError: if `sign` is neither 1 nor −1.

    Examples:
        >>> from mavis.rewards import Brevity, Signed
        >>> Signed(Brevity(scale=10))([""], ["one two three"])
        [0.3]
    """

    def __init__(self, objective: Objective, sign: int = -1) -> None:
        self.objective = objective
        self.sign = check_sign(sign)

    @property
    def batch_tolerance(self) -> float:
        """The tolerance of the objective that is wrapped; see `check_batch_independence`."""
        return float(getattr(self.objective, "batch_tolerance", BATCH_TOLERANCE))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        # `score` checks the rewards: it knows the objective's name.
        return [self.sign * reward for reward in self.objective(prompts, responses)]


def score(objectives: Mapping[str, Objective], prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    """Score every response by every objective, and check the rewards.

        rewards[b, m] = R_m(prompts[b], responses[b])

    Args:
        objectives: M named objectives; their order is the order of the columns.
        prompts: B prompts.
        responses: B responses, each to the prompt at the same index.

    Returns:
        Raw rewards (B, M), float64, all finite. With B = 0 no objective is called.

    Raises:
        ObjectiveError: if there is no objective, one cannot be called with prompts and responses, these differ in
            number, or an objective returns anything but one finite number per response. What an objective raises is
            the cause of an ObjectiveError that names the objective, the line and, unless it raises that for every
            response, the response; errors of mavis itself
            are passed on, with a note that names the objective.

    Examples:
        >>> from mavis.rewards import Brevity, Dialogue, score
        >>> objectives = {"short": Brevity(scale=10), "dialogue": Dialogue()}
        >>> score(objectives, ["Say hi."] * 2, ['"Hi!"', "He waved."]).round(3).tolist()
        [[-0.1, 1.0], [-0.2, 0.0]]
    """
    if not objectives:
        raise ObjectiveError("score got no objectives.", "name at least one, for example {'positive': Positive()}.")
    if isinstance(prompts, str) or isinstance(responses, str):
        raise ObjectiveError("score got one string, expected a sequence of strings.", "pass [prompt] and [response].")
    if len(prompts) != len(responses):
        raise ObjectiveError(
            f"score got {len(prompts)} prompts but {len(responses)} responses.",
            "repeat each prompt once per response.",
        )
    rewards = np.empty((len(responses), len(objectives)), dtype=np.float64)
    for name, objective in objectives.items():
        check_callable(name, objective)
    if not len(responses):
        return rewards
    with keep_identities(objectives.values()):  # they may share a cache
        for column, (name, objective) in enumerate(objectives.items()):
            rewards[:, column] = _finite_floats(_call(name, objective, prompts, responses), responses, name)
    return rewards


def check_callable(name: str, objective: Any) -> None:
    """Check that an objective can be called with prompts and responses, before anything is sampled.

    Args:
        name: of the objective.
        objective: to check.

    Raises:
        ObjectiveError: if it cannot be called, is a class instead of an instance, is asynchronous, or takes other
            arguments.
    """
    if isinstance(objective, type):
        raise ObjectiveError(
            f"objective {name!r} is the class {objective.__name__}, expected an instance.",
            f"build it: {objective.__name__}(...).",
        )
    if not callable(objective):
        raise ObjectiveError(
            f"objective {name!r} is a {type(objective).__name__}, which cannot be called.",
            "an objective is a callable (prompts, responses); build one from a config with hydra.utils.instantiate.",
        )
    if inspect.iscoroutinefunction(objective) or inspect.iscoroutinefunction(type(objective).__call__):
        raise ObjectiveError(
            f"objective {name!r} is asynchronous, so that calling it returns no rewards.",
            "wrap it in a function that calls asyncio.run.",
        )
    try:
        signature = inspect.signature(objective)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    try:
        signature.bind([], [])
    except TypeError:
        raise ObjectiveError(
            f"objective {name!r} takes the arguments {signature}, but is called as objective(prompts, responses).",
            "give it two arguments, a list of prompts and a list of responses of the same length.",
        ) from None


def _call(name: str, objective: Objective, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
    """Call an objective with lists of its own; what it raises becomes the cause of an ObjectiveError."""
    try:
        return objective(list(prompts), list(responses))
    except MavisError as error:
        error.add_note(f"raised while objective {name!r} scored {len(responses)} responses")
        raise
    except Exception as error:
        place = _failing_place(error, objective, prompts, responses)
        text = " ".join(str(error).split())
        shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise ObjectiveError(
            f"objective {name!r} raised {shown} {place}, at {_last_line(error)}.",
            "correct the objective; shards of rollouts already scored are kept.",
        ) from error


def _failing_place(error: Exception, objective: Objective, prompts: Sequence[Prompt], responses: Sequence[str]) -> str:
    """Say for which responses an objective raises the same error again.

    A few are scored alone. If only others fail, halves are scored, so that the retries cost at most as much as the
    batch did.
    """
    count = len(responses)

    def fails(rows: range) -> bool:
        try:
            objective([prompts[row] for row in rows], [responses[row] for row in rows])
        except Exception as other:
            return type(other) is type(error)
        return False

    def named(row: int) -> str:
        return f"while scoring response {row} ({_shorten(responses[row])})"

    if isinstance(error, MemoryError | torch.OutOfMemoryError | OSError):  # about the machine, not the response
        return f"while scoring {count} responses"
    if count == 1:
        return named(0)
    tried = sorted({0, count // 3, 2 * count // 3, count - 1})
    failing = [row for row in tried if fails(range(row, row + 1))]
    if failing:
        if failing != tried:
            return named(failing[0])
        return "for every response" if len(tried) == count else f"for each of {len(tried)} responses tried alone"
    rows = range(count if len(tried) < count else 0)
    while len(rows) > 1:
        half = len(rows) // 2
        rows = rows[:half] if fails(rows[:half]) else rows[half:]
    return named(rows[0]) if rows and fails(rows) else f"while scoring {count} responses"


def _last_line(error: Exception) -> str:
    """Return file, line and function of the innermost frame that is the user's own code, or else of the innermost."""
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames[1:] if not frame.filename.startswith((_STANDARD_LIBRARY, _PACKAGES, "<frozen"))]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def _shorten(text: str) -> str:
    return repr(text[:_MAX_QUOTED] + ("..." if len(text) > _MAX_QUOTED else ""))


def check_sign(sign: int) -> int:
    """Return `sign` if it is 1 or −1, else raise ObjectiveError."""
    if sign not in (1, -1):
        raise ObjectiveError(f"sign is {sign!r}, but it must be 1 or -1.", "use 1 for a reward and -1 for a cost.")
    return int(sign)


def _finite_floats(returned: Any, responses: Sequence[str], name: str) -> list[float]:
    """Convert what an objective returned to one finite float per response, or raise."""
    subject = f"objective {name!r}"
    hint = "return one finite number per response, in the order of the responses."
    if isinstance(returned, torch.Tensor):
        returned = returned.detach().to("cpu", torch.float64).numpy()
    if isinstance(returned, np.ndarray) and returned.ndim != 1:
        shape = f"{tuple(returned.shape)}"
        raise ObjectiveError(f"{subject} returned shape {shape}, but must return ({len(responses)},).", hint)
    # Mappings and strings are iterable too, but their items are not rewards.
    if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes, Mapping, set)):
        raise ObjectiveError(f"{subject} returned a {type(returned).__name__} for {len(responses)} responses.", hint)
    values = list(returned)
    if len(values) != len(responses):
        raise ObjectiveError(f"{subject} returned {len(values)} rewards for {len(responses)} responses.", hint)
    rewards = []
    for index, (value, response) in enumerate(zip(values, responses, strict=True)):
        reward = _to_float(value)
        if reward is None or not math.isfinite(reward):
            raise ObjectiveError(
                f"{subject} scored response {index} ({_shorten(response)}) as {value!r}, but a reward is a finite "
                "number.",
                "fix the objective for this response, or leave the response out.",
            )
        rewards.append(reward)
    return rewards


def _to_float(value: Any) -> float | None:
    """Convert one number to a float; None for anything else, also for strings that spell a number."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
    if isinstance(value, (str, bytes)) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
