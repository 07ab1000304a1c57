"""Build a `Config` from a TOML file and `section.key=value` overrides.

Overrides are merged into the raw table and the tree is validated once, so no object ever sees
half of them. Nothing is coerced except int -> float, and every problem is reported together.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nemomodel.config.checks import model_problems, problems
from nemomodel.config.schema import Config, ModelConfig

_WANTED = {
    "greater_than": "a value above {gt}",
    "greater_than_equal": "a value of at least {ge}",
    "less_than": "a value below {lt}",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "tuple_type": "a list",
    "dataclass_type": "a section of keys",
}
"""What a value should be, by pydantic's error type; other types word it well themselves."""


class ConfigError(ValueError):
    """A config file or override is wrong. The message lists every problem found."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `overrides` in order, check everything.

    The word `none` (an override `key=none`, in TOML `key = "none"`) leaves an optional key unset.

    Raises:
        ConfigError: with one line per problem.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        _merge(raw, override)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], *, where: str) -> Config:
    """Build a `Config` from plain data, e.g. that of `config_to_dict`.

    Raises:
        ConfigError: with one line per problem, headed by `where`.
    """
    return _parse(Config, raw, where, problems)


def parse_model(raw: dict[str, Any], *, where: str) -> ModelConfig:
    """Build the model section alone, e.g. that of a checkpoint.

    Raises:
        ConfigError: with one line per problem, headed by `where`.
    """
    root = _parse(_ModelAlone, {"model": raw}, where, lambda root: model_problems(root.model))
    return root.model


@dataclass(frozen=True, kw_only=True)
class _ModelAlone:
    """Gives the keys of a model their prefix."""

    model: ModelConfig


def _parse[T](
    cls: type[T], raw: dict[str, Any], where: str, check: Callable[[T], Iterable[str]]
) -> T:
    try:
        # JSON mode is what makes strict accept an array for a tuple field.
        config = TypeAdapter(cls).validate_json(
            json.dumps(_none(raw), default=str), strict=True, extra="forbid"
        )
    except ValidationError as error:
        found = [_explain(e) for e in error.errors(include_url=False)]
    else:
        found = list(check(config))
        if not found:
            return config
    count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
    raise ConfigError("\n  ".join([f"{where}: {count}", *found]))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain data that `parse_config` turns back into an equal `Config`."""
    return dataclasses.asdict(config)


def _merge(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    *sections, name = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {override!r}: {section!r} is not a section")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": value}  # a bare word is a string: precision.recipe=fp32
    if len(parsed) > 1:
        raise ConfigError(f"override {override!r}: expected one key; give each its own argument")
    raw[name] = parsed["value"]


def _none(value: Any) -> Any:
    if value == "none":
        return None
    if isinstance(value, dict):
        return {key: _none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_none(item) for item in value]
    return value


def _explain(error: Any) -> str:
    location = tuple(error["loc"])
    where = ".".join(map(str, location))
    if error["type"] == "unexpected_keyword_argument":
        *sections, name = location
        known = [f.name for f in dataclasses.fields(_section(Config, tuple(sections)))]
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: required, and not given"
    value = "none" if error["input"] is None else json.dumps(error["input"])
    if wanted := _WANTED.get(error["type"]):
        wanted = wanted.format(**error.get("ctx", {}))
    else:
        wanted = error["msg"].removeprefix("Input should be ")
    return f"{where}={value}: is not allowed; use {wanted}"


def _section(cls: type, path: tuple[str | int, ...]) -> type:
    """The dataclass that the key `path` below `cls` holds."""
    for name in path:
        if isinstance(name, int):
            continue
        hint = typing.get_type_hints(cls)[name]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
        if typing.get_origin(hint) is tuple:
            hint = typing.get_args(hint)[0]
        cls = hint
    return cls
