"""Plain data (YAML) to frozen dataclasses and back: every key known, every value of its declared type.

Supported field types: ``bool``, ``int``, ``float``, ``str``, ``Literal``, ``X | None``, ``list[X]``, ``tuple[X, Y]``,
    ``tuple[X, ...]``,
``dict[str, X]`` and dataclasses of these. Anything else in a dataclass is a programming error and raises ``TypeError``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

# YAML 1.1, which PyYAML speaks, wants a dot in the mantissa and a sign in the exponent; people write 1e-4.
_EXPONENT_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names file or override, dotted key, value and what is allowed."""


class FieldError(ValueError):
    """A value that a dataclass refuses. ``key`` is the field's name, ``problem`` what is wrong with it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


def require(ok: bool, key: str, value: object, must: str) -> None:
    """Raise ``FieldError`` for ``key`` unless ``ok``; ``must`` completes the sentence "must be ..."."""
    if not ok:
        raise FieldError(key, f"{value!r} must be {must}")


class _StrictLoader(yaml.SafeLoader):
    """``SafeLoader`` that refuses a key given twice (YAML's own rule, which PyYAML does not hold)."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, str | int | float | bool) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds. Raises FileNotFoundError, or ConfigError for anything that is not one mapping."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {_name_of(data)}")
    return data


def apply_override(data: dict[str, Any], override: str) -> str:
    """Set ``a.b.c=value`` in nested plain data, in place; the value is YAML; returns the dotted key.

    Numbers index lists (``rewards.0.weight=2``). Missing mappings on the way are made, so that a section can be given
    whole by overrides.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write it as key=value, for example zero.optim.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    target: Any = data
    for depth, part in enumerate(parents):
        if isinstance(target, list):
            target = target[_list_index(target, part, override)]
        else:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        if not isinstance(target, dict | list):
            where = ".".join(parents[: depth + 1])
            raise ConfigError(f"override {override!r}: {where} is {target!r}, which has no keys inside")
    if isinstance(target, list):
        target[_list_index(target, last, override)] = value
    else:
        target[last] = value
    return key


def _list_index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"override {override!r}: {part!r} is not an index into a list of {len(items)}")
    return int(part)


def from_data(cls: type[T], data: object, *, source: Callable[[str], str], path: str = "") -> T:
    """An instance of the dataclass ``cls`` from a mapping.

    ``source(dotted_key)`` names where a key's value came from (a file, the command line) for error messages.
    Raises ConfigError for unknown keys (naming the nearest), missing keys, values of a wrong type, and values the
    dataclass refuses.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{_at(source, path)}expected a mapping with keys {_keys(cls)}, found {_name_of(data)}")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    for key in data:
        if key not in fields:
            raise ConfigError(
                f"{_at(source, _join(path, key))}unknown key{_nearest(str(key), fields)}; allowed here: {_keys(cls)}"
            )
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], source, _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(
                f"{_at(source, _join(path, name))}missing; this key has no default ({type_name(hints[name])})"
            )
    try:
        return cls(**values)
    except FieldError as error:
        raise ConfigError(f"{_at(source, _join(path, error.key))}{error.problem}") from error


def to_data(value: Any) -> Any:
    """The plain data (dicts, lists, scalars) of a dataclass; ``from_data`` of it gives the dataclass back."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_data(item) for item in value]
    return value


def differing_keys(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every leaf in which two plain-data trees differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in dict.fromkeys([*old, *new]):
            here = _join(path, key)
            if key not in old:
                lines.append(f"{here}: not set -> {new[key]!r}")
            elif key not in new:
                lines.append(f"{here}: {old[key]!r} -> not set")
            else:
                lines += differing_keys(old[key], new[key], here)
        return lines
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _value(hint: Any, value: Any, source: Callable[[str], str], path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_data(typing.cast(type, hint), value, source=source, path=path)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"{path}: unions other than X | None are not supported: {hint}")
        return _value(inner[0], value, source, path)
    if origin is typing.Literal:
        if value not in arguments:
            near = _nearest(str(value), arguments)
            raise ConfigError(f"{_at(source, path)}{value!r} is not allowed{near}; one of {_list(arguments)}")
        return value
    if origin in (list, tuple):
        return _sequence(hint, origin, arguments, value, source, path)
    if origin is dict:
        if not isinstance(value, Mapping) or any(not isinstance(key, str) for key in value):
            raise _wrong_type(hint, value, source, path)
        return {key: _value(arguments[1], item, source, _join(path, key)) for key, item in value.items()}
    return _scalar(hint, value, source, path)


def _sequence(hint: Any, origin: Any, arguments: Any, value: Any, source: Callable[[str], str], path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong_type(hint, value, source, path)
    if origin is list or arguments[-1] is Ellipsis:
        kinds = [arguments[0]] * len(value)
    else:
        kinds = list(arguments)
    if len(kinds) != len(value):
        raise _wrong_type(hint, value, source, path)
    return origin(
        _value(kind, item, source, _join(path, index))
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _scalar(hint: Any, value: Any, source: Callable[[str], str], path: str) -> Any:
    if hint is float:
        if isinstance(value, str) and _EXPONENT_FLOAT.fullmatch(value):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ConfigError(f"{_at(source, path)}{value!r} is not a finite number")
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint in (bool, str):
        if isinstance(value, hint):
            return value
    else:
        raise TypeError(f"{path}: fields of type {hint} are not supported")
    raise _wrong_type(hint, value, source, path)


def _wrong_type(hint: Any, value: object, source: Callable[[str], str], path: str) -> ConfigError:
    return ConfigError(f"{_at(source, path)}{value!r} is {_name_of(value)}, expected {type_name(hint)}")


def type_name(hint: Any) -> str:
    """A field type in words for error messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    if hint in plain:
        return plain[hint]
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is typing.Literal:
        return f"one of {_list(arguments)}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} ({', '.join(type_name(argument) for argument in arguments)})"
    if origin in (list, tuple):
        return f"a list, each item {type_name(arguments[0])}"
    if origin is dict:
        return f"a mapping from text, each value {type_name(arguments[1])}"
    return f"a mapping with keys {_keys(hint)}" if dataclasses.is_dataclass(hint) else str(hint)


def _name_of(value: object) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _at(source: Callable[[str], str], path: str) -> str:
    return f"{source(path)}: {path}: " if path else f"{source(path)}: "


def _keys(cls: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _list(items: typing.Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)


def _nearest(key: str, known: typing.Iterable[object]) -> str:
    found = difflib.get_close_matches(key, [str(item) for item in known], n=1, cutoff=0.5)
    return f", did you mean {found[0]!r}?" if found else ""
