"""The client of a reward server, against a stand-in whose faults are chosen; the wire format."""

import json
import math
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sage.config.schema import RewardConfig
from megatron_sage.errors import UserError
from megatron_sage.rewards import remote as remote_module
from megatron_sage.rewards.remote import RemoteReward, patience, waits
from megatron_sage.rewards.serving import wire
from megatron_sage.rewards.shapes import ShapesReward
from tests.rewards.served import PROMPT, clips, stand_in

LIMIT = 1 << 24


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundredths of a second between attempts."""
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.01)


def remote(url: str, **changes: Any) -> RemoteReward:
    return RemoteReward(RewardConfig(url=url, **({"timeout_seconds": 5.0, "retries": 2} | changes)))


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return set(found) == set(expected) and all(np.array_equal(found[k], expected[k], equal_nan=True) for k in found)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(*[st.integers(1, 7)] * 3, st.text(max_size=20)), min_size=1, max_size=4),
    st.floats(0.1, 1e3),
    st.integers(0, 2**31),
)
def test_frames_prompts_and_rate_arrive_as_they_were_sent(videos: Any, fps: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sent = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for *shape, _ in videos]
    sent[0] = np.asfortranarray(sent[0])  # not contiguous
    prompts = [prompt for *_, prompt in videos]
    body = wire.encode(sent, prompts, fps)
    assert len(body) <= wire.body_limit(sum(video.nbytes for video in sent))
    header = wire.read_header(body, LIMIT)
    assert (header.prompts, header.fps) == (prompts, fps)
    for video, expected in zip(wire.decode(body, header), sent, strict=True):
        assert video.flags.writeable and video.dtype == np.uint8 and np.array_equal(video, expected)


def body_of(header: Any, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return wire.PREFIX.pack(wire.MAGIC, len(text)) + text + payload


def one(shape: Any = (1, 2, 2, 3), size: Any = None, payload: bytes | None = None, **more: Any) -> bytes:
    payload = zlib.compress(bytes(12)) if payload is None else payload
    row = {"prompt": "", "shape": list(shape), "bytes": len(payload) if size is None else size} | more
    return body_of({"fps": 8, "videos": [row]}, payload)


GOOD = one()
BAD = {
    "empty": b"",
    "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "truncated prefix": GOOD[:6],
    "truncated header": GOOD[:30],
    "truncated payload": GOOD[:-1],
    "more behind": GOOD + b"x",
    "no JSON": body_of(b"{nonsense"),
    "deep JSON": body_of(b"[" * 100_000),
    "a list": body_of([1]),
    "no videos": body_of({"fps": 8, "videos": []}),
    "no fps": body_of({"videos": [1]}),
    "fps nan": body_of(b'{"fps": NaN, "videos": [{"prompt": "", "shape": [1, 1, 1, 3], "bytes": 1}]}'),
    "fps true": body_of({"fps": True, "videos": [{"prompt": "", "shape": [1, 1, 1, 3], "bytes": 1}]}),
    "prompt number": one(prompt=3),
    "unknown key": one(pickle="x"),
    "four channels": one((1, 2, 2, 4)),
    "negative": one((1, -2, -2, 3)),
    "zero": one((0, 2, 2, 3)),
    "fraction": one((1, 2.0, 2, 3)),
    "true": one((True, 2, 2, 3)),
    "damaged": one(payload=b"\x78\x01 nothing"),
    "too little": one(payload=zlib.compress(bytes(11))),
    "too much": one(payload=zlib.compress(bytes(13))),
    "bomb": one(payload=zlib.compress(bytes(100 << 20))),
    "unfinished": one(payload=zlib.compress(bytes(12))[:-4]),
    "two streams": one(payload=zlib.compress(bytes(12)) * 2),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_refused_without_decompressing_more_than_declared(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(wire.Refused) as refused:
        header = wire.read_header(BAD[name], LIMIT)
        wire.decode(BAD[name], header)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.status == 422 and "\n" not in refused.value.line
    assert peak < 8 << 20, "a bomb is not decompressed"


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20, 1 << 20, 3), (10**30, 1, 1, 3), (1, LIMIT, 1, 3)])
def test_declared_sizes_beyond_the_limit_are_413_before_anything_is_decompressed(shape: Any) -> None:
    with pytest.raises(wire.Refused) as refused:
        wire.read_header(one(shape), LIMIT)
    assert refused.value.status == 413
    with pytest.raises(wire.Refused) as refused:
        wire.read_header(struct.pack("<4sI", wire.MAGIC, 1 << 31), LIMIT)
    assert refused.value.status == 413


def test_scores_survive_json_bit_for_bit_and_what_is_not_finite_is_null() -> None:
    values = np.array([1 / 3, -0.0, 5e-324, np.nan, np.inf, -np.inf, 1e308])
    text = json.dumps({"scores": wire.pack_scores({"VQ": values, "other": values}, ("VQ",))}, allow_nan=False)
    found = wire.unpack_scores(json.loads(text), ("VQ",), len(values))["VQ"]
    finite = np.isfinite(values)
    assert np.array_equal(found[finite], values[finite]) and np.signbit(found[1]) and np.isnan(found[~finite]).all()


def test_a_remote_reward_is_the_local_one() -> None:
    videos, prompts = clips(5), [PROMPT] * 5
    with stand_in(max_bytes=2 * videos[0].nbytes) as server:
        reward = remote(server.url)
        assert reward.dimensions == ShapesReward.dimensions
        assert same(reward(videos, prompts, 8.0), ShapesReward()(videos, prompts, 8.0))
        assert server.requests == [2, 2, 1], "as many videos at once as the server takes"


def passing(status: Any) -> Any:
    """The fault of the first two attempts."""
    return lambda number: status if number <= 2 else None


@pytest.mark.parametrize("fault", [500, 502, 503, 408, 429, "reset", b"<html>", b'{"scores": {"VQ": [1]}}', b"[1e999]"])
def test_what_may_pass_is_tried_again(fault: Any) -> None:
    videos = clips(2)
    with stand_in(fault=passing(fault)) as server:
        answer = remote(server.url).submit(videos, [PROMPT] * 2, 8.0).result()
        assert len(server.requests) == 3 and not answer.lost.any()
        assert same(answer.scores, ShapesReward()(videos, [PROMPT] * 2, 8.0))


@pytest.mark.parametrize("fault", [503, "reset", b"{}", "silent"])
def test_what_never_comes_is_lost_and_nan(fault: Any, capsys: pytest.CaptureFixture[str]) -> None:
    over = threading.Event()

    def refuse(number: int) -> Any:
        if number == 1:
            return None  # the first request of the submission is answered
        if fault == "silent":
            over.wait(20)
        return fault

    videos = clips(3)
    with stand_in(fault=refuse, max_bytes=videos[0].nbytes) as server:
        reward = remote(server.url, retries=1, timeout_seconds=1.0)
        answer = reward.submit(videos, [PROMPT] * 3, 8.0).result(timeout=20)
        over.set()
    assert answer.lost.tolist() == [False, True, True] and len(server.requests) == 3
    expected = ShapesReward()(videos, [PROMPT] * 3, 8.0)
    for name, values in answer.scores.items():
        assert values[0] == expected[name][0] and np.isnan(values[1:]).all()
    assert capsys.readouterr().err.count("the scores of 2 videos are lost after 1 retries") == 1


CURES = {401: "TOKEN_OF_TEST", 404: "is this", 413: "--max-megabytes", 422: "prompts"}


@pytest.mark.parametrize("status", CURES)
def test_a_refused_request_is_not_sent_again(status: int) -> None:
    with stand_in(fault=lambda number: status) as server:
        reward = remote(server.url, token_env="TOKEN_OF_TEST")
        with pytest.raises(UserError, match=f"{status} as the test said; .*{CURES[status]}"):
            reward(clips(1), [PROMPT], 8.0)
        assert len(server.requests) == 1


def test_only_so_many_submissions_are_under_way() -> None:
    go = threading.Event()
    with stand_in(fault=lambda number: None if go.wait(20) else 500) as server:
        reward = remote(server.url, in_flight=2, timeout_seconds=20.0)
        submitted: list[Any] = []

        def submit() -> None:
            for number in range(5):
                submitted.append(reward.submit(clips(1, number), [PROMPT], 8.0))

        thread = threading.Thread(target=submit)
        thread.start()
        deadline = time.monotonic() + 10
        while len(server.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(submitted) == 2, "the third waits for a place"
        go.set()
        thread.join(20)
        for number, future in enumerate(submitted):
            assert same(future.result(20).scores, ShapesReward()(clips(1, number), [PROMPT], 8.0))
        assert len(submitted) == 5 and server.most_open == 2


def test_a_server_that_does_not_fit_is_named_in_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=f"reward.url={url}: no answer .*Connection refused.*serve-rewards"):
            remote(url, retries=0)
    with stand_in() as server:
        with pytest.raises(UserError, match=r"reward.weights.watch=1.0: .* choose from VQ, MQ, TA"):
            remote(server.url, weights={"watch": 1.0, "VQ": 1.0})
        with pytest.raises(UserError, match="reward.watch=a:B: the server .* has no watched reward"):
            remote(server.url, watch="a:B")
    with stand_in(dimensions=["VQ", "watch/VQ"]) as server:
        assert remote(server.url, weights={"VQ": 1.0}, watch="a:B").dimensions == ("VQ", "watch/VQ")
        with pytest.raises(UserError, match="reward.weights.watch/VQ"):
            remote(server.url, weights={"watch/VQ": 1.0})
    with stand_in(dimensions="VQ") as server, pytest.raises(UserError, match="names no dimensions"):
        remote(server.url, retries=0)


def test_the_wait_for_a_server_that_is_gone_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.5)
    settings_ = RewardConfig(timeout_seconds=2.0, retries=8)
    assert waits(8) == [0.5, 1, 2, 4, 8, 16, 30, 30] and math.isclose(patience(settings_), 9 * 2 + 91.5)
    with stand_in(fault=lambda number: 503) as server:
        reward = remote(server.url, retries=8)
        future = reward.submit(clips(1), [PROMPT], 8.0)
        while not server.requests:
            time.sleep(0.01)
        reward.close()  # nobody wants the answer any more
        assert future.result(5).lost.all()
