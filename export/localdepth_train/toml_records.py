"""Frozen dataclasses from TOML tables: no unknown key, none missing that has no default, every value of its type."""

import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from types import GenericAlias, NoneType, UnionType
from typing import Any, TypeVar

from localdepth.errors import ConfigError, DepthError, TrainError

__all__ = ["parse"]

T = TypeVar("T")
_INDEX = re.compile(r"\[\d+\]")


def parse(kind: type[T], text: str, name: str) -> T:
    """The dataclass ``kind`` from the TOML ``text`` of the file ``name``.

    Fields may be plain values, enums of strings, other dataclasses, ``tuple[item, ...]`` of those, and ``| None``.
    Raises:
        TrainError: for text that is no TOML, unknown or missing keys, wrong types or values.
    """
    try:
        return _record(kind, tomllib.loads(text), "")
    except tomllib.TOMLDecodeError as error:
        raise TrainError(f"{name} is not valid TOML: {error}") from error
    except (ConfigError, DepthError, TrainError) as error:
        raise TrainError(f"{name}: {error}") from error


def _record(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]  # every kind here is a dataclass
    if unknown := sorted(set(table) - set(known)):
        raise TrainError(f"unknown key {where}{unknown[0]}; known here are {', '.join(known)}")
    needed = (k for k, item in known.items() if item.default is MISSING and item.default_factory is MISSING)
    if missing := [key for key in needed if key not in table]:
        raise TrainError(f"missing key {where}{missing[0]}")
    return kind(**{key: _value(known[key].type, value, f"{where}{key}") for key, value in table.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, UnionType):  # X | None, where None is the absent key
        (kind,) = (one for one in kind.__args__ if one is not NoneType)
    if isinstance(kind, GenericAlias):  # tuple[item, ...]
        if isinstance(value, dict) and is_dataclass(kind.__args__[0]):
            table = _INDEX.sub("", where)
            raise TrainError(f"[{table}] may stand several times; write it with double brackets, [[{table}]]")
        if not isinstance(value, list):
            raise TrainError(f"{where}={value!r} must be a list")
        return tuple(_value(kind.__args__[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise TrainError(f"{where}={value!r} must be a table")
        return _record(kind, value, f"{where}.")  # type: ignore[arg-type]  # a class, not an instance
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise TrainError(f"{where}={value!r} is not one of {', '.join(kind)}")
        return kind(value)
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise TrainError(f"{where}={value!r} must be of type {kind.__name__}")
    if kind is float and not abs(value) <= sys.float_info.max:  # nor NaN
        raise TrainError(f"{where}={value!r:.40} must be a finite number")
    return kind(value)
