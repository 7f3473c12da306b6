"""A judge behind HTTP in a process of its own, well or ill as the model's name says.

An opinion follows from the prompt and the temperature, so that it is the same every time.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

from aiohttp import web

from tests import http_faults


class Judge(http_faults.Faults):
    """The replies of the server, and how often it was asked."""

    def __init__(self, latency: float) -> None:
        super().__init__()
        self.latency = latency
        self.tries: collections.Counter[str] = collections.Counter()
        self.stats = {
            "calls": 0,
            "in_flight": 0,
            "max_in_flight": 0,
            "formats": {},
            "keys": [],
            "rooms": [],
        }

    async def reply(self, request: web.Request) -> web.StreamResponse:
        """Answers as the model of the request does."""
        body = await request.read()
        self.stats["calls"] += 1
        key = request.headers.get("Authorization", "")
        if key not in self.stats["keys"]:
            self.stats["keys"].append(key)
        self.stats["in_flight"] += 1
        self.stats["max_in_flight"] = max(self.stats["max_in_flight"], self.stats["in_flight"])
        try:
            await asyncio.sleep(self.latency)
            return await self._reply(request, json.loads(body), body)
        finally:
            self.stats["in_flight"] -= 1

    async def _reply(self, request, asked, body) -> web.StreamResponse:
        model = asked["model"]
        form = asked.get("response_format", {"type": "none"})["type"]
        self.stats["formats"][form] = self.stats["formats"].get(form, 0) + 1
        if refusal := _refused(model, form, asked):
            return web.json_response({"error": refusal[1]}, status=refusal[0])
        key = hashlib.sha256(body).hexdigest()
        self.tries[key] += 1
        if model.startswith("one opinion fails ") and self._fails(asked, key):
            return await self._ill("500", request)
        if model.startswith("cut below ") and asked["max_tokens"] < int(model.split()[-1]):
            self.stats["rooms"].append(asked["max_tokens"])
            return chat('{"principles": [], "rationale": "so', "length")
        if model == "unreadable behind two 500s":
            return await self._ill("500" if self.tries[key] <= 2 else "zero", request)
        model = model.removeprefix("no formats, ")
        if model.startswith("never ") or (model.startswith("first ") and self.tries[key] == 1):
            return await self._ill(model.split(" ", 1)[1], request)
        return chat(opinion(model, asked))

    def _fails(self, asked, key) -> bool:
        return asked["temperature"] == 0.5 and self.tries[key] <= int(asked["model"].split()[-1])

    async def _ill(self, how: str, request: web.Request) -> web.StreamResponse:
        if how == "429":
            return web.Response(status=429, headers={"Retry-After": "0.01"}, text="slow down")
        if how == "500":
            return web.Response(status=500, text="oops")
        if how == "html":
            return web.Response(text="<html>welcome</html>", content_type="text/html")
        if how == "silent":
            await asyncio.sleep(3600)
        if how == "half":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"choices": [{"mess')
            request.transport.close()
            return response
        if how == "zero":
            return chat("I am sorry, I cannot help with that.")
        return chat('{"principles": [], "rationale": "the lesson", "score": 0.9, "uncert')


def _refused(model: str, form: str, asked: dict) -> tuple[int, object] | None:
    """Returns status and error of a request that the model does not take."""
    if model == "no schemas" and form == "json_schema":
        return 400, "response_format json_schema is unknown"
    if model.startswith("no formats") and form != "none":
        return 400, "unknown field response_format"
    if model == "reasoning" and (names := {"max_tokens", "temperature"} & asked.keys()):
        return 400, {"message": f"Unsupported: {max(names)}", "param": max(names)}
    if model == "nothing of a process" and "how a student worked" in str(asked["messages"]):
        return 400, "content policy"
    return (401, "no such key") if model == "no key" else None


def opinion(model: str, asked: dict) -> str:
    """Returns what a judge says: scores of three decimals, all different unless they agree."""
    prompt = "".join(m["content"] for m in asked["messages"]) + str(asked.get("temperature"))
    number = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
    score = round(number % 1000 / 999, 3) if model != "agreeing" else 0.5 + number % 100 / 1000
    more = {"gives_away": "tell-tale" in prompt} if '"gives_away"' in prompt else {}
    text = json.dumps(
        {
            "principles": [{"name": "clear", "weight": 1.0, "description": "says it simply"}],
            "rationale": f"because of {number}", "score": score, "uncertainty": number % 30 / 100,
        } | more
    )  # fmt: skip
    return (
        f"<think>{{}} hm</think>Here you are:\n```json\n{text}\n```" if model == "chatty" else text
    )


def chat(text: str, finish_reason: str = "stop") -> web.Response:
    """Returns a chat completion."""
    return web.json_response(
        {
            "choices": [
                {
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": finish_reason,
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    judge = Judge(options.latency)
    app = web.Application(middlewares=[judge.watched])
    judge.add_routes(app)
    app.router.add_post("/v1/chat/completions", judge.reply)
    app.router.add_post("/moved/v1/chat/completions", _moved)
    app.router.add_get("/stats", lambda _: _stats(judge))
    asyncio.run(serve(app, options.port))


async def _moved(_: web.Request) -> web.Response:
    raise web.HTTPTemporaryRedirect("/v1/chat/completions")


async def _stats(judge: Judge) -> web.Response:
    return web.json_response(judge.stats)


async def serve(app: web.Application, port: int) -> None:
    """Serves until the process ends; prints the port."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.sleep(3600)


class Server:
    """The server as a test sees it."""

    def __init__(self, port: int = 0, latency: float = 0.0) -> None:
        command = [sys.executable, "-m", "tests.judge_server", f"--port={port}"]
        root = pathlib.Path(__file__).resolve().parents[1]
        self._process = subprocess.Popen(
            [*command, f"--latency={latency}"], stdout=subprocess.PIPE, text=True, cwd=root
        )
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict:
        """Returns how often it was asked and how."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=30) as reply:
            return json.load(reply)

    def kill(self) -> None:
        """Ends it as a crash would."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def running(port: int = 0, latency: float = 0.0) -> Iterator[Server]:
    """Yields a server of its own process."""
    server = Server(port, latency)
    try:
        yield server
    finally:
        server.kill()


if __name__ == "__main__":
    main()
