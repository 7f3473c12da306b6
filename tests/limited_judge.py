"""Judges behind HTTP with the limits of providers, scaled so that a minute takes a second or so.

What a provider counts, how it says that it is too much, and what else it refuses:

    openai      requests and tokens flow back evenly; `retry-after-ms` beside `Retry-After`; a
                reasoning model, which takes no `max_tokens` and no temperature
    anthropic   requests and tokens flow back evenly; `Retry-After` in seconds; 529 now and then
    gemini      requests and tokens of each minute; `retryDelay` in the body
    date        as gemini, with `Retry-After` as a date
    silent      as openai, without a word of when to come back

A refused request counts for nothing. A request through this server as a proxy is answered as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import math
import pathlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

from aiohttp import web

from tests import judge_server


class Limits(NamedTuple):
    """What an endpoint takes."""

    provider: str
    requests: float
    """Of a minute."""
    tokens: float
    """Of a minute, prompts and replies."""
    minute_secs: float
    latency_secs: float = 0.0
    overloaded_every: int = 0
    """Of so many requests one is answered with 529; 0 is none."""


class Bucket:
    """Units that flow back evenly, some of which may be taken at once."""

    def __init__(self, per_minute: float, minute_secs: float, burst: float) -> None:
        self.rate, self.most = per_minute / minute_secs, burst
        self.left, self.at = burst, time.monotonic()

    def missing(self, units: float) -> float:
        """Returns the seconds until there are so many units."""
        now = time.monotonic()
        self.left = min(self.left + (now - self.at) * self.rate, self.most)
        self.at = now
        return max(min(units, self.most) - self.left, 0.0) / self.rate

    def take(self, units: float) -> None:
        """Counts units that were used."""
        self.left -= units


class Window:
    """Units of each minute, which begins on the clock."""

    def __init__(self, per_minute: float, minute_secs: float, _: float) -> None:
        self.most, self.secs = per_minute, minute_secs
        self.minute, self.left = 0, 0.0

    def missing(self, units: float) -> float:
        """Returns the seconds until there are so many units."""
        minute = int(time.time() // self.secs)
        if minute != self.minute:
            self.minute, self.left = minute, self.most
        return 0.0 if self.left >= min(units, self.most) else self.secs - time.time() % self.secs

    def take(self, units: float) -> None:
        """Counts units that were used."""
        self.left -= units


class LimitedJudge:
    """An endpoint, and what came of the requests to it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        kind = Window if limits.provider in ("gemini", "date") else Bucket
        burst = max(limits.requests / limits.minute_secs / 4, 1.0)
        self.requests = kind(limits.requests, limits.minute_secs, burst)
        self.tokens = kind(
            limits.tokens, limits.minute_secs, limits.tokens / limits.requests * burst
        )
        self.stats = {"taken": 0, "refused": 0, "overloaded": 0, "misread": 0}
        self.proxies: set[str] = set()

    async def reply(self, request: web.Request) -> web.StreamResponse:
        """Answers a request within the limits."""
        body = await request.read()
        asked = json.loads(body)
        self.proxies.add(f"{request.host} {request.headers.get('Proxy-Authorization', '')}")
        count = sum(self.stats.values())
        if self.limits.provider == "openai" and (refusal := _reasons(asked)):
            self.stats["misread"] += 1
            return refusal
        if self.limits.overloaded_every and count % self.limits.overloaded_every == 1:
            self.stats["overloaded"] += 1
            return web.json_response({"error": {"type": "overloaded_error"}}, status=529)
        tokens = len(body) / 4
        secs = max(self.requests.missing(1.0), self.tokens.missing(tokens))
        if secs > 0:
            self.stats["refused"] += 1
            return _busy(self.limits.provider, secs)
        self.requests.take(1.0)
        self.tokens.take(tokens)
        self.stats["taken"] += 1
        await asyncio.sleep(self.limits.latency_secs)
        return judge_server.chat(judge_server.opinion("agreeing", asked))


def _reasons(asked: dict) -> web.Response | None:
    """Refuses what a reasoning model does not take."""
    problem = {
        "max_tokens": (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead."
        ),
        "temperature": (
            "Unsupported value: 'temperature' does not support 0.2 with this model. Only the "
            "default (1) value is supported."
        ),
    }
    for name, text in problem.items():
        if name in asked:
            error = {"message": text, "type": "invalid_request_error", "param": name}
            return web.json_response({"error": error}, status=400)
    return None


def _busy(provider: str, secs: float) -> web.Response:
    """Says that it is too much, in the way of a provider."""
    error: dict = {"code": 429, "message": "Rate limit reached"}
    headers = {}
    if provider == "openai":
        headers = {"retry-after-ms": f"{1000 * secs:.0f}", "Retry-After": str(math.ceil(secs))}
    if provider == "anthropic":
        headers = {"Retry-After": str(math.ceil(secs))}
    if provider == "gemini":
        info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{secs:.3f}s"}
        error |= {"status": "RESOURCE_EXHAUSTED", "details": [info]}
    if provider == "date":
        headers = {
            "Retry-After": email.utils.formatdate(math.ceil(time.time() + secs), usegmt=True)
        }
    return web.json_response({"error": error}, status=429, headers=headers)


def main() -> None:
    limits = Limits(*json.loads(sys.argv[1]))
    judge = LimitedJudge(limits)

    async def stats(_: web.Request) -> web.Response:
        return web.json_response(judge.stats | {"proxies": sorted(judge.proxies)})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", judge.reply)
    app.router.add_get("/stats", stats)
    asyncio.run(judge_server.serve(app, 0))


class Server:
    """The endpoint as a test sees it."""

    def __init__(self, limits: Limits) -> None:
        root = pathlib.Path(__file__).resolve().parents[1]
        command = [sys.executable, "-m", "tests.limited_judge", json.dumps(limits)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict:
        """Returns what came of the requests, and by which hosts and proxies they came."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=30) as reply:
            return json.load(reply)


@contextlib.contextmanager
def running(limits: Limits) -> Iterator[Server]:
    """Yields an endpoint in a process of its own."""
    server = Server(limits)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


if __name__ == "__main__":
    main()
