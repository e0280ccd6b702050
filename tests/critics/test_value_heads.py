"""Value heads compute the same as separate networks, and are scaled and shifted by λ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.critics.value_heads import ValueHeads


def heads(conditions: int = 0) -> ValueHeads:
    torch.manual_seed(0)
    made = ValueHeads(5, 3, hidden=4, rank=2, conditions=conditions)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def by_hand(made: ValueHeads, inputs: Tensor, lam: Tensor | None) -> Tensor:
    """Compute each head of each row separately: (B, O, r + 1)."""
    rows = []
    for b, row in enumerate(inputs):
        outputs = []
        for o in range(3):
            mine = slice(4 * o, 4 * o + 4)
            inner = row @ made.inner[:, mine] + made.inner_bias[mine]
            if made.condition is not None:
                assert lam is not None
                size = lam[b].abs().sum()
                phi = torch.cat([lam[b] / (1 + size), (1 + size).log()[None]])
                scale, shift = (phi @ made.condition).chunk(2)
                inner = (1 + scale[mine]) * inner + shift[mine]
            outputs.append(F.silu(inner) @ made.outer[o] + made.bias[o])
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("conditions", [0, 2])
def test_heads_are_independent_networks(conditions: int) -> None:
    made, inputs, lam = heads(conditions), torch.randn(6, 5), torch.randn(6, 2)
    torch.testing.assert_close(made(inputs, lam), by_hand(made, inputs, lam), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conditions", [0, 2])
def test_weighted_sum_equals_the_sum_of_weighted_heads(conditions: int) -> None:
    made, inputs, lam, coefficients = heads(conditions), torch.randn(6, 5), torch.randn(6, 2), torch.randn(6, 3)
    expected = torch.einsum("bor,bo->br", made(inputs, lam), coefficients)
    torch.testing.assert_close(made.weighted_sum(inputs, coefficients, lam), expected, atol=1e-4, rtol=1e-5)


def test_lambda_broadcasts_over_a_response() -> None:
    made, inputs, lam = heads(2), torch.randn(6, 7, 5), torch.randn(6, 2)
    together = made(inputs, lam[:, None])
    for step in range(7):
        torch.testing.assert_close(together[:, step], made(inputs[:, step], lam), atol=1e-5, rtol=1e-5)


def test_at_lambda_zero_conditioning_has_no_effect() -> None:
    conditioned, plain = heads(2), heads()
    plain.load_state_dict({name: tensor for name, tensor in conditioned.state_dict().items() if name != "condition"})
    inputs = torch.randn(6, 5)
    torch.testing.assert_close(conditioned(inputs, torch.zeros(6, 2)), plain(inputs))


def test_new_heads_predict_zero_at_any_lambda() -> None:
    made = ValueHeads(5, 3, hidden=4, rank=2, conditions=2)
    assert (made(torch.randn(6, 5), torch.randn(6, 2)) == 0).all()
