"""The rules of the reward: what can be imported, which settings it takes, which dimensions there are to weigh."""

import importlib
import inspect
import re
import types
from collections.abc import Mapping
from typing import Any, NoReturn, get_args, get_type_hints

from megatron_sage.config.loading import nearest
from megatron_sage.config.remote_rules import check_remote
from megatron_sage.config.schema import Config
from megatron_sage.errors import UserError


def check_reward(config: Config) -> None:
    """Raises UserError, one line, at the first rule that `config.reward` breaks; nothing heavy is loaded."""
    from megatron_sage.rewards.composite import check_weights, joined_dimensions  # which imports this package

    reward = config.reward
    if not any(reward.weights.values()):
        _refuse("reward.weights", reward.weights, "must give at least one dimension a weight other than 0")
    check_remote(config)
    if reward.url is not None:
        return  # the reward's module, its settings and models are on the server, which checks them
    found = {
        "reward.function": _checked(config, "reward.function", reward.function, "reward.settings", reward.settings)
    }
    for i, more in enumerate(reward.more):
        key = f"reward.more[{i}].function"
        found[key] = _checked(config, key, more.function, f"reward.more[{i}].settings", more.settings)
    if reward.watch is not None:
        _checked(config, "reward.watch", reward.watch, "reward.watch_settings", reward.watch_settings)
    elif reward.watch_settings:
        _refuse("reward.watch_settings", reward.watch_settings, "there is no reward.watch to give them to")
    dimensions = {key: getattr(target, "dimensions", ()) for key, target in found.items()}
    if all(isinstance(names, (tuple, list)) and names for names in dimensions.values()):
        # else an instance may decide them: build_reward looks again
        check_weights(reward.weights, joined_dimensions(dimensions))


def _checked(config: Config, key: str, function: str, settings_key: str, settings: Mapping[str, Any]) -> Any:
    """What `function` names, its settings checked against its signature and by its own `check_run`."""
    target = _imported(key, function)
    check_settings(target, function, settings_key, settings)
    check_run = getattr(target, "check_run", None)
    if check_run is not None:
        try:
            check_run(config.video, **settings)
        except UserError as error:
            raise UserError(f"{settings_key}: {error}") from error
    return target


def check_settings(target: Any, function: str, key: str, settings: Mapping[str, Any]) -> None:
    """Each setting is a parameter of the class, and none that it needs is missing."""
    if not isinstance(target, type):
        if settings:
            _refuse(key, dict(settings), f"{function} is no class, so it takes no settings; remove them")
        return
    parameters = inspect.signature(target).parameters
    names = [n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in settings.items():
        if name not in names and not free:
            match = nearest(name, names)
            known = f"choose from {', '.join(names)}" if names else "it has none"
            _refuse(f"{key}.{name}", value, f"{function} has no such setting; " + _meant(match, known))
    _check_types(target, key, settings)
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in settings and name != "device":
            raise UserError(f"{key}.{name}: is missing; {function} needs it")


def _check_types(target: Any, key: str, settings: Mapping[str, Any]) -> None:
    """Values against the class's annotations, as far as these are numbers, text, truth values or null."""
    try:
        hints = get_type_hints(target.__init__)
    except NameError:  # names that exist for a type checker only
        return
    for name, value in settings.items():
        hint = hints.get(name)
        kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
        if all(kind in plain for kind in kinds) and type(value) not in (*kinds, *([int] if float in kinds else [])):
            _refuse(f"{key}.{name}", value, f"expects {' or '.join(plain[kind] for kind in kinds)}")


def _meant(match: str | None, otherwise: str) -> str:
    return f"did you mean {match}?" if match else otherwise


def _imported(key: str, function: str) -> Any:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", function):
        _refuse(key, function, 'must be "module:name", e.g. megatron_sage.rewards.shapes:ShapesReward')
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        _refuse(key, function, f"cannot be imported: {error}; is it installed or on PYTHONPATH? See docs/rewards.md")
    if not hasattr(module, name):
        match = nearest(name, [n for n in vars(module) if not n.startswith("_")])
        _refuse(key, function, f"module {module_name} has no {name}; {_meant(match, 'check the name')}")
    return getattr(module, name)


def _refuse(key: str, value: Any, rule: str) -> NoReturn:
    raise UserError(f"{key}={value}: {rule}")
