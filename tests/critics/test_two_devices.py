"""A policy spread over two accelerators: scores, candidates and λ are elsewhere than the critic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mavis
from mavis.critics import CriticGroup, HiddenStateCritic, ValueModelCritic
from mavis.decoding.logits_processor import _BatchLambda
from tests.decoding.steps import KINDS
from tests.factories import llama_config, tiny_llama

FIRST, LAST = torch.device("meta"), torch.device("cpu")
"""Of the scores and of the last hidden states. Fake tensors refuse to meet across devices, whichever these are."""
ROWS, CANDIDATES = 3, 5


def critic_of(kind: dict[str, Any], names: list[str]) -> Any:
    policy = tiny_llama()
    options = {"hidden": 8, "rank": 4, "composition": "independent"} | kind
    if "readout" in kind:
        return ValueModelCritic.for_policy(policy, names, backbone=llama_config(), **options)
    return HiddenStateCritic.for_policy(policy, names, **options)


class Position:
    """Where rows are; counted on the device of the ids, as `StateCapture` does."""

    starts_response = True
    shortest_resumable = 0

    def __init__(self, ids: Tensor) -> None:
        self.lengths = torch.full_like(ids[:, 0], ids.shape[1])


class Capture:
    """What a critic asks of its capture, with states on the last device."""

    restarted = False
    cache = None

    def states(self, ids: Tensor) -> Tensor:
        return torch.empty(len(ids), 16, device=LAST)

    def position(self, ids: Tensor) -> Position:
        return Position(ids)

    def is_token(self, ids: Tensor) -> Tensor:
        return torch.ones_like(ids, dtype=torch.bool)

    def policy(self) -> Any:
        return None

    def raise_if_unknown(self, unknown: Tensor) -> None:
        """Accept everything."""


class Reader:
    """What a value model asks of its reader, which moves ids to the trunk."""

    def read(self, ids: Tensor, is_token: Tensor, candidate_ids: Tensor | None, **options: Any) -> Tensor:
        shape = (len(ids), 16) if candidate_ids is None else (*candidate_ids.shape, 16)
        return torch.empty(shape, device=LAST)


def on_the_last_device(critic: Any) -> Any:
    """Attach a critic to a policy whose last hidden states are on the last device."""
    from mavis.critics.recurrent import SequenceMemories

    for name, tensor in [*critic.named_parameters(), *critic.named_buffers()]:
        module, _, own = name.rpartition(".")
        slots = critic.get_submodule(module)
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=LAST)
        if own in slots._parameters:
            slots._parameters[own] = torch.nn.Parameter(there, requires_grad=False)
        else:
            slots._buffers[own] = there
    for member in critic.critics if isinstance(critic, CriticGroup) else [critic]:
        member._capture, member._reader = Capture(), Reader()
        member._sequence_memories = SequenceMemories()
    return critic


@pytest.mark.parametrize("kind", [*KINDS, "group"])
@pytest.mark.parametrize("every_token", [False, True])
def test_a_critic_elsewhere_than_the_scores_tilts_them(kind: str, every_token: bool) -> None:
    if kind == "group":
        critic: Any = CriticGroup([critic_of(KINDS["plain"], ["a"]), critic_of(KINDS["memory"], ["b"])])
    else:
        critic = critic_of(KINDS[kind], ["a", "b"])
    tilt = mavis.MavisTilt([1.0, 0.5], critic, beta=1.0, top_k=CANDIDATES, record_kl=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        on_the_last_device(critic)
        ids = torch.empty(ROWS, 4, dtype=torch.long, device=FIRST)
        candidates = None if every_token else torch.empty(ROWS, CANDIDATES, dtype=torch.long, device=FIRST)
        lam = torch.empty(ROWS, 2, device=FIRST)
        columns = 40 if every_token else CANDIDATES
        tilt = critic.tilt(ids, candidates, lam)
        assert (tilt.shape, tilt.device) == ((ROWS, columns), LAST)
        values = critic.values(ids, candidates, lam if critic.conditioned else None)
        assert (values.shape, values.device) == ((ROWS, columns, 2), LAST)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tilt_comes_back_to_the_scores(kind: str) -> None:
    critic = critic_of(KINDS[kind], ["a", "b"])
    tilt = mavis.MavisTilt([1.0, 0.5], critic, beta=1.0, top_k=CANDIDATES, record_kl=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        on_the_last_device(critic)
        lam = torch.empty(ROWS, 2, device=FIRST)
        tilt._batch_lambda = _BatchLambda(critic, ROWS, FIRST, lam, None)  # computed on the host
        scores = tilt(torch.empty(ROWS, 4, dtype=torch.long, device=FIRST), torch.empty(ROWS, 40, device=FIRST))
        assert (scores.shape, scores.device) == ((ROWS, 40), FIRST)
        assert tilt.kl.device == FIRST
