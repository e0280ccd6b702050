"""What identifies an objective in the manifest of a run: what it does, so that changed objectives are noticed."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mavis.rewards.describer import Describer, hash_of


class _State(NamedTuple):
    """What a call left: the objective, its identity before its first call, and its fingerprint after its last one."""

    objective: weakref.ref[Any]
    identity: str
    fingerprint: str


_states: dict[int, _State] = {}
"""By id: an objective may have no hash, or be equal to another one."""


def objective_identity(objective: Any) -> str:
    """Identify an objective by what it does.

    A function is identified by its code, without comments and docstring, by its closure, its defaults, and by the
    functions and values of its module that it uses; an object by its class and its attributes; a torch module by its
    weights. Code of installed packages counts by its name and the package's version, and an object of an installed
    class by that and by the models and arrays that it holds, as what else it holds may differ between processes; of a
    pipeline of transformers, what it was called with counts, too. An attribute `version` replaces name and code: change
    it when the rewards change. A method `identity` that returns plain data replaces everything else, as in
    `RewardModel`.

    Compiled code differs between versions of Python, so that only identities of the same version can be compared.

    What an objective stores while it scores, such as a cache, does not change its identity within a process.

    Args:
        objective: to identify.

    Returns:
        A hash, the same in every process.

    Examples:
        >>> from mavis.rewards import Brevity, objective_identity
        >>> objective_identity(Brevity(scale=10)) == objective_identity(Brevity(scale=10))
        True
        >>> objective_identity(Brevity(scale=10)) == objective_identity(Brevity(scale=20))
        False
    """
    state = _states.get(id(objective))
    if state is not None and state.fingerprint == _fingerprint(objective):
        return state.identity
    return hash_of(Describer().describe(objective))[:16]


@contextlib.contextmanager
def keep_identities(objectives: Iterable[Any]) -> Iterator[None]:
    """Take what objectives store within the block as caches, which leave them what they were before.

    What is changed outside such blocks, such as an option that is set between two runs, changes the identity.
    """
    before = [(objective, objective_identity(objective)) for objective in objectives]
    try:
        yield
    finally:
        for objective, identity in before:
            _remember(objective, identity)


def _remember(objective: Any, identity: str) -> None:
    key = id(objective)
    with contextlib.suppress(TypeError):  # it cannot be referred to weakly
        _states[key] = _State(
            weakref.ref(objective, lambda _: _states.pop(key, None)), identity, _fingerprint(objective)
        )


def file_digest(path: Path) -> str:
    """Hash the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_as_in_first_release(objective: Any) -> bool:
    """Say whether the objectives of mavis within an objective score as in 0.1, whose manifests do not identify them."""
    describer = Describer()
    describer.describe(objective)
    return max(describer.versions, default=1) == 1


def depends_on_python(objective: Any) -> bool:
    """Say whether an objective is identified by compiled code, which differs between versions of Python."""
    describer = Describer()
    describer.describe(objective)
    return describer.is_compiled


def _fingerprint(objective: Any) -> str:
    """Hash what an objective is and stores, within this process only, and quickly if it stores a large cache."""
    return hash_of(Describer(quick=True).describe(objective))
