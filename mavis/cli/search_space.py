"""What `mavis search` may change, and within which bounds: Hydra's grammar of sweeps as distributions of optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mavis.errors import ConfigError


def search_space(
    arguments: Sequence[str], defaults: Mapping[str, str]
) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """Tell what is searched from what is fixed.

        interval(1, 8)        any number between
        int(interval(1, 8))   any whole number between, both ends included
        tag(log, interval(1, 8)), int(tag(log, interval(1, 8)))   on a logarithmic scale
        range(1, 5)           1, 2, 3 or 4
        64,128                one of these

    Args:
        arguments: overrides, those with several values among them.
        defaults: what is searched where no argument names the setting: the text after `=`, by setting.

    Returns:
        The overrides that are fixed, as they were given; the distributions by setting; and what they were made of.

    Raises:
        ConfigError: if there is nothing to search, or a distribution is impossible.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    given = parser.parse_overrides(list(arguments))
    try:
        added = parser.parse_overrides([f"{name}={text}" for name, text in defaults.items()])
    except HydraException as error:
        raise ConfigError(f"search.space cannot be read: {' '.join(str(error).split())}", _GRAMMAR) from error
    named = {override.key_or_group for override in given}
    fixed, space, texts = [], {}, {}
    for override in [*given, *(one for one in added if one.key_or_group not in named)]:
        if override.is_sweep_override():
            name = override.get_key_element()
            texts[name] = override.get_value_string()
            space[name] = _distribution(override)
        elif override.key_or_group in named:
            fixed.append(str(override.input_line))
        else:
            raise ConfigError(f"search.space has one value of {override.key_or_group}.", _GRAMMAR)
    if not space:
        raise ConfigError("there is nothing to search: every setting has one value.", _GRAMMAR)
    return fixed, space, texts


_GRAMMAR = "write e.g. beta='interval(1.0,8.0)', improvement.iterations='range(1,5)' or critic.hidden=64,128."


def _distribution(override: Any) -> Any:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from hydra.errors import HydraException
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            kind = IntDistribution if whole else FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        if isinstance(value, RangeSweep) and isinstance(numbers := value.range(), range) and len(numbers) > 0:
            return IntDistribution(min(numbers), max(numbers), step=abs(numbers.step))
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, HydraException) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"{override.input_line!r} cannot be searched: {said}.", _GRAMMAR) from error


def as_it_is(config: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings of a config that lie within a space, for the trial that others are compared with.

    Args:
        config: with Hydra's own part.
        space: distributions by setting.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf
    from optuna.distributions import CategoricalDistribution

    parser = OverridesParser.create()
    chosen: Mapping[str, Any] = config.hydra.runtime.choices
    found = {}
    for name, distribution in space.items():
        value = chosen[name] if name in chosen else OmegaConf.select(config, name.lstrip("+"))
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if isinstance(distribution, CategoricalDistribution):
            # A choice is text in Hydra's grammar, in which null, true and 1e-3 are what None, True and 0.001 are here.
            same = (one for one in distribution.choices if parser.parse_override(f"_={one}").value() == value)
            value = next(same, None)
            inside = value is not None
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            inside = number and distribution.low <= value <= distribution.high
            inside = inside and (not distribution.step or (value - distribution.low) % distribution.step == 0)
        if inside:
            found[name] = value
    return found
