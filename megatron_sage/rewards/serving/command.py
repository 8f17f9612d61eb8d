"""`megatron-sage serve-rewards`: the config's reward as replicas of a Ray Serve application, until a signal."""

import argparse
import hashlib
import ipaddress
import logging
import os
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sage.config import Config, RewardConfig, load_config
from megatron_sage.errors import UserError
from megatron_sage.rewards.extras import needs

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
RAY_ATTEMPTS = 3  # to start: Ray gives up after 30 s, which a machine under load may need
DRAIN_SECONDS = 20.0  # in which a replica may finish what it scores when the server stops


def main(argv: list[str]) -> int:
    """Command line of `serve-rewards`; see `--help`."""
    options = _parse(argv)
    config = load_config(options.config, options.overrides)
    check(options, config)
    token = read_token(options.token_file, config.reward.token_env)
    if token is None and not is_loopback(options.host):
        variable = config.reward.token_env
        raise UserError(
            f"--host {options.host}: others can reach it, so a token is required: --token-file FILE, or the "
            f"environment variable {variable} (reward.token_env)"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if options.ray_address is None:
        # Before ray is imported. Serve opens a port for each replica on all interfaces, and what comes in there is
        # unpickled: Ray's own token guards it.
        os.environ["RAY_AUTH_MODE"] = "token"
    with needs("ray.serve", "rewards"):
        import fastapi  # noqa: F401
        import ray  # noqa: F401
        from ray import serve  # noqa: F401
    return _serve(options, config, token)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-sage serve-rewards",
        description="Score videos for runs on other processes, GPUs or hosts: a run's reward.url names this server.",
        epilog="The token is read from --token-file or from the environment variable reward.token_env, never from an "
        "argument. SIGTERM stops the server.",
    )
    parser.add_argument("config", help="YAML whose `reward` section is served; its reward.url is not read")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8400, help="port to listen on (%(default)s)")
    parser.add_argument("--replicas", type=int, default=1, help="processes that score (%(default)s)")
    parser.add_argument("--gpus-per-replica", type=float, default=0.0, help="may be a fraction (%(default)s: CPU)")
    parser.add_argument("--token-file", help="file with the bearer token that clients must send")
    parser.add_argument("--max-megabytes", type=int, default=2048, help="decoded frames in a request (%(default)s)")
    parser.add_argument("--body-seconds", type=float, default=120.0, help="for a body to arrive (%(default)s)")
    parser.add_argument("--ray-address", help="a running Ray cluster, e.g. auto or HOST:6379; default: an own one")
    return parser.parse_intermixed_args(argv)


def check(options: argparse.Namespace, config: Config) -> None:
    """Everything that can be known before Ray starts; UserError, one line."""
    from megatron_sage.config.reward_rules import check_reward

    for name, least in (("replicas", 1), ("max_megabytes", 1), ("gpus_per_replica", 0)):
        if not getattr(options, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be >= {least}")
    if not options.body_seconds > 0:
        raise UserError(f"--body-seconds {options.body_seconds}: must be > 0")
    gpus = options.gpus_per_replica
    if gpus > 1 and gpus != int(gpus):
        raise UserError(f"--gpus-per-replica {gpus}: above 1 it must be a whole number; Ray splits single GPUs only")
    if not 1 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: must be 1 to 65535")
    check_reward(replace(config, reward=served(config.reward)))
    if options.ray_address is None:
        _check_port(options.host, options.port)


def served(settings: RewardConfig) -> RewardConfig:
    """The reward that a server holds: the one YAML of a run names both the reward and, for its client, the server."""
    return replace(settings, url=None, overlap_groups=None)


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: is no address of this machine ({error}); 127.0.0.1 is the usual one") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(
                f"--host {host} --port {port}: cannot be listened on: {error.strerror}; choose another"
            ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: str | None, variable: str) -> str | None:
    """The bearer token of a file or of an environment variable; None where neither is given."""
    if file is None:
        where, token = f"the environment variable {variable}", os.environ.get(variable)
        if token is None:
            return None
    else:
        where = f"--token-file {file}"
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UserError(f"{where}: cannot be read: {reason}; it holds the token in one line") from None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{where}: must hold one line of printable ASCII without blanks, e.g. of `openssl rand -hex 32`"
        )
    return token


def _serve(options: argparse.Namespace, config: Config, token: str | None) -> int:
    """Start Ray, deploy, wait for a signal, take everything down."""
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process; replicas: see _deploy
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    _start_ray(options.ray_address)
    for number in STOP_SIGNALS:  # after ray.init, which sets a handler of its own for SIGTERM
        signal.signal(number, lambda *_: stop.set())
    try:
        _check_cluster(options)
        dimensions = _deploy(options, config, token)
        replicas = f"{options.replicas} replica" + "s" * (options.replicas > 1)
        where = f"[{options.host}]" if ":" in options.host else options.host
        print(
            f"serving {config.reward.function} ({', '.join(dimensions)}) at http://{where}:{options.port}, {replicas}",
            flush=True,
        )
        while not stop.wait(1.0):
            pass
        print("stopping", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _start_ray(address: str | None) -> None:
    import ray

    quiet: dict[str, Any] = {"logging_level": "WARNING", "log_to_driver": True}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(
                f"--ray-address {address}: {line}; start it by `ray start --head`, with the same RAY_AUTH_MODE here"
            ) from None
        return
    from ray._private import ray_constants

    # On one machine Ray's own ports stay on loopback, whatever --host says. The address alone does not do it: Ray 2.60
    # takes 127.0.0.1 for the machine's address in the network, except where it forms no clusters (as on macOS).
    ray_constants.ENABLE_RAY_CLUSTER = False
    for attempt in range(RAY_ATTEMPTS):
        try:
            ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, **quiet)
            return
        except Exception as error:  # Ray has no class of its own for this
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == RAY_ATTEMPTS - 1:
                raise UserError("Ray did not start within its 30 s: this machine is overloaded; try again") from error


def _check_cluster(options: argparse.Namespace) -> None:
    """Without this, replicas that fit nowhere would be waited for for ever."""
    import ray
    from ray import serve

    if options.ray_address is not None and serve.status().applications:
        names = ", ".join(serve.status().applications)
        raise UserError(f"--ray-address {options.ray_address}: this cluster serves {names} already; use one of its own")
    gpus = options.gpus_per_replica
    if gpus == 0:
        return
    nodes = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    fits = sum(count * int(1 / gpus + 1e-9) if gpus <= 1 else count // int(gpus) for count in nodes)
    if options.replicas > fits:
        raise UserError(
            f"--replicas {options.replicas} --gpus-per-replica {gpus:g}: the {sum(nodes)} GPUs hold {fits} such "
            "replicas; use fewer, or a smaller part of a GPU each"
        )


def _deploy(options: argparse.Namespace, config: Config, token: str | None) -> list[str]:
    """The running application; its dimensions."""
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    from megatron_sage.rewards.serving.deployments import APPLICATION, Scorer, make_door

    gpus = options.gpus_per_replica
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    deployment: Any = serve.deployment  # Serve's own overloads do not cover the call with options
    scorer = deployment(
        Scorer,
        name="Scorer",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        max_ongoing_requests=1,
        health_check_period_s=2,
        health_check_timeout_s=300,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    ).bind(served(config.reward), "cuda" if gpus else "cpu")
    digest = None if token is None else hashlib.sha256(token.encode()).digest()
    door = make_door().bind(scorer, config.reward.function, options.max_megabytes << 20, options.body_seconds, digest)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=options.host, port=options.port),
        logging_config=quiet,
    )
    try:
        handle = serve.run(door, name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise UserError(f"reward.function={config.reward.function}: {_why(error)}") from error
    return list(handle.dimensions.remote().result()["dimensions"])


def _why(error: RuntimeError) -> str:
    """The reason in Ray's report of a deployment that does not start: the last line of the replica's traceback."""
    from ray import serve

    from megatron_sage.rewards.serving.deployments import APPLICATION

    found = serve.status().applications.get(APPLICATION)
    messages = [d.message for d in found.deployments.values() if d.message] if found else []
    lines = [line.strip() for line in "\n".join(messages or [str(error)]).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line and not line.endswith("(most recent call last):")]
    return f"a replica does not start: {(named or lines)[-1].removeprefix('megatron_sage.errors.UserError: ')}"
