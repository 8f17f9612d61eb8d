"""Reads settings from a YAML file and from `key=value` overrides into the typed tree, and writes them back.

OmegaConf parses the YAML (so that `1e-4` is a number, unlike in plain PyYAML, and `${other.key}` works); names and
types are checked here, because a mistyped key must be refused at every level, in one line that says where it stands.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_sage.config.schema import ALIASES, UNAVAILABLE, Config
from megatron_sage.errors import UserError

T = TypeVar("T")
COMMAND_LINE = "command line"
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def load_config(
    path: str | Path | None = None, overrides: list[str] | None = None, base: Config | None = None
) -> Config:
    """`base` (the defaults), then the YAML file, then the overrides (`sampler.num_steps=10`, `reward.weights.TA=2`).

    Raises UserError, one line, for an unknown key, a wrong type or an unreadable file. What the values may be is
    `validate`'s part.
    """
    tree = dataclasses.asdict(base or Config())
    origins: dict[str, str] = {}
    if path is not None:
        _merge(Config, tree, _read_yaml(Path(path)), "", str(path), origins)
    for override in overrides or []:
        _apply_override(tree, override, origins)
    config = bind(Config, _interpolate(tree), "", origins)
    config.output_dir = config.output_dir.replace("{name}", config.name)
    return config


def dump(config: Config) -> str:
    """The whole tree as YAML; `load_config` reads it back to an equal Config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=1_000_000)


def known_keys(cls: Any = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of every section and setting."""
    for name, annotation in get_type_hints(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(annotation):
            yield from known_keys(annotation, f"{prefix}{name}.")


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that `word` most likely stands for, letters' case ignored, or None."""
    by_lower = {choice.lower(): choice for choice in choices}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[match[0]] if match else None


def bind(cls: type[T], tree: dict[str, Any], prefix: str, origins: dict[str, str]) -> T:
    """A dataclass from a nested dict that holds every field, each value checked against its annotation."""
    values: dict[str, Any] = {}
    for name, annotation in get_type_hints(cls).items():
        key = prefix + name
        if dataclasses.is_dataclass(annotation):
            values[name] = bind(annotation, tree[name], f"{key}.", origins)  # type: ignore[arg-type]
        else:
            values[name] = _typed(tree[name], annotation, key, origins)
    return cls(**values)


def _read_yaml(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file; overrides are written key=value")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: not valid YAML: {_first_line(error.problem)}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not readable as YAML: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expects sections such as 'sampler:', found a {type(content).__name__}")
    return content


def _apply_override(tree: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} ({COMMAND_LINE}): an override is written key=value, e.g. sampler.num_steps=10")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{override} ({COMMAND_LINE}): the value is not valid YAML: {_first_line(problem)}") from error
    parts = ALIASES.get(key.strip(), key.strip()).split(".")
    if _annotation(parts) in (str, str | None) and value is not None and not isinstance(value, str):
        value = text.strip()  # name=2026 means the text, not the number
    extend = _annotation(parts) is None  # reward.weights.TA=2 adds to the mapping, reward.weights={TA: 2} replaces it
    for part in reversed(parts[1:]):
        value = {part: value}
    _merge(Config, tree, {parts[0]: value}, "", COMMAND_LINE, origins, extend)


def _annotation(parts: list[str]) -> Any:
    """The declared type of a dotted key, or None where there is no such key."""
    cls: Any = Config
    for part in parts:
        cls = get_type_hints(cls).get(part) if dataclasses.is_dataclass(cls) else None
    return cls


def _merge(
    cls: type,
    tree: dict[str, Any],
    values: dict[Any, Any],
    prefix: str,
    where: str,
    origins: dict[str, str],
    extend: bool = False,
) -> None:
    """Writes `values` over `tree`. A mapping setting is replaced, or added to where `extend`."""
    hints = get_type_hints(cls)
    seen: dict[str, str] = {}
    for given, value in values.items():
        key = ALIASES.get(f"{prefix}{given}", f"{prefix}{given}")
        name = key.removeprefix(prefix)
        if name not in hints:
            raise UserError(f"{key} ({where}): unknown key; {_suggestion(key)}")
        if name in seen:
            raise UserError(f"{prefix}{given} ({where}): the same setting as {seen[name]}; keep one of them")
        seen[name] = f"{prefix}{given}"
        annotation = hints[name]
        if dataclasses.is_dataclass(annotation):
            if value is None:  # a section whose lines are all commented out
                continue
            if not isinstance(value, dict):
                raise UserError(f"{key}={_show(value)} ({where}): is a section; set {_some_keys(key)}")
            _merge(annotation, tree[name], value, f"{key}.", where, origins, extend)  # type: ignore[arg-type]
        elif extend and isinstance(value, dict) and isinstance(tree[name], dict):
            tree[name] = {**tree[name], **value}
            origins[key] = where
        else:
            tree[name] = value
            origins[key] = where


def _interpolate(tree: dict[str, Any]) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{getattr(error, 'full_key', '') or 'configuration'}: {_first_line(error)}") from error


def _typed(value: Any, annotation: Any, key: str, origins: dict[str, str]) -> Any:
    where = f" ({origins[key]})" if key in origins else ""
    if get_origin(annotation) in (Union, types.UnionType):
        if value is None:
            return None
        annotation = next(option for option in get_args(annotation) if option is not type(None))
    if get_origin(annotation) is Literal:
        choices = list(get_args(annotation))
        for on, off in (("on", "off"), ("yes", "no")):  # YAML reads a bare on or yes as true
            if isinstance(value, bool) and {on, off} <= set(choices):
                value = on if value else off
        if value not in choices:
            problem = UNAVAILABLE.get((key, str(value)), "unknown")
            raise UserError(f"{key}={_show(value)}{where}: {problem}; {_choose(str(value), choices)}")
        return value
    if get_origin(annotation) is dict:
        free = get_args(annotation)[1] is Any
        if not isinstance(value, dict):
            example = "{checkpoint: models/VideoReward}" if free else "{VQ: 0.5, TA: 1.0}"
            raise UserError(f"{key}={_show(value)}{where}: expects a mapping such as {example}")
        if free:
            return _plain(value, key, where)
        return {str(name): _scalar(item, float, f"{key}.{name}", where) for name, item in value.items()}
    if get_origin(annotation) is list:
        kind = get_args(annotation)[0]
        if not isinstance(value, list):
            example = "[{function: module:name}]" if dataclasses.is_dataclass(kind) else "[2, 4]"
            raise UserError(f"{key}={_show(value)}{where}: expects a list such as {example}")
        read = _item if dataclasses.is_dataclass(kind) else _scalar
        return [read(item, kind, f"{key}[{i}]", where) for i, item in enumerate(value)]
    return _scalar(value, annotation, key, where)


def _item(value: Any, cls: Any, key: str, where: str) -> Any:
    """A dataclass out of a list's item, which may leave fields out."""
    hints = get_type_hints(cls)
    if not isinstance(value, dict):
        raise UserError(f"{key}={_show(value)}{where}: expects a mapping with {', '.join(hints)}")
    for name in value:
        if name not in hints:
            match = nearest(str(name), hints)
            cure = f"did you mean {match}?" if match else f"known here: {', '.join(hints)}"
            raise UserError(f"{key}.{name}{where}: unknown key; {cure}")
    return bind(cls, dataclasses.asdict(cls()) | value, f"{key}.", {})


def _plain(value: Any, key: str, where: str) -> Any:
    """What YAML can hold: a scalar, a list or a mapping; nothing else could be written to the run's config.yaml."""
    if isinstance(value, dict):
        return {str(name): _plain(item, f"{key}.{name}", where) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, f"{key}[{i}]", where) for i, item in enumerate(value)]
    if value is None:
        return None
    if type(value) not in _EXPECTED:
        raise UserError(f"{key}={_show(value)}{where}: expects a number, text, list or mapping")
    return _scalar(value, type(value), key, where)


def _scalar(value: Any, kind: type, key: str, where: str) -> Any:
    """Exactly a `kind`: no truth values for numbers, no fractions for whole numbers, no text for either."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{key}={_show(value)}{where}: expects {_EXPECTED[kind]}, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}{where}: must be finite")
    return value


def _choose(word: str, choices: list[str]) -> str:
    match = nearest(word, choices)
    return (f"did you mean {match}? " if match else "") + f"choose from {', '.join(choices)}"


def _suggestion(key: str) -> str:
    """The cure for an unknown key: a slip in this section, the same name elsewhere, a similar one, or what there is."""
    section, _, name = key.rpartition(".")
    everywhere = {known.rpartition(".")[2]: known for known in known_keys()}
    here = {known.rpartition(".")[2]: known for known in known_keys() if known.rpartition(".")[0] == section}
    match = (
        here.get(nearest(name, here, cutoff=0.8) or "")
        or everywhere.get(name)
        or here.get(nearest(name, here) or "")
        or everywhere.get(nearest(name, everywhere, cutoff=0.8) or "")
    )
    return f"did you mean {match}?" if match else f"known here: {_some_keys(section)}"


def _some_keys(section: str) -> str:
    """The settings directly under a section, or the top level's where there is no such section."""
    everything = list(known_keys())
    return ", ".join(k for k in everything if k.rpartition(".")[0] == section) or ", ".join(
        k for k in everything if "." not in k
    )


def _show(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
