"""The text of `train.py --help`: every config key with type, default and documentation.

Types and defaults come from the dataclasses of `schema.py`, the documentation from the string
under each field, which Python itself does not keep: it is read from the source.
"""

import ast
import dataclasses
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Lt

from nemomodel.config import schema

_WIDTH = 96

_HEAD = """\
Every key of the config file, as section.key. On the command line a key is overridden with
section.key=value, for example train.steps=100, precision.recipe=fp32 or
train.recompute='["moe"]'; key=none leaves an optional key or section unset."""

_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def help_text() -> str:
    """All sections and keys, wrapped for a terminal of 100 columns."""
    docs = documentation()
    lines = [_HEAD]
    for section, cls, optional in _sections(schema.Config, ""):
        lines += ["", f"[{section}]" + ("  (optional section)" if optional else "")]
        lines += _wrap(docs[cls.__name__][""], indent=2)
        for key, owner, field in _keys(section, cls):
            lines += _wrap(f"{key}: {_describe(owner, field)}", indent=2)
            lines += _wrap(docs[owner.__name__].get(field.name, ""), indent=6)
    return "\n".join(lines) + "\n"


def documentation() -> dict[str, dict[str, str]]:
    """Class name -> field name -> the string under that field; "" -> the class docstring."""
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    docs = {}
    for cls in tree.body:
        if not isinstance(cls, ast.ClassDef):
            continue
        docs[cls.name] = {"": ast.get_docstring(cls) or ""}
        for field, below in zip(cls.body, cls.body[1:], strict=False):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[cls.name][name] = " ".join(text.split())
    return docs


def undocumented() -> list[str]:
    """Dotted keys without a string under them in `schema.py`."""
    docs = documentation()
    return [
        key
        for section, cls, _ in _sections(schema.Config, "")
        for key, owner, field in _keys(section, cls)
        if not docs[owner.__name__].get(field.name)
    ]


def _sections(cls: type, prefix: str) -> list[tuple[str, type, bool]]:
    """(dotted key, dataclass, whether it may be left out) of every section below `cls`."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        inner, optional = _without_none(hint)
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            key = f"{prefix}{name}"
            found += [(key, inner, optional), *_sections(inner, f"{key}.")]
    return found


def _keys(prefix: str, cls: type) -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    """(dotted key, its dataclass, its field) of the keys of one section, sections excluded.

    A list of tables is followed by the keys of one table, as `data.train[].path`.
    """
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, _ = _without_none(hints[field.name])
        if dataclasses.is_dataclass(hint):
            continue
        key = f"{prefix}.{field.name}"
        yield key, cls, field
        if typing.get_origin(hint) is tuple:
            item = typing.get_args(hint)[0]
            if dataclasses.is_dataclass(item):
                assert isinstance(item, type)
                yield from _keys(f"{key}[]", item)


def _describe(owner: type, field: dataclasses.Field[Any]) -> str:
    """Type and default in words."""
    hint = typing.get_type_hints(owner, include_extras=True)[field.name]
    if field.default is dataclasses.MISSING:
        return f"{_type(hint)}; required"
    default = "none" if field.default is None else json.dumps(field.default)
    return f"{_type(hint)}; default {default}"


def _type(hint: Any) -> str:
    """A type in words: `Annotated[int, Gt(0)] | None` is "whole number above 0, or none"."""
    hint, optional = _without_none(hint)
    if optional:
        return f"{_type(hint)}, or none"
    if typing.get_origin(hint) is typing.Annotated:
        base, *limits = typing.get_args(hint)
        return " ".join([_type(base), *filter(None, map(_limit, limits))])
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return "tables"
    return _NAMES[hint]


def _limit(limit: object) -> str:
    match limit:
        case Gt(gt=bound):
            return f"above {bound}"
        case Ge(ge=bound):
            return f"of at least {bound}"
        case Lt(lt=bound):
            return f"and below {bound}"
    return ""


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`T | None` -> (T, True); any other T -> (T, False)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        arms = [arm for arm in typing.get_args(hint) if arm is not types.NoneType]
        return arms[0], True
    return hint, False


def _wrap(text: str, *, indent: int) -> list[str]:
    pad = " " * indent
    return textwrap.wrap(
        text, _WIDTH, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False
    )
