"""The two Ray Serve deployments: one door that lets requests in, and as many scorers as there are replicas.

The door checks token, size and header and never waits for a reward, so /health answers while all scorers are busy or
loading. A scorer holds the reward, decompresses and scores, one request at a time; what waits, waits at the door. Ray
starts a scorer that died again; a request that it held is answered by 503, and the client sends it once more.
"""

import asyncio
import hashlib
import hmac
import json
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from starlette.requests import ClientDisconnect

from megatron_sage.config import RewardConfig
from megatron_sage.errors import UserError
from megatron_sage.rewards.serving import wire
from megatron_sage.rewards.serving.wire import Refused

APPLICATION = "megatron-sage-rewards"
OPEN = "/health"  # the one path that needs no token


def one_line(error: BaseException) -> str:
    """Type and message, without the traceback of another process."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


class Scorer:
    """A replica: the config's reward in a process of its own."""

    def __init__(self, settings: RewardConfig, device: str) -> None:
        from megatron_sage.rewards.build import build_reward

        self.reward = build_reward(settings, device)

    def dimensions(self) -> list[str]:
        """Names of what is scored."""
        return list(self.reward.dimensions)

    def score(self, body: bytes, max_bytes: int) -> tuple[int, str]:
        """(status, JSON) for the body of a request."""
        try:
            header = wire.read_header(body, max_bytes)
            videos = wire.decode(body, header)
            scores = self.reward(videos, header.prompts, header.fps)
        except Refused as refused:
            return refused.status, json.dumps({"error": refused.line})
        except UserError as error:  # e.g. a prompt that the reward cannot read: trying again would not help
            return 422, json.dumps({"error": " ".join(str(error).split())})
        return 200, json.dumps({"scores": wire.pack_scores(scores, self.reward.dimensions)}, allow_nan=False)


class Door:
    """What a client talks to."""

    def __init__(
        self, scorer: Any, function: str, max_bytes: int, body_seconds: float, token_digest: bytes | None
    ) -> None:
        """`token_digest`: SHA-256 of the bearer token, so that no process but the command's has the token itself."""
        self.scorer, self.function, self.token_digest = scorer, function, token_digest
        self.max_bytes, self.body_seconds = max_bytes, body_seconds
        self._dimensions: list[str] = []

    def check(self, request: Request) -> None:
        """The token, compared in constant time."""
        if self.token_digest is None:
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        if not (hmac.compare_digest(given, self.token_digest) and kind.lower() == "bearer"):
            raise Refused(401, "the bearer token is missing or wrong")

    async def dimensions(self) -> dict[str, Any]:
        """What the server scores, and how much it takes at once."""
        if not self._dimensions:
            self._dimensions = await self.scorer.dimensions.remote()
        return {"function": self.function, "dimensions": self._dimensions, "max_bytes": self.max_bytes}

    async def score(self, request: Request) -> Response:
        """Scores of one request's videos."""
        body = await self._read(request)
        wire.read_header(body, self.max_bytes)
        status, text = await self.scorer.score.remote(body, self.max_bytes)
        return Response(text, status, media_type="application/json")

    async def _read(self, request: Request) -> bytes:
        """The body; what is too long is refused by its declared length, before it is read."""
        declared, limit = request.headers.get("content-length"), wire.body_limit(self.max_bytes)
        if declared is None:
            raise Refused(411, "the request must say its Content-Length")
        if not (declared.isascii() and declared.isdigit()):
            raise Refused(400, "Content-Length must be a number")
        if len(declared) > 18 or int(declared) > limit:
            raise Refused(413, f"the body has {declared[:18]} bytes; at most {limit}: send fewer videos at once")
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > int(declared):
                        raise Refused(400, "the body is longer than its Content-Length")
        except TimeoutError as error:
            raise Refused(408, f"the body did not arrive within {self.body_seconds:g} s") from error
        except ClientDisconnect as error:
            raise Refused(400, "the client left before its body had arrived") from error
        if len(body) != int(declared):
            raise Refused(400, f"the body has {len(body)} of the {declared} bytes of its Content-Length")
        return bytes(body)


def make_door() -> Any:
    """The deployment of `Door` behind FastAPI."""
    app = FastAPI(openapi_url=None)

    # every failure is one line of JSON with its status
    @app.exception_handler(Refused)
    async def _refused(request: Request, refused: Refused) -> Response:
        return JSONResponse({"error": refused.line}, refused.status)

    @app.exception_handler(RayTaskError)
    async def _failed(request: Request, error: RayTaskError) -> Response:
        return JSONResponse({"error": f"the reward failed: {one_line(error.cause or error)}"}, 500)

    @app.exception_handler(RayActorError)
    async def _died(request: Request, error: RayActorError) -> Response:
        return JSONResponse({"error": "the scorer died while it held this request; send it again"}, 503)

    @serve.deployment(name="Door", num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    @serve.ingress(app)
    class Ingress(Door):
        @app.get(OPEN)
        async def get_health(self) -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/dimensions")
        async def get_dimensions(self, request: Request) -> dict[str, Any]:
            self.check(request)
            return await self.dimensions()

        @app.post("/score")
        async def post_score(self, request: Request) -> Response:
            self.check(request)
            return await self.score(request)

    return Ingress
