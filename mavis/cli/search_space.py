"""The space that `mavis search` samples from: Hydra's grammar of sweeps as Optuna's distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mavis.errors import ConfigError

_GRAMMAR = "write e.g. beta='interval(1.0,8.0)', improvement.iterations='range(1,5)' or critic.hidden=64,128."


def search_space(
    arguments: Sequence[str], defaults: Mapping[str, str]
) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """Split overrides into those that are searched and those that are fixed.

        interval(1, 8)        any number between
        int(interval(1, 8))   any whole number between, both ends included
        tag(log, interval(1, 8)), int(tag(log, interval(1, 8)))   on a logarithmic scale
        range(1, 5)           1, 2, 3 or 4
        64,128                one of these

    Args:
        arguments: overrides, with one value or several.
        defaults: the distributions of settings that no argument names, as the text after `=`.

    Returns:
        The fixed overrides as given; the distributions by setting; and the text that each was parsed from.

    Raises:
        ConfigError: if nothing is searched, or a distribution is impossible.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    given = parser.parse_overrides(list(arguments))
    try:
        default = parser.parse_overrides([f"{name}={text}" for name, text in defaults.items()])
    except HydraException as error:
        raise ConfigError(f"search.space cannot be parsed: {' '.join(str(error).split())}", _GRAMMAR) from error
    given_names = {override.key_or_group for override in given}
    fixed, space, texts = [], {}, {}
    for override in [*given, *(one for one in default if one.key_or_group not in given_names)]:
        if override.is_sweep_override():
            name = override.get_key_element()
            texts[name] = override.get_value_string()
            space[name] = _distribution(override)
        elif override.key_or_group in given_names:
            fixed.append(str(override.input_line))
        else:
            raise ConfigError(f"search.space has a single value for {override.key_or_group}.", _GRAMMAR)
    if not space:
        raise ConfigError("there is nothing to search: every setting has a single value.", _GRAMMAR)
    return fixed, space, texts


def current_settings(config: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values that a config has for the searched settings: the trial that all others are compared with.

    Args:
        config: including Hydra's own node.
        space: distributions by setting.

    Returns:
        Values by setting, without those that lie outside of their distribution.
    """
    from omegaconf import OmegaConf

    options: Mapping[str, Any] = config.hydra.runtime.choices
    found = {}
    for name, distribution in space.items():
        value = options[name] if name in options else OmegaConf.select(config, name.lstrip("+"))
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        value = _member(value, distribution)
        if value is not None:
            found[name] = value
    return found


def _member(value: Any, distribution: Any) -> Any:
    """Return a value as a distribution spells it; None if it lies outside."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        # A choice is text in Hydra's grammar, where null, true and 1e-3 stand for None, True and 0.001.
        parser = OverridesParser.create()
        equal = (one for one in distribution.choices if parser.parse_override(f"_={one}").value() == value)
        return next(equal, None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    is_inside = distribution.low <= value <= distribution.high
    is_on_grid = not distribution.step or (value - distribution.low) % distribution.step == 0
    return value if is_inside and is_on_grid else None


def _distribution(override: Any) -> Any:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from hydra.errors import HydraException
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            is_whole = isinstance(value.start, int) and isinstance(value.end, int)
            kind = IntDistribution if is_whole else FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        if isinstance(value, RangeSweep) and isinstance(numbers := value.range(), range) and len(numbers) > 0:
            return IntDistribution(min(numbers), max(numbers), step=abs(numbers.step))
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, HydraException) as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"{override.input_line!r} cannot be searched: {text}.", _GRAMMAR) from error
