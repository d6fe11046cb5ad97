"""Configuration: frozen models, unknown keys refused, YAML plus `--set a.b=c`.

A config class lives beside its owner and gives each field a docstring, which becomes the
command line's help. "auto" is a value that `resolve` steps of the owners replace by a new
config; `resolved_values` lists what changed, so that each derived number is printed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from minigpt.core.errors import ConfigError

Auto = Literal["auto"]


class Config(BaseModel):
    """Base of all configuration: immutable, strict about keys, documented by field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes` applied and validated."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return from_mapping(type(self), values | changes)


C = TypeVar("C", bound=Config)


def load_config(cls: type[C], path: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply `a.b=c` overrides and validate.

    Args:
        cls: The config class to build.
        path: A YAML file, or None to start from the defaults.
        overrides: Assignments such as `optimizer.lr=3e-4`; the value is read as YAML.

    Raises:
        ConfigError: The file is missing or no YAML mapping, a key is unknown or a value breaks
            its rule. The message names the key, the value and the nearest known key.
    """
    tree: dict[str, Any] = {}
    origin = "defaults"
    if path is not None:
        origin = str(path)
        tree = read_yaml_mapping(Path(path))
    for assignment in overrides:
        _apply_override(tree, assignment)
    return from_mapping(cls, tree, origin=origin)


def from_mapping(cls: type[C], tree: Mapping[str, Any], *, origin: str = "") -> C:
    """Validate a mapping into `cls`, turning pydantic's report into one line.

    Raises:
        ConfigError: As `load_config`.
    """
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        where = f"{origin}: " if origin else ""
        problems = list(dict.fromkeys(_describe(cls, error)))
        raise ConfigError(where + "; ".join(problems)) from None


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping.

    Raises:
        ConfigError: No such file, malformed YAML, or another type at the top.
    """
    import yaml  # on demand: a run that loads no file needs pydantic alone

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such config file: {path}", remedy="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read config file {path}: {error}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {line}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not a mapping of keys to values")
    return tree


def to_yaml(config: Config) -> str:
    """Render a config as YAML that `load_config` reads back to an equal config."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def resolved_values(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
    """List `(dotted key, old, new)` for each leaf in which two configs of a class differ."""
    old, new = dict(_leaves(before.model_dump())), dict(_leaves(after.model_dump()))
    return [(key, old.get(key), value) for key, value in new.items() if old.get(key) != value]


def field_help(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield `(dotted key, type, default, description)` for each leaf field, for `--help`."""
    for name, info in cls.model_fields.items():
        nested = _nested_config(info.annotation)
        if nested is not None:
            yield from field_help(nested, f"{prefix}{name}.")
            continue
        default = "required"
        if not info.is_required():
            default = repr(info.get_default(call_default_factory=True, validated_data={}))
        yield f"{prefix}{name}", _type_name(info.annotation), default, info.description or ""


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _apply_override(tree: dict[str, Any], assignment: str) -> None:
    import yaml

    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"--set {assignment!r} is not an assignment",
            remedy="write it as --set section.key=value",
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {assignment!r}: the value is not valid YAML") from None
    *sections, leaf = key.split(".")
    for section in sections:
        child = tree.get(section)
        tree[section] = child = dict(child) if isinstance(child, dict) else {}
        tree = child
    tree[leaf] = value


def _describe(cls: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """Turn pydantic's errors into `key = value: rule` phrases, a union's branches joined."""
    rules: dict[tuple[str, ...], list[str]] = {}
    values: dict[tuple[str, ...], Any] = {}
    for item in error.errors(include_url=False):
        key = _key_path(cls, item["loc"])
        if item["type"] == "extra_forbidden":
            yield _unknown_key(cls, key)
            continue
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        rules.setdefault(key, []).append(message)
        values[key] = item["input"]
    for key, messages in rules.items():
        dotted = ".".join(key)
        if messages == ["Field required"]:
            yield f"{dotted} is required (give it in the file or with --set {dotted}=...)"
        elif key:
            yield f"{dotted} = {values[key]!r}: must be {', or '.join(dict.fromkeys(messages))}"
        else:
            yield "; ".join(messages)


def _key_path(cls: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """Drop the union-branch names that pydantic mixes into an error's location."""
    path: list[str] = []
    current: type[BaseModel] | None = cls
    entry: type[BaseModel] | None = None
    for part in loc:
        if isinstance(part, int):
            path.append(str(part))
            current, entry = entry or current, None
        elif current is not None and part in current.model_fields:
            path.append(part)
            annotation = current.model_fields[part].annotation
            current, entry = _nested_config(annotation), _entry_config(annotation)
        elif entry is not None:
            path.append(part)
            current, entry = entry, None
        elif current is not None and part != current.__name__:
            path.append(part)
            current = None
    return tuple(path)


def _unknown_key(cls: type[BaseModel], key: tuple[str, ...]) -> str:
    owner: type[BaseModel] = cls
    for part in key[:-1]:
        info = owner.model_fields.get(part)
        if info is not None:
            owner = _nested_config(info.annotation) or _entry_config(info.annotation) or owner
    known = sorted(owner.model_fields)
    nearest = difflib.get_close_matches(key[-1] if key else "", known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"unknown key {'.'.join(key)!r}: {hint}"


def _nested_config(annotation: Any) -> type[Config] | None:
    candidates = get_args(annotation) if _is_union(annotation) else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def _entry_config(annotation: Any) -> type[Config] | None:
    """Return the config class of a `dict[str, SomeConfig]` or `tuple[SomeConfig, ...]`."""
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return _nested_config(arguments[1])
    return _nested_config(arguments[0]) if get_origin(annotation) is tuple else None


def _type_name(annotation: Any) -> str:
    if _is_union(annotation):
        return " | ".join(_type_name(arg) for arg in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " | ".join(repr(arg) for arg in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation))


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)
