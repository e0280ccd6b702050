"""Several critics under one tilt: one per objective, of whatever kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis import CriticGroup, MavisTilt
from mavis.errors import CriticError, WeightsError

MakeCritic = Callable[..., Any]
Inputs = dict[str, torch.Tensor]
KINDS: list[dict[str, Any]] = [{}, {"memory": 6}, {"readout": "token"}, {"readout": "candidates", "hidden": 0}]


@pytest.fixture
def four(llama: Any, make_critic: MakeCritic) -> list[Any]:
    """A critic of each kind, with an objective of its own or two."""
    names = (("a",), ("b", "c"), ("d",), ("e",))
    return [make_critic(llama, own, seed=i, **kind) for i, (own, kind) in enumerate(zip(names, KINDS, strict=True))]


class Both:
    """Keeps the scores before and after a tilt."""

    def __init__(self, tilt: MavisTilt) -> None:
        self.tilt, self.before, self.after = tilt, list[torch.Tensor](), list[torch.Tensor]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.before.append(scores)
        self.after.append(self.tilt(input_ids, scores))
        return self.after[-1]


def test_the_tilts_add_up_and_weights_name_the_objectives_of_all(llama: Any, four: list[Any], prompts: Inputs) -> None:
    """What each critic's own tilt adds, found alone along the same tokens, sums to what they add together."""
    weights = {"e": 0.7, "b": -0.4, "a": 1.0, "d": 0.5, "c": 0.2}
    together = Both(MavisTilt(weights, four, beta=1.5, top_k=None))
    assert together.tilt.critic is not None
    assert together.tilt.critic.objectives == ("a", "b", "c", "d", "e")
    with together.tilt.critic.attached_to(llama):
        out = llama.generate(**prompts, do_sample=False, max_new_tokens=5, logits_processor=[together])
    added: list[torch.Tensor] = [torch.zeros(3, 40)] * 5
    for critic in four:
        own = {name: weight for name, weight in weights.items() if name in critic.objectives}
        alone = Both(MavisTilt(own, critic, beta=1.5, top_k=None))

        def follow(ids: torch.Tensor, scores: torch.Tensor, alone: Both = alone) -> torch.Tensor:
            alone(ids, scores)
            return torch.nn.functional.one_hot(out[:, ids.shape[1]], 40).log()  # the same token whatever is scored

        with critic.attach(llama):
            llama.generate(**prompts, do_sample=False, max_new_tokens=5, logits_processor=[follow])
        for step, (before, after) in enumerate(zip(alone.before, alone.after, strict=True)):
            added[step] = added[step] + after - before
    for before, after, sum_of_tilts in zip(together.before, together.after, added, strict=True):
        torch.testing.assert_close(after, (before + sum_of_tilts).log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_critics_that_are_attached_stay_attached_and_others_are_let_go(
    llama: Any, four: list[Any], prompts: Inputs
) -> None:
    with four[1].attach(llama):
        out = mavis.generate(
            llama, prompts, critic=four, weights={"a": 1.0}, beta=1.0, do_sample=False, max_new_tokens=3
        )
        assert [critic.attached_policy for critic in four] == [None, llama, None, None]
    alone = mavis.generate(
        llama, prompts, critic=four[0], weights={"a": 1.0}, beta=1.0, do_sample=False, max_new_tokens=3
    )
    assert torch.equal(out, alone)


def test_a_group_is_attached_whole_or_not_at_all(llama: Any, policy: Any, four: list[Any]) -> None:
    group = CriticGroup(four)
    with group.attach(llama):
        assert group.attached_policy is llama
    assert group.attached_policy is None
    four[2].attach(llama)
    with pytest.raises(CriticError, match="already attached to a policy"):
        group.attach(llama)
    assert [critic.attached_policy for critic in four] == [None, None, llama, None]
    group.detach()


def test_what_does_not_go_together_is_refused(
    llama: Any, make_critic: MakeCritic, four: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(CriticError, match="expected critics"):
        MavisTilt([1.0], [])
    with pytest.raises(CriticError, match="objective 'a' belongs to two of the critics"):
        MavisTilt([1.0], [*four, make_critic(llama, ("a",))])
    with pytest.raises(CriticError, match="composition is 'independent'"):
        CriticGroup(four).values(torch.zeros(1, 1, dtype=torch.long), None, torch.ones(1, 5))
    with pytest.raises(CriticError, match="the critic of x is conditioned"):
        MavisTilt([1.0], [*four, make_critic(llama, ("x",), composition="conditioned")])
    with pytest.raises(WeightsError, match="names objective 'f', but the critic has: a, b, c, d, e"):
        MavisTilt({"f": 1.0}, four, beta=1.0)
    with pytest.raises(CriticError, match="save each of its critics"):
        CriticGroup(four).save_pretrained(tmp_path / "group")
