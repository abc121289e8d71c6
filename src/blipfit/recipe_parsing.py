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
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
MAX_NAME_BYTES = 200
"""File systems allow 255 bytes, and temporary folders have longer names."""


MAX_BYTES = 100_000
"""Size of the largest recipe that is read; a whole recipe has 2 kB."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"aliases (*{event.anchor:.40}) are not supported; write the value itself", event.start_mark
            )
        return super().compose_node(parent, index)


def _construct_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    value: int = loader.construct_yaml_int(node)  # type: ignore[no-untyped-call]
    if abs(value) >= 2**63:
        raise yaml.constructor.ConstructorError(None, None, "a number has too many digits", node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_integer)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError, with the reason on one line, if it is not one."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} characters, more than the limit of {MAX_BYTES:,}")
    try:
        return _Loader(text).get_single_data()  # type: ignore[no-untyped-call]
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{error.problem or error.context:.200}{line}") from None
    except Exception as error:  # values with a tag or a date that does not exist raise errors of many classes
        raise ValueError(f"{' '.join(str(error).split()) or type(error).__name__:.300}") from None


def parse_value(assignment: str, text: str) -> Any:
    """The value of an assignment, `text` after its equals sign. Raises UserError if it is not YAML."""
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"--set {assignment:.100}: {text!r:.100} is not a YAML value ({error})") from None
    if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(text.strip()):
        return float(value)
    return value


def assign(values: dict[str, Any], root: type[BaseModel], path: str, value: Any) -> None:
    """Set a field of a recipe's values. Raises UserError if `root` has no field with this path (`section.field`)."""
    keys = path.split(".")
    section = values
    for depth, key in enumerate(keys):
        if key not in section:
            raise UserError(f"--set {path:.100}: {_unknown_key(key, keys[:depth], root)}")
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
    value = "" if is_about_section else f" (got {error['input']!r:.100})"
    return f"{field}: {message[:1].lower()}{message[1:]}{value}" if field else message


def require_whole_characters(path: str, value: Any) -> None:
    """Raise ValueError if the value of a field is a text with half a character, which no file of a run can hold."""
    if isinstance(value, str) and _HALF_CHARACTER.search(value):
        raise ValueError(f"{path} is {value!r:.100}, and half a character cannot be written; rename it in UTF-8")


def require_folder_name(name: str) -> None:
    """Raise ValueError if an experiment cannot have this name, because its folder cannot."""
    # Not printable: zero bytes, line ends, half characters.
    if not name or name.startswith(".") or not name.isprintable() or any(c in name for c in "/\\"):
        raise ValueError(f"experiment {name!r:.100} cannot name a folder")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"experiment {name[:40]!r}… has {len(name)} characters, too many for the name of a folder")


def _unknown_key(key: str, path: Sequence[str | int], root: type[BaseModel]) -> str:
    known = _fields_of(path, root)
    near = difflib.get_close_matches(key[:100], known, n=1)
    name = ".".join(map(str, path))
    section = f" in {name}" if name else ""
    return f"unknown key {key!r:.100}{section}; " + (
        f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    )


def _fields_of(path: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    """Field names of the section at `path`, or of the last section on the way if the path goes no further."""
    section = root
    for key in path:
        annotation = section.model_fields[str(key)].annotation if str(key) in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        section = annotation
    return list(section.model_fields)
