"""Rewards of the reward server's tests, and a stand-in for the server whose faults a test chooses."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sage.errors import UserError
from megatron_sage.rewards.protocol import Reward
from megatron_sage.rewards.serving import wire
from megatron_sage.rewards.shapes import ShapesReward

PROMPT = "a red circle moving left slowly"
PROMPTS = [PROMPT, "a blue square moving up quickly", "a green triangle moving right slowly, then nothing"]


class ObedientReward(ShapesReward):
    """ShapesReward that does what prompts say: wait (SERVED_FILES gets a file first), raise, nan."""

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        for prompt in prompts:
            if "wait" in prompt:
                Path(os.environ["SERVED_FILES"], f"{os.getpid()}").touch()
                time.sleep(3)
            if "raise" in prompt:
                raise RuntimeError("the form\nhas gone")
        scores = super().__call__(videos, prompts, fps)
        unknown = np.array(["nan" in prompt for prompt in prompts])
        return scores | {"VQ": np.where(unknown, np.nan, scores["VQ"]), "TA": np.where(unknown, -np.inf, scores["TA"])}


class AbsentReward(ShapesReward):
    """Its model is not there."""

    def __init__(self, checkpoint: str) -> None:
        raise UserError(f"reward.settings.checkpoint={checkpoint}: no such directory; download it")


def clips(count: int, seed: int = 0, shape: tuple[int, int, int] = (5, 16, 24)) -> list[np.ndarray]:
    """Random uint8 clips [F, H, W, 3]."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(count)]


class StandIn:
    """A server in this process. `fault(number)` is called for every /score, numbered from 1, before it is answered.

    It returns None for a good answer, a status, raw bytes of a body, or "reset": then the connection is closed.
    """

    def __init__(self, reward: Reward, fault: Callable[[int], Any] = lambda number: None, **described: Any) -> None:
        self.reward, self.fault = reward, fault
        self.described = {"dimensions": list(reward.dimensions), "max_bytes": 1 << 30} | described
        self.requests: list[int] = []  # number of videos of each
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @contextmanager
    def counted(self, videos: int) -> Iterator[int]:
        with self.lock:
            self.requests.append(videos)
            number = len(self.requests)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        yield number
        with self.lock:
            self.open -= 1

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@contextmanager
def stand_in(reward: Reward | None = None, fault: Callable[[int], Any] = lambda n: None, **more: Any) -> Iterator[Any]:
    server = StandIn(reward or ShapesReward(), fault, **more)
    try:
        yield server
    finally:
        server.close()


def _handler(server: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.say(200, json.dumps(server.described).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            header = wire.read_header(body, 1 << 30)
            with server.counted(len(header.prompts)) as number:
                fault = server.fault(number)
                if fault is None:
                    scores = server.reward(wire.decode(body, header), header.prompts, header.fps)
                    packed = wire.pack_scores(scores, server.reward.dimensions)
                    self.say(200, json.dumps({"scores": packed}).encode())
                elif fault == "reset":
                    self.close_connection = True
                elif isinstance(fault, bytes):
                    self.say(200, fault)
                else:
                    self.say(fault, b'{"error": "as the test said"}')

    return Handler
