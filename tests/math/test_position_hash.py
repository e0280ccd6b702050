"""Multipliers by position, against SplitMix64 in whole numbers of Python."""

from __future__ import annotations

import torch

from mavis.math.position_hash import position_multipliers

WORD = (1 << 64) - 1


def split_mix(state: int) -> int:
    """One output of SplitMix64, with the arithmetic right shifts that torch has for signed numbers."""

    def signed(number: int) -> int:
        number &= WORD
        return number - (1 << 64) if number >> 63 else number

    mixed = signed(state * 0x9E3779B97F4A7C15)
    mixed = signed((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9)
    mixed = signed((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB)
    return signed(mixed ^ (mixed >> 31))


def test_each_position_has_the_output_of_its_state_made_odd() -> None:
    positions = torch.tensor([[0, 1, 2], [1000, -1, 2**40]])
    expected = [[split_mix(position + 2) | 1 for position in row] for row in positions.tolist()]
    assert position_multipliers(positions).tolist() == expected


def test_multipliers_are_odd_positive_and_differ() -> None:
    multipliers = position_multipliers(torch.arange(10_000))
    assert bool((multipliers % 2 == 1).all())
    assert bool((multipliers > 0).all())
    assert len(multipliers.unique()) == 10_000


def test_every_bit_but_the_outermost_is_set_in_about_half_of_the_positions() -> None:
    multipliers = position_multipliers(torch.arange(10_000))
    for bit in range(1, 63):
        assert 4_700 < int(((multipliers >> bit) & 1).sum()) < 5_300  # six standard deviations
