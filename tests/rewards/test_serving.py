"""`megatron-sage serve-rewards`, as processes: what it refuses, what it survives, how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import urllib3

from megatron_sage.__main__ import main
from megatron_sage.config.schema import RewardConfig
from megatron_sage.errors import UserError
from megatron_sage.rewards.remote import RemoteReward
from megatron_sage.rewards.serving import wire
from megatron_sage.rewards.shapes import ShapesReward
from tests.rewards.served import PROMPT, ObedientReward, clips

REPOSITORY = Path(__file__).parents[2]
TOKEN = "5e7a1f-secret"
BODY_SECONDS = 3.0
FUNCTION = "reward.function=tests.rewards.served:ObedientReward"

pytest.importorskip("ray.serve")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The command in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "token").write_text(TOKEN + "\n")
        (folder / "empty.yaml").write_text("name: served\n")
        command = [sys.executable, "-m", "megatron_sage", "serve-rewards", str(folder / "empty.yaml"), FUNCTION]
        command += ["--port", str(self.port), "--token-file", str(folder / "token"), *options]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SERVED_FILES": str(folder)}
        self.output = folder / "output"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=folder)
        self.wait_until(lambda: "serving" in self.said(), 240)

    def said(self) -> str:
        return self.output.read_text()

    def wait_until(self, condition: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def scorers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if re.search(r"ServeReplica:.*Scorer", " ".join(child.cmdline()))]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    found = Server(folder, "--max-megabytes", "1", "--body-seconds", str(BODY_SECONDS))
    yield found
    children = psutil.Process(found.process.pid).children(recursive=True)
    assert found.stop() == 0, found.said()
    assert TOKEN not in found.said()
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", found.port)) != 0, "nobody listens any more"


@pytest.fixture
def remote(server: Server, monkeypatch: pytest.MonkeyPatch) -> RemoteReward:
    monkeypatch.setenv("SERVED_TOKEN", TOKEN)
    return RemoteReward(RewardConfig(url=server.url, token_env="SERVED_TOKEN", timeout_seconds=60.0, in_flight=8))


def post(server: Server, body: bytes, token: str | None = TOKEN, path: str = "/score", **headers: str) -> Any:
    """(status, JSON) of a raw request."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named |= {} if token is None else {"Authorization": f"Bearer {token}"}
    response = urllib3.PoolManager(retries=False).request("POST", server.url + path, body=body, headers=named)
    return response.status, json.loads(response.data)


def raw(server: Server, head: str, body: bytes = b"", authorized: bool = True) -> bytes:
    """What is answered to bytes of one's own, the connection kept open behind them."""
    head += f"Authorization: Bearer {TOKEN}\r\n" if authorized else ""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + body)
        return connection.recv(65536)


def test_scores_are_those_of_the_local_reward_bit_for_bit(server: Server, remote: RemoteReward) -> None:
    videos = clips(7, seed=1)
    prompts = [PROMPT] * 6 + [PROMPT + " nan"]
    found, expected = remote(videos, prompts, 12.5), ObedientReward()(videos, prompts, 12.5)
    assert remote.dimensions == ("VQ", "MQ", "TA") and np.isinf(expected["TA"][6])
    for name, values in found.items():
        finite = np.isfinite(expected[name])
        assert np.array_equal(values[finite], expected[name][finite]) and np.isnan(values[~finite]).all(), name
    many = clips(30, seed=2, shape=(9, 60, 90))  # 4.4 MB: more than one request
    for name, values in remote(many, [PROMPT] * 30, 8.0).items():
        assert np.array_equal(values, ShapesReward()(many, [PROMPT] * 30, 8.0)[name])


def test_every_port_is_on_loopback_or_asks_for_rays_token(server: Server) -> None:
    import grpc

    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    listening = [(p, c.laddr) for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    wide = [(p, at) for p, at in listening if at.ip.removeprefix("::ffff:") != "127.0.0.1"]
    assert len(listening) > 5 and len(wide) == 2, "one of each replica's, by which Serve's processes talk"
    for process, at in wide:
        assert "ServeReplica" in " ".join(process.cmdline())
        call = grpc.insecure_channel(f"127.0.0.1:{at.port}").unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_eight_clients_at_once(server: Server, remote: RemoteReward) -> None:
    def client(number: int) -> bool:
        mine = RemoteReward(remote.settings)
        for turn in range(3):
            videos = clips(2, seed=10 * number + turn)
            expected = ShapesReward()(videos, [PROMPT] * 2, 8.0)
            found = mine(videos, [PROMPT] * 2, 8.0)
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(client, range(8)))


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", "ünï", TOKEN.upper()])
def test_without_the_token_nothing_is_read(server: Server, token: str | None) -> None:
    status, said = post(server, wire.encode(clips(1), [PROMPT], 8.0), token and token.encode().decode("latin-1"))
    assert status == 401 and TOKEN not in json.dumps(said)
    answer = raw(server, "Content-Length: 1000\r\n", authorized=False)  # no byte of the body is sent
    assert answer.startswith(b"HTTP/1.1 401")
    manager = urllib3.PoolManager(retries=False)
    assert manager.request("GET", server.url + "/dimensions").status == 401
    assert manager.request("GET", server.url + "/health").json() == {"status": "ok"}
    assert manager.request("GET", server.url + "/nothing").status == 404


def test_the_client_says_what_a_wrong_token_means(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVED_TOKEN", "another")
    with pytest.raises(UserError, match="401 the bearer token is missing or wrong; .*variable SERVED_TOKEN"):
        RemoteReward(RewardConfig(url=server.url, token_env="SERVED_TOKEN"))


def test_bad_bodies_get_4xx_and_the_server_goes_on(server: Server, remote: RemoteReward) -> None:
    good = wire.encode(clips(1), [PROMPT], 8.0)
    rng = np.random.default_rng(0)
    bomb = zlib.compress(bytes(100 << 20))
    row = {"prompt": PROMPT, "shape": [4, 100, 100, 3], "bytes": len(bomb)}
    header = json.dumps({"fps": 8, "videos": [row]}).encode()
    for body in (
        b"",
        rng.bytes(5000),
        wire.MAGIC + rng.bytes(5000),
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
        good[:-3],
        good + b"0",
        wire.PREFIX.pack(wire.MAGIC, len(header)) + header + bomb,
    ):
        status, said = post(server, body)
        assert status in (413, 422) and set(said) == {"error"} and "\n" not in said["error"], (status, said)
    assert post(server, wire.encode([np.zeros((2, 600, 600, 3), np.uint8)], [PROMPT], 8.0))[0] == 413
    with pytest.raises(UserError, match="413 .*--max-megabytes"):
        remote([np.zeros((2, 600, 600, 3), np.uint8)], [PROMPT], 8.0)
    with pytest.raises(UserError, match="422 prompt 'nothing': no word for the colour"):
        remote(clips(1), ["nothing"], 8.0)
    assert post(server, good)[0] == 200


def test_too_long_a_body_is_refused_before_it_is_sent(server: Server) -> None:
    began = time.monotonic()
    for length in (f"{10 << 30}", "9" * 40):
        assert raw(server, f"Content-Length: {length}\r\n").startswith((b"HTTP/1.1 413", b"HTTP/1.1 400")), length
    assert raw(server, "Transfer-Encoding: chunked\r\n", b"5\r\nabcde\r\n").startswith(b"HTTP/1.1 411")
    assert time.monotonic() - began < BODY_SECONDS


def test_a_body_that_stops_half_way_is_given_up_and_holds_nobody(server: Server, remote: RemoteReward) -> None:
    good = wire.encode(clips(1), [PROMPT], 8.0)
    answers: list[bytes] = []
    head = f"Content-Length: {len(good)}\r\n"
    slow = [threading.Thread(target=lambda: answers.append(raw(server, head, good[:100]))) for _ in range(6)]
    for thread in slow:
        thread.start()
    began = time.monotonic()
    assert np.isfinite(remote(clips(1), [PROMPT], 8.0)["VQ"]).all()
    assert time.monotonic() - began < BODY_SECONDS, "it did not wait for them"
    for thread in slow:
        thread.join(30)
    assert len(answers) == 6 and all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:  # leaves in the middle
        connection.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{head}\r\n".encode())
    assert np.isfinite(remote(clips(1), [PROMPT], 8.0)["VQ"]).all()


def test_a_reward_that_raises_is_one_line_and_then_lost(server: Server, remote: RemoteReward) -> None:
    status, said = post(server, wire.encode(clips(1), [PROMPT + " raise"], 8.0))
    assert status == 500 and said == {"error": "the reward failed: RuntimeError: the form has gone"}
    impatient = RemoteReward(RewardConfig(url=server.url, token_env="SERVED_TOKEN", retries=1))
    future = impatient.submit(clips(2), [PROMPT, PROMPT + " raise"], 8.0)
    good = remote(clips(2), [PROMPT] * 2, 8.0)
    answer = future.result(60)
    assert answer.lost.all() and all(np.isnan(values).all() for values in answer.scores.values())
    assert all(np.isfinite(values).all() for values in good.values()), "the scorer goes on"


def test_a_killed_scorer_is_started_again_and_nothing_is_lost(server: Server, remote: RemoteReward) -> None:
    (victim,) = server.scorers()
    videos = clips(5, seed=5)
    waiting = remote.submit(videos[:1], [PROMPT + " wait"], 8.0)
    others = [remote.submit([video], [PROMPT], 8.0) for video in videos[1:]]
    server.wait_until(lambda: (server.folder / f"{victim.pid}").exists(), 30)  # it is in the middle of scoring
    os.kill(victim.pid, signal.SIGKILL)
    manager = urllib3.PoolManager(retries=False)
    assert manager.request("GET", server.url + "/health", timeout=5.0).status == 200, "the door stays open"
    expected = ShapesReward()(videos, [PROMPT] * 5, 8.0)
    for number, future in enumerate([waiting, *others]):
        answer = future.result(120)
        assert not answer.lost.any()
        assert all(answer.scores[name][0] == expected[name][number] for name in expected)
    assert [scorer.pid for scorer in server.scorers()] != [victim.pid]


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line in which a command ends, without Ray."""
    assert main(["serve-rewards", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_what_is_wrong_is_said_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("name: served\n")
    monkeypatch.delenv("MEGATRON_SAGE_REWARD_TOKEN", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot be listened on: Address already in use" in failing(
            capsys, str(config), "--port", port
        )
    free = ["--port", str(free_port())]
    assert "a token is required" in failing(capsys, str(config), "--host", "0.0.0.0", *free)
    assert "no address of this machine" in failing(capsys, str(config), "--host", "no such host", *free)
    assert "cannot be read: No such file" in failing(capsys, str(config), *free, "--token-file", str(tmp_path / "no"))
    for text in ("", "two words", "é", "\x00"):
        (tmp_path / "token").write_text(text)
        assert "printable ASCII" in failing(capsys, str(config), *free, "--token-file", str(tmp_path / "token"))
    assert "--replicas 0: must be >= 1" in failing(capsys, str(config), *free, "--replicas", "0")
    assert "whole number" in failing(capsys, str(config), *free, "--gpus-per-replica", "1.5")
    assert "must be >= 0" in failing(capsys, str(config), *free, "--gpus-per-replica", "nan")
    assert "must be 1 to 65535" in failing(capsys, str(config), "--port", "70000")
    assert "has no ShapeReward; did you mean ShapesReward" in failing(
        capsys, str(config), *free, "reward.function=megatron_sage.rewards.shapes:ShapeReward"
    )
    assert "reward.weights.VG=1" in failing(capsys, str(config), *free, "reward.weights.VG=1")


@pytest.mark.nightly
def test_two_scorers_are_killed_under_the_load_of_eight_clients(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SERVED_TOKEN", TOKEN)
    server = Server(tmp_path, "--replicas", "2")
    settings = RewardConfig(url=server.url, token_env="SERVED_TOKEN", timeout_seconds=60.0, in_flight=2, retries=8)
    over = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not over.wait(15):
            for scorer in server.scorers()[:1]:
                killed.append(scorer.pid)
                os.kill(scorer.pid, signal.SIGKILL)

    def client(number: int) -> int:
        mine, sent = RemoteReward(settings), []
        for turn in range(40):
            videos = clips(3, seed=100 * number + turn, shape=(9, 48, 64))
            sent.append((videos, mine.submit(videos, [PROMPT] * 3, 8.0)))
        for videos, future in sent:
            expected, answer = ShapesReward()(videos, [PROMPT] * 3, 8.0), future.result(240)
            assert not answer.lost.any()
            assert all(np.array_equal(answer.scores[name], expected[name]) for name in expected)
        return len(sent)

    thread = threading.Thread(target=kill)
    thread.start()
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(client, range(8))) == 320
    over.set()
    thread.join()
    server.wait_until(lambda: len(server.scorers()) == 2, 60)
    assert server.stop() == 0 and killed


@pytest.mark.nightly
def test_a_reward_that_cannot_be_built_ends_the_command_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "reward: {function: tests.rewards.served:AbsentReward, settings: {checkpoint: nowhere}}\n"
    )
    command = [sys.executable, "-m", "megatron_sage", "serve-rewards", str(tmp_path / "c.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "--port", str(free_port())], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "reward.settings.checkpoint=nowhere: no such directory" in errors[0], done.stderr
