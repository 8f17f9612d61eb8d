"""The client of `megatron-sage serve-rewards`: a reward like any other, or answers that are waited for later.

A request that fails for a reason that may pass (no connection, no answer in time, a 5xx) is sent again, for scoring
changes nothing on the server. What stays unanswered after all attempts is lost: nan for its videos, counted, never a
number and never the end of a run. A request that the server refuses (4xx) would be refused again: UserError.
"""

import json
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import urllib3

from megatron_sage.config.schema import RewardConfig
from megatron_sage.errors import UserError
from megatron_sage.rewards.composite import WATCH, check_weights
from megatron_sage.rewards.protocol import check_inputs
from megatron_sage.rewards.serving import wire

TRY_AGAIN = (408, 425, 429)  # besides 5xx: the server says that it is a matter of time
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts, doubled each time
CURES = {
    401: "set the server's token in the environment variable {variable} (reward.token_env)",
    404: "is this a `megatron-sage serve-rewards`?",
    413: "start the server with a larger --max-megabytes",
    422: "the server's reward cannot read these videos or prompts",
}


def waits(retries: int) -> list[float]:
    """Seconds before each attempt after the first."""
    return [min(FIRST_WAIT * 2**number, LONGEST_WAIT) for number in range(retries)]


def patience(settings: RewardConfig) -> float:
    """Seconds after which the videos of a server that never answers are lost, at the latest."""
    return settings.timeout_seconds * (settings.retries + 1) + sum(waits(settings.retries))


@dataclass(frozen=True)
class Answer:
    """Scores {dimension: float64 [n]}; `lost` [n] says for which videos no answer came: they are nan."""

    scores: dict[str, np.ndarray]
    lost: np.ndarray


class _Unanswered(Exception):
    """An attempt failed for a reason that may pass."""


class RemoteReward:
    """A reward behind HTTP, at `reward.url`. Thread-safe; at most `reward.in_flight` submissions are under way."""

    def __init__(self, settings: RewardConfig) -> None:
        """Asks the server for its dimensions. UserError, one line, where it does not answer or does not fit."""
        assert settings.url is not None
        self.url, self.settings = settings.url.rstrip("/"), settings
        self.headers = _authorization(settings.token_env)
        self.pool = urllib3.PoolManager(maxsize=settings.in_flight, retries=False)
        self.progress = 0  # grows with every attempt that ended, so that a long wait can be told from a hang
        self._slots = threading.BoundedSemaphore(settings.in_flight)
        self._closed = threading.Event()
        found = self._described()
        self.dimensions: tuple[str, ...] = tuple(found["dimensions"])
        self.max_bytes: int = found["max_bytes"]
        self._check(settings)

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        """Scores of uint8 clips [F, H, W, 3]: {dimension: float64 [n]}, nan where no answer came."""
        return self.submit(videos, prompts, fps).result().scores

    def submit(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> "Future[Answer]":
        """Send the videos and go on; waits only while `reward.in_flight` submissions are unanswered.

        The future raises UserError where the server refuses the request, and never for a server that is gone.
        """
        check_inputs(videos, prompts, fps)
        self._slots.acquire()
        future: Future[Answer] = Future()
        # A daemon, and no executor: interpreters wait for an executor's threads, here for as long as a reward takes.
        threading.Thread(target=self._work, args=(future, list(videos), list(prompts), fps), daemon=True).start()
        return future

    def close(self) -> None:
        """No further attempts: what is under way is lost after the one that it is in."""
        self._closed.set()

    def _work(self, future: "Future[Answer]", videos: list[np.ndarray], prompts: list[str], fps: float) -> None:
        try:
            answer = self._answer(videos, prompts, fps)
        except BaseException as error:  # whatever it is belongs to the thread that asks for the result
            self._slots.release()
            future.set_exception(error)
        else:
            self._slots.release()
            future.set_result(answer)

    def _answer(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> Answer:
        count = len(videos)
        scores = {name: np.full(count, np.nan) for name in self.dimensions}
        lost = np.ones(count, bool)
        for begin, end in _requests([video.nbytes for video in videos], self.max_bytes):
            body = wire.encode(videos[begin:end], prompts[begin:end], fps)
            try:
                found = self._exchange("POST", "/score", body, end - begin)
            except _Unanswered as error:
                after = f"{self.settings.retries} retries"
                text = f"reward.url={self.url}: the scores of {count - begin} videos are lost after {after}: {error}"
                print(text, file=sys.stderr, flush=True)
                break  # the server is gone: what is left is not worth as many attempts again
            for name in self.dimensions:
                scores[name][begin:end] = found[name]
            lost[begin:end] = False
        return Answer(scores, lost)

    def _exchange(self, method: str, path: str, body: bytes | None, count: int) -> Any:
        """The checked answer of the first attempt that gets one. Raises _Unanswered after the last, or UserError."""
        for pause in [*waits(self.settings.retries), None]:
            try:
                return self._attempt(method, path, body, count)
            except _Unanswered:
                if pause is None or self._closed.wait(pause):
                    raise
            finally:
                self.progress += 1
        raise AssertionError("the last attempt has no pause")

    def _attempt(self, method: str, path: str, body: bytes | None, count: int) -> Any:
        timeout = urllib3.Timeout(connect=self.settings.timeout_seconds, read=self.settings.timeout_seconds)
        try:
            response = self.pool.request(method, self.url + path, body=body, headers=self.headers, timeout=timeout)
        except urllib3.exceptions.HTTPError as error:
            raise _Unanswered(_reason(error)) from error
        status = response.status
        try:
            content = json.loads(response.data)
        except (ValueError, RecursionError):
            content = None
        said = " ".join(str(content.get("error", "")).split())[:500] if isinstance(content, dict) else ""
        if status >= 500 or status in TRY_AGAIN:
            raise _Unanswered(f"{status} {said}".rstrip())
        if status != 200:
            cure = CURES.get(status, "is this a `megatron-sage serve-rewards`?")
            reason = f"{status} {said}".rstrip()
            raise UserError(f"reward.url={self.url}: {reason}; {cure.format(variable=self.settings.token_env)}")
        try:
            return _description(content) if body is None else wire.unpack_scores(content, self.dimensions, count)
        except (ValueError, OverflowError) as error:
            raise _Unanswered(str(error)) from error

    def _described(self) -> dict[str, Any]:
        try:
            return self._exchange("GET", "/dimensions", None, 0)
        except _Unanswered as error:
            raise UserError(
                f"reward.url={self.url}: no answer from a reward server ({error}); start one: "
                "megatron-sage serve-rewards CONFIG"
            ) from error

    def _check(self, settings: RewardConfig) -> None:
        """The server's dimensions against what the run weighs and watches."""
        check_weights(settings.weights, [name for name in self.dimensions if not name.startswith(WATCH)])
        if settings.watch is not None and not any(name.startswith(WATCH) for name in self.dimensions):
            raise UserError(
                f"reward.watch={settings.watch}: the server at {self.url} has no watched reward; start it with the "
                "same `reward` section"
            )


def _authorization(variable: str) -> dict[str, str]:
    headers = {"Content-Type": "application/octet-stream"}
    token = os.environ.get(variable, "").strip()
    if not token:
        return headers
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"the environment variable {variable} (reward.token_env) must hold a token without blanks")
    return headers | {"Authorization": f"Bearer {token}"}


def _reason(error: BaseException) -> str:
    """What lies under urllib3's exceptions, e.g. Connection refused, without the address that is said anyway."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    return f"{type(error).__name__}: {str(error).rpartition(': ')[2]}"


def _description(content: Any) -> dict[str, Any]:
    names = content.get("dimensions") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("the answer names no dimensions")
    if not isinstance(content.get("max_bytes"), int) or content["max_bytes"] < 1:
        raise ValueError("the answer has no max_bytes")
    return content


def _requests(sizes: list[int], limit: int) -> list[tuple[int, int]]:
    """Ranges of videos whose decompressed bytes fit into one request each; a single one may be too long for it."""
    ranges: list[tuple[int, int]] = []
    begin, total = 0, 0
    for number, size in enumerate(sizes):
        if number > begin and total + size > limit:
            ranges.append((begin, number))
            begin, total = number, 0
        total += size
    return [*ranges, (begin, len(sizes))] if sizes else ranges
