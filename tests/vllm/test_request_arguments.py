"""Request arguments give the λ, candidates and temperature of `MavisTilt`, or an error that names the argument."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mavis.critics import Calibration, Critic, TrainedDecoding
from mavis.decoding.weights import lambda_rows
from mavis.errors import DecodingError, MavisError, RequestError
from mavis.policies import embedded
from mavis.vllm.request_arguments import asks_for_tilt, parse_tilt


@pytest.fixture
def critic(tiny_policy: Any, make_critic: Callable[..., Any]) -> Any:
    return make_critic(tiny_policy)


@pytest.mark.parametrize(
    "weights",
    ["good=0.7,brevity=0.3", " good = 0.7 , brevity=0.3", [0.7, 0.3], {"good": 0.7, "brevity": 0.3}],
)
def test_weights_in_any_form_are_the_same_lambda(critic: Any, weights: Any) -> None:
    tilt = parse_tilt({"mavis_weights": weights, "mavis_beta": 2}, 0.8, critic)
    assert tilt is not None
    torch.testing.assert_close(tilt.lam, torch.tensor([1.4, 0.6]))
    assert (tilt.top_k, tilt.temperature) == (40, 0.8)


@pytest.mark.parametrize("trained", [7, None])
def test_a_request_that_names_no_candidates_gets_those_the_critic_was_trained_with(
    critic: Any, trained: int | None
) -> None:
    critic.decoding = TrainedDecoding(top_k=trained)
    tilt = parse_tilt({"mavis_weights": [0.7, 0.3], "mavis_beta": 2}, 0.8, critic)
    assert tilt is not None
    assert tilt.top_k == trained


def test_an_objective_without_a_weight_has_weight_zero(critic: Any) -> None:
    tilt = parse_tilt({"mavis_weights": "brevity=-1", "mavis_beta": 3.0}, 1.0, critic)
    assert tilt is not None
    assert tilt.lam.tolist() == [0.0, -3.0]


@pytest.mark.parametrize("top_k", [1, 7, 61, 0])
def test_candidates_are_one_to_all_and_zero_means_every_token(critic: Any, top_k: int) -> None:
    tilt = parse_tilt({"mavis_weights": "good=1", "mavis_beta": 1, "mavis_top_k": top_k}, 1.0, critic)
    assert tilt is not None
    assert tilt.top_k == (top_k or None)


def test_a_greedy_request_is_tilted_as_at_temperature_one(critic: Any) -> None:
    tilt = parse_tilt({"mavis_weights": "good=1", "mavis_beta": 1}, 0.0, critic)
    assert tilt is not None
    assert tilt.temperature == 1.0


@pytest.mark.parametrize(
    "extra_args",
    [
        None,
        {},
        {"session": "x"},
        {"mavis_weights": None},
        {"mavis_weights": "good=1", "mavis_beta": 0},
        {"mavis_weights": [0, 0], "mavis_beta": 3},
    ],
)
def test_a_request_without_a_tilt_is_plain(critic: Any, extra_args: Any) -> None:
    assert parse_tilt(extra_args, 1.0, critic) is None


def test_a_request_asks_for_a_tilt_with_any_mavis_argument() -> None:
    assert not asks_for_tilt(None)
    assert not asks_for_tilt({"other": 1, "mavis_weights": None})
    assert asks_for_tilt({"mavis_anything": 0})


def test_without_a_strength_the_calibrated_default_is_used(critic: Any, calibration: Calibration) -> None:
    critic.calibration = calibration
    tilt = parse_tilt({"mavis_weights": "good=1", "mavis_top_k": 5}, 0.5, critic)
    assert tilt is not None
    torch.testing.assert_close(tilt.lam, lambda_rows({"good": 1.0}, critic, None, None)[0].float())
    assert tilt.lam[0] == pytest.approx(2.0, rel=1e-6)  # β²/2 = 2 nats


def test_a_budget_is_converted_by_the_calibration(critic: Any, calibration: Calibration) -> None:
    critic.calibration = calibration
    tilt = parse_tilt({"mavis_weights": "good=1", "mavis_target_kl": 0.5, "mavis_top_k": 5}, 0.5, critic)
    assert tilt is not None
    assert tilt.lam[0] == pytest.approx(1.0, rel=1e-6)


def test_a_default_for_other_candidates_or_another_temperature_warns(critic: Any, calibration: Calibration) -> None:
    critic.calibration = calibration
    for arguments, temperature in (({"mavis_top_k": 4}, 0.5), ({"mavis_top_k": 5}, 1.0), ({"mavis_top_k": 5}, 0.0)):
        with pytest.warns(UserWarning, match="the critic was calibrated with top_k=5 and temperature=0.5"):
            parse_tilt({"mavis_weights": "good=1"} | arguments, temperature, critic)


def test_a_lambda_outside_the_trained_range_of_a_conditioned_critic_warns(
    tiny_policy: Any, make_critic: Callable[..., Any]
) -> None:
    critic = make_critic(tiny_policy, composition="conditioned")
    critic.max_trained_lambda.fill_(4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_tilt({"mavis_weights": "good=1", "mavis_beta": 4}, 1.0, critic)
    with pytest.warns(UserWarning, match="sum of at most 4"):
        parse_tilt({"mavis_weights": "good=1", "mavis_beta": 5}, 1.0, critic)


GOOD = {"mavis_weights": "good=1", "mavis_beta": 1.0}


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"mavis_beta": 1.0}, "mavis_weights is missing"),
        ({"mavis_weights": "goood=1", "mavis_beta": 1}, "mavis_weights: weights names objective 'goood'"),
        ({"mavis_weights": "good", "mavis_beta": 1}, "mavis_weights is 'good'"),
        ({"mavis_weights": "good=nan", "mavis_beta": 1}, "mavis_weights is 'good=nan'"),
        ({"mavis_weights": "good=1;brevity=2", "mavis_beta": 1}, "mavis_weights is"),
        ({"mavis_weights": "good=1,good=2", "mavis_beta": 1}, "names 'good' twice"),
        ({"mavis_weights": "", "mavis_beta": 1}, "mavis_weights is ''"),
        ({"mavis_weights": [1.0], "mavis_beta": 1}, "mavis_weights: weights has shape"),
        ({"mavis_weights": [1.0, float("inf")], "mavis_beta": 1}, "mavis_weights: weights for objective 'brevity'"),
        ({"mavis_weights": ["good", 1], "mavis_beta": 1}, "mavis_weights is ['good', 1]"),
        ({"mavis_weights": [[1, 0]], "mavis_beta": 1}, "mavis_weights is [[1, 0]]"),
        ({"mavis_weights": {"good": "1"}, "mavis_beta": 1}, "mavis_weights is {'good': '1'}"),
        ({"mavis_weights": [10**400, 1], "mavis_beta": 1}, "mavis_weights is [1000"),
        ({"mavis_weights": [True, False], "mavis_beta": 1}, "mavis_weights is [True, False]"),
        # Tensors would reach an engine in another process as raw bytes and crash it, so they are refused.
        ({"mavis_weights": torch.tensor([1.0, 0.0]), "mavis_beta": 1}, "mavis_weights is tensor("),
        ({"mavis_weights": [torch.tensor(1.0), 0], "mavis_beta": 1}, "mavis_weights is [tensor("),
        ({"mavis_weights": 1, "mavis_beta": 1}, "mavis_weights is 1,"),
        ({"mavis_weights": [], "mavis_beta": 1}, "mavis_weights: "),
        ({"mavis_weights": {}, "mavis_beta": 1}, "mavis_weights: weights is empty"),
        (GOOD | {"mavis_beta": -1}, "mavis_beta: "),
        (GOOD | {"mavis_beta": float("nan")}, "mavis_beta: "),
        (GOOD | {"mavis_beta": "2"}, "mavis_beta is '2'"),
        (GOOD | {"mavis_beta": True}, "mavis_beta is True"),
        (GOOD | {"mavis_beta": [1, 2]}, "mavis_beta is [1, 2]"),
        (GOOD | {"mavis_beta": 10**400}, "mavis_beta is 1000"),
        (GOOD | {"mavis_beta": 1e300}, "mavis_beta: beta · weights is "),
        (GOOD | {"mavis_target_kl": 1}, "mavis_target_kl: beta is 1.0 and target_kl is 1"),
        ({"mavis_weights": "good=1", "mavis_target_kl": 10**400}, "mavis_target_kl is 1000"),
        ({"mavis_weights": "good=1", "mavis_target_kl": 0}, "mavis_target_kl: "),
        ({"mavis_weights": "good=1", "mavis_target_kl": 1}, "mavis_target_kl: target_kl is 1, and the critic carries"),
        ({"mavis_weights": "good=1"}, "carries no calibration"),
        (GOOD | {"mavis_top_k": -1}, "mavis_top_k is -1"),
        (GOOD | {"mavis_top_k": 62}, "mavis_top_k is 62, expected a whole number from 0 to 61"),
        (GOOD | {"mavis_top_k": 2.5}, "mavis_top_k is 2.5"),
        (GOOD | {"mavis_top_k": "5"}, "mavis_top_k is '5'"),
        (GOOD | {"mavis_topk": 5}, "mavis_topk is not a tilt argument. Hint: did you mean 'mavis_top_k'?"),
    ],
)
def test_an_invalid_argument_is_named_in_a_value_error(critic: Any, extra_args: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_tilt(extra_args, 1.0, critic)
    assert message in str(caught.value)
    assert "Hint: " in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, DecodingError)


def test_a_budget_for_another_calibration_is_refused(critic: Any, calibration: Calibration) -> None:
    critic.calibration = calibration
    with pytest.raises(RequestError, match="mavis_target_kl: target_kl is 1; the critic was calibrated with top_k=5"):
        parse_tilt({"mavis_weights": "good=1", "mavis_target_kl": 1}, 0.5, critic)


def test_the_description_of_a_critic_is_enough_to_parse_a_request(
    tiny_policy: Any, make_critic: Callable[..., Any], calibration: Calibration, tmp_path: Path
) -> None:
    critic = make_critic(tiny_policy, composition="conditioned", memory=4)
    critic.calibration = calibration
    critic.max_trained_lambda.fill_(9.0)
    critic.save_pretrained(tmp_path / "critic")
    description = Critic.describe(tmp_path / "critic")
    arguments = {"mavis_weights": "good=0.5,brevity=0.5", "mavis_target_kl": 1.0, "mavis_top_k": 5}
    one, other = parse_tilt(arguments, 0.5, description), parse_tilt(arguments, 0.5, critic)
    assert one is not None
    assert other is not None
    assert torch.equal(one.lam, other.lam)
    assert description.objectives == critic.objectives
    assert description.fingerprint == critic.fingerprint
    assert float(description.max_trained_lambda) == 9.0
    assert all(weight.is_meta for weight in description.parameters())


def test_a_folder_without_weights_has_no_description(
    tiny_policy: Any, make_critic: Callable[..., Any], tmp_path: Path
) -> None:
    make_critic(tiny_policy).save_pretrained(tmp_path / "critic")
    (tmp_path / "critic" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(MavisError, match="corrupt"):
        Critic.describe(tmp_path / "critic")
    (tmp_path / "critic" / "model.safetensors").unlink()
    with pytest.raises(MavisError, match="has no model.safetensors"):
        Critic.describe(tmp_path / "critic")


HOSTILE: list[Any] = [
    *(True, False, 0, -1, 1, 2**63, 10**400, -(10**400), 1.5, -0.0, math.nan, math.inf, -math.inf, 1e308, 5e-324),
    *(
        "",
        " ",
        "a",
        "positive=1",
        "positive=1,positive=2",
        "positive=nan",
        "positive=1e999",
        "=1",
        "positive==1",
        ",,,",
    ),
    *("positive=1e308,dialogue=1e308", "\x1b[31m=1", "positive=1\x00", "\u202e=1", "\ud800=1", "positive=0x10", "{}"),
    *("a" * 10**6, "positive=" + "9" * 10**5, "," * 10**6, ("\x1b=1," * 2)),
    *([], {}, [1], [1, 2], [1, 2, 3], [1.0, None], ["1", "2"], [[1, 2]], [math.nan, 1], [1e308, 1e308], [10**400, 1]),
    *({"positive": None}, {1: 2}, {"x\x1b[2J": 1}, {"positive": math.nan}, {"positive": 10**400}, {"": 1}),
    *(b"abc", {1, 2}, object(), 1j, [1] * 10**5, {str(i): 1.0 for i in range(10**4)}),
]
NAMES = [
    *("mavis_weights", "mavis_beta", "mavis_target_kl", "mavis_top_k", "mavis_", "mavis_weights ", "mavis_\x1b[31m"),
    *("mavis_" + "a" * 10**5, "mavis_\ud800", "other", "Mavis_weights"),
]


@pytest.mark.filterwarnings("ignore:lambda = beta", "ignore:beta is not given")
def test_hostile_arguments_are_refused_in_one_short_printable_line() -> None:
    critic = Critic.from_pretrained(embedded.critic_path())
    draw, refused = random.Random(0), 0
    pairs: list[dict[str, Any]] = [{name: value} for name in NAMES for value in HOSTILE]
    pairs += [{"mavis_weights": "positive=1", **pair} for pair in pairs]
    pairs += [{draw.choice(NAMES): draw.choice(HOSTILE) for _ in range(4)} for _ in range(1000)]
    for arguments in pairs:
        temperature = draw.choice([0.0, 1.0, 1e-6, 2.0, 1e30, math.nan, math.inf, -1.0])
        try:
            tilt = parse_tilt(arguments, temperature, critic)
        except RequestError as error:
            message, refused = str(error), refused + 1
            if len(message) > 2000 or not message.isprintable():
                raise AssertionError(message[:500]) from error
        else:
            assert tilt is None or (bool(tilt.lam.isfinite().all()) and tilt.temperature > 0)
    assert refused > 1000
