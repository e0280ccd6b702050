"""Vectors and critics on one policy: the tilt works, and a critic that was trained without the vectors warns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mavis
from mavis.critics import CriticGroup, HiddenStateCritic
from mavis.policies.fingerprint import Fingerprint
from mavis.vectors import AlignmentVector, Vectors, search_coefficients

MakeCritic = Callable[..., HiddenStateCritic]
WITHOUT = "vectors 'happy' are applied to the policy, and this critic was trained on the policy without them"


@pytest.fixture
def vectors(tiny_policy: Any, make_other_policy: Callable[[], Any]) -> Vectors:
    """Two vectors of the tiny policy."""
    vector = AlignmentVector.between(tiny_policy, make_other_policy())
    return Vectors({"happy": 0.1 * vector, "sad": -0.1 * vector})


def test_a_vector_and_a_tilt_steer_together(tiny_policy: Any, make_tiny_critic: MakeCritic, vectors: Vectors) -> None:
    inputs = {"input_ids": torch.tensor([[1, 12, 20], [1, 13, 21]]), "attention_mask": torch.ones(2, 3).long()}
    steer: dict[str, Any] = {"weights": {"good": 1.0}, "beta": 2.0, "do_sample": False, "max_new_tokens": 12}

    def respond(critic: HiddenStateCritic, **changes: Any) -> torch.Tensor:
        return mavis.generate(tiny_policy, inputs, critic=critic, **(steer | changes))

    plain, tilted = respond(make_tiny_critic(), beta=0.0), respond(make_tiny_critic())
    with vectors.applied(tiny_policy, {"happy": 1.0}):
        critic = make_tiny_critic()  # for the policy as it is now
        both, moved = respond(critic), respond(critic, beta=0.0)
    assert len({tuple(ids.flatten().tolist()) for ids in (plain, tilted, moved, both)}) == 4
    assert torch.equal(respond(make_tiny_critic()), tilted)


def test_a_critic_trained_without_the_vectors_warns_and_names_them(
    tiny_policy: Any, make_tiny_critic: MakeCritic, vectors: Vectors
) -> None:
    critic = make_tiny_critic()
    with vectors.applied(tiny_policy, {"happy": 0.5, "sad": 0.0}):
        with pytest.warns(UserWarning, match=WITHOUT) as warned, critic.attach(tiny_policy):
            pass
        assert [w.filename for w in warned] == [__file__]
    critic.attach(tiny_policy).detach()


def test_a_critic_of_another_policy_warns_of_the_vectors_as_well(
    tiny_policy: Any, make_tiny_critic: MakeCritic, make_other_policy: Callable[[], Any], vectors: Vectors
) -> None:
    critic = make_tiny_critic()
    critic.fingerprint = Fingerprint.of(make_other_policy())
    said = "has the shape but not the weights of the one this critic was trained on"
    with vectors.applied(tiny_policy, {"happy": 0.5, "sad": 1}):
        with pytest.warns(UserWarning, match=rf"{said} \(vectors 'happy', 'sad' are applied to it\)"):
            critic.attach(tiny_policy).detach()
    with pytest.warns(UserWarning, match=f"{said}; its values"):
        critic.attach(tiny_policy).detach()


def test_a_critic_trained_under_the_vectors_does_not_warn(
    tiny_policy: Any, make_tiny_critic: MakeCritic, vectors: Vectors
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vectors.applied(tiny_policy, {"happy": 0.5}):
            critic = make_tiny_critic()
            critic.attach(tiny_policy).detach()
        with vectors.applied(tiny_policy, {"happy": 0.5}), critic.attach(tiny_policy):
            pass
        with vectors.applied(tiny_policy, {"happy": 0.0}), make_tiny_critic().attach(tiny_policy):
            pass


@pytest.mark.parametrize("group", [False, True], ids=["one", "group"])
def test_a_critic_that_was_attached_first_warns_once(
    tiny_policy: Any, make_tiny_critic: MakeCritic, vectors: Vectors, group: bool
) -> None:
    members = [make_tiny_critic("good")]
    critic = CriticGroup(members) if group else members[0]

    def respond() -> Any:
        inputs = torch.tensor([[1, 12, 20]])
        return mavis.generate(tiny_policy, inputs, critic=critic, weights=[1.0], beta=1.0, max_new_tokens=2)

    with critic.attach(tiny_policy):
        with pytest.warns(UserWarning, match=WITHOUT) as warned, vectors.applied(tiny_policy, {"happy": 0.5}):
            assert [respond() for _ in range(3)]
        assert [w.filename for w in warned] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            respond()
            with pytest.raises(UserWarning, match=WITHOUT), vectors.applied(tiny_policy, {"happy": 0.5}):
                pytest.fail("the warning was no error")
    assert vectors["happy"].norm() > 0
    assert Fingerprint.of(tiny_policy) == critic.fingerprint  # also where the warning was an error


def test_a_coefficient_can_be_searched_for_under_a_tilt(
    tiny_policy: Any, make_tiny_critic: MakeCritic, vectors: Vectors
) -> None:
    pytest.importorskip("optuna")
    ids = torch.tensor([[1, 12, 20, 15, 9, 30]])

    def likelihood(coefficients: dict[str, float]) -> float:
        with vectors.applied(tiny_policy, coefficients), torch.no_grad():
            return -float(tiny_policy(ids, labels=ids).loss)

    found = search_coefficients(likelihood, ["happy"], bounds=(-3, 3), trials=12)
    assert found.score == likelihood(found.coefficients) > likelihood({})


def test_changes_outside_the_fingerprints_sample_are_warned_of(
    tiny_policy: Any, make_tiny_critic: MakeCritic, vectors: Vectors
) -> None:
    critic, vector = make_tiny_critic(), vectors["happy"]
    name = next(name for name, shape in vector.layout.shapes.items() if torch.Size(shape).numel() >= 128)
    change = torch.zeros(vector.layout.shapes[name])
    change.view(-1)[1] = 1.0
    happy = Vectors({"happy": AlignmentVector({name: change}, vector.layout, vector.base)})
    with happy.applied(tiny_policy, {"happy": 1.0}):
        assert Fingerprint.of(tiny_policy) == critic.fingerprint
        with pytest.warns(UserWarning, match=WITHOUT):
            critic.attach(tiny_policy).detach()
    with critic.attach(tiny_policy), pytest.warns(UserWarning, match=WITHOUT):
        with happy.applied(tiny_policy, {"happy": 1.0}):
            pass


@pytest.mark.parametrize("is_wrapper_first", [False, True])
def test_a_critic_on_a_wrapped_model_warns_as_well(
    tiny_policy: Any, make_tiny_critic: MakeCritic, vectors: Vectors, is_wrapper_first: bool
) -> None:
    policies = tiny_policy, torch.compile(tiny_policy, backend="eager")
    one, other = reversed(policies) if is_wrapper_first else policies
    with make_tiny_critic().attach(one), pytest.warns(UserWarning, match=WITHOUT):
        with vectors.applied(other, {"happy": 0.5}):
            pass
