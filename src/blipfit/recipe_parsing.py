"""Text to values of a recipe: `--set` assignments, and validation errors explained in one sentence."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from blipfit.errors import UserError

_EXPONENT_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""Numbers such as 1e-4, which YAML 1.1 reads as text."""


def parse_value(assignment: str, text: str) -> Any:
    """The value of an assignment, `text` after its equals sign. Raises UserError if it is not YAML."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {assignment}: {text!r} is not a YAML value") from None
    if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(text.strip()):
        return float(value)
    return value


def assign(values: dict[str, Any], root: type[BaseModel], path: str, value: Any) -> None:
    """Set a field of a recipe's values. Raises UserError if `root` has no field with this path (`section.field`)."""
    keys = path.split(".")
    section = values
    for depth, key in enumerate(keys):
        if key not in section:
            raise UserError(f"--set {path}: {_unknown_key(key, keys[:depth], root)}")
        if depth == len(keys) - 1:
            if isinstance(section[key], dict):
                raise UserError(f"--set {path}: {path} is a section; set one of its fields: {', '.join(section[key])}")
            section[key] = value
        elif not isinstance(section[key], dict):
            raise UserError(f"--set {path}: {'.'.join(keys[: depth + 1])} has no fields")
        else:
            section = section[key]


def explain(error: Any, root: type[BaseModel]) -> str:
    """One entry of pydantic's `ValidationError.errors()` as a sentence that names the field."""
    location = error["loc"]
    if error["type"] == "extra_forbidden":
        return _unknown_key(str(location[-1]), location[:-1], root)
    # If a field has several types, pydantic adds the type to the path; a user knows no such key.
    field = ".".join(str(key) for key in location if not str(key).startswith(("literal[", "tuple[")))
    message = error["msg"].removeprefix("Value error, ")
    # A sentence about several fields of a section names them; printing the whole section would hide it.
    is_about_section = error["type"] == "value_error" and isinstance(error["input"], Mapping)
    value = "" if is_about_section else f" (got {error['input']!r})"
    return f"{field}: {message[:1].lower()}{message[1:]}{value}" if field else message


def _unknown_key(key: str, path: Sequence[str | int], root: type[BaseModel]) -> str:
    known = _fields_of(path, root)
    near = difflib.get_close_matches(key, known, n=1)
    name = ".".join(map(str, path))
    section = f" in {name}" if name else ""
    return f"unknown key {key!r}{section}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def _fields_of(path: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    """Field names of the section with this path."""
    section = root
    for key in path:
        annotation = section.model_fields[str(key)].annotation if str(key) in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        section = annotation
    return list(section.model_fields)
