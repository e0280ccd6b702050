"""Settings of an evaluation: what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mavis.errors import ConfigError
from mavis.evaluation import EvaluationSettings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": ()}, r"betas is \[\]"),
        ({"betas": (1.0, 0.0)}, r"betas is \[1.0, 0.0\], expected numbers > 0"),
        ({"betas": (1.0, float("nan"))}, "betas is"),
        ({"betas": (float("inf"),)}, "betas is"),
        ({"target_kls": (0.0,)}, "target_kls is"),
        ({"target_kls": (float("nan"),)}, "target_kls is"),
        ({"samples": 0}, "samples is 0"),
        ({"reference_samples": 1}, "reference_samples is 1"),
        ({"speed_batch": 0}, "speed_batch is 0"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationSettings(**change)
