"""The rules of a reward on a server; what the server itself says is checked when it is asked (rewards/remote.py)."""

import re
from typing import Any, NoReturn
from urllib.parse import urlsplit

from megatron_sage.config.schema import Config
from megatron_sage.errors import UserError

COLLECTIVE_SECONDS = 1800.0  # other ranks wait as long in a collective (engine.collective_timeout)


def check_remote(config: Config) -> None:
    """Raises UserError, one line, at the first rule that `reward.url` and what belongs to it break."""
    from megatron_sage.rewards.remote import patience

    reward = config.reward
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", reward.token_env):
        _refuse("reward.token_env", reward.token_env, "must name an environment variable; the token itself stays there")
    if reward.url is None:
        if reward.overlap_groups is not None:
            rule = "needs reward.url: a reward on the run's own ranks cannot score while they denoise"
            _refuse("reward.overlap_groups", reward.overlap_groups, rule)
        return
    _check_url(reward.url)
    limit, longest = config.training.stall_seconds or COLLECTIVE_SECONDS, patience(reward)
    if longest >= limit:
        rule = (
            f"with reward.retries={reward.retries} a server that is gone is waited for {longest:.0f} s, which must be "
            f"less than training.stall_seconds ({limit:g}), or the run ends as stalled; use a shorter time"
        )
        _refuse("reward.timeout_seconds", reward.timeout_seconds, rule)


def _check_url(url: str) -> None:
    example = "must be http://HOST:PORT or https://HOST:PORT of a `megatron-sage serve-rewards`"
    try:
        parts = urlsplit(url)
        port = parts.port  # raises ValueError where it is no number
    except ValueError as error:
        _refuse("reward.url", url, f"{example} ({error})")
    if parts.username is not None or parts.password is not None:
        raise UserError("reward.url: must not hold a password; the token comes from the environment (reward.token_env)")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        _refuse("reward.url", url, example)
    if parts.query or parts.fragment or re.search(r"\s", url):
        _refuse("reward.url", url, f"{example}, without blanks, '?' and '#'")


def _refuse(key: str, value: Any, rule: str) -> NoReturn:
    raise UserError(f"{key}={value}: {rule}")
