"""Faults on demand of the tests' HTTP servers.

`POST /stand_in/faults` takes a list of faults, which replace those before; `GET /stand_in/calls`
returns the requests so far. A fault is an object with

    path      route that it is about; "" is all but /stand_in
    token     it is only about completions whose prompt has this token
    method    it is only about this method of `/collective_rpc`
    after     it begins after so many such requests
    times     it ends after so many requests; without it, it stays
    do        what happens:
        status    answers with `status` and `body`
        reply     answers with the JSON of `reply`
        hang      never answers
        slow      waits `secs`, then does as usual
        hold      waits for the `threading.Event` in `until`, then does as usual
        truncate  breaks the connection in the middle of the reply
        exit      the process ends
"""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from typing import Any

from aiohttp import web


class Faults:
    """What goes wrong at a server, and what it was asked.

    Attributes:
        faults: what goes wrong; see the module.
        calls: method, path, query and body of each request so far.
    """

    def __init__(self) -> None:
        """Nothing goes wrong yet."""
        self.faults: list[dict[str, Any]] = []
        self.calls: list[tuple[str, str, dict[str, Any], Any]] = []

    def add_routes(self, app: web.Application) -> None:
        """Adds the routes by which a test sets faults and reads calls."""
        app.router.add_post("/stand_in/faults", self._set_faults)
        app.router.add_get("/stand_in/calls", self._get_calls)

    @web.middleware
    async def watched(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Answers a request as the server does, unless a fault is about it."""
        if request.path.startswith("/stand_in"):
            return await handler(request)
        body = await request.json() if request.can_read_body else None
        self.calls.append((request.method, request.path, dict(request.query), body))
        fault = self._fault(request.path, body)
        return await self.fail(fault, request, handler) if fault else await handler(request)

    def _fault(self, path: str, body: Any) -> dict[str, Any]:
        """Returns the fault that this request meets, {} if none."""
        content = body or {}
        for fault in self.faults:
            meant = fault.get("path", "") in ("", path)
            meant &= fault.get("token") in (None, *content.get("token_ids", ()))
            meant &= fault.get("method") in (None, content.get("method"))
            if meant and fault.setdefault("after", 0) > 0:
                fault["after"] -= 1
            elif meant:
                fault["times"] = fault.get("times", float("inf")) - 1
                if not fault["times"]:
                    self.faults.remove(fault)
                return fault
        return {}

    async def fail(
        self, fault: dict[str, Any], request: web.Request, handler: Any
    ) -> web.StreamResponse:
        """Answers a request as a fault says."""
        match fault["do"]:
            case "status":
                return web.Response(status=fault["status"], text=fault.get("body", "out of order"))
            case "reply":
                return web.json_response(fault["reply"])
            case "hang":
                await asyncio.sleep(3600)
            case "slow":
                await asyncio.sleep(fault["secs"])
            case "hold":
                while not fault["until"].is_set():
                    await asyncio.sleep(0.01)
            case "truncate":
                response = web.StreamResponse(headers={"Content-Length": "1000"})
                await response.prepare(request)
                await response.write(b'{"choices": [')
                request.transport.close()
                return response
            case "exit":
                os._exit(1)
        return await handler(request)

    async def _set_faults(self, request: web.Request) -> web.Response:
        self.faults = await request.json()
        return web.json_response(None)

    async def _get_calls(self, _: web.Request) -> web.Response:
        return web.json_response(self.calls)


def post(url: str, path: str, body: Any = None) -> None:
    """Posts JSON to a server."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    urllib.request.urlopen(request, timeout=60).close()


def set_faults(url: str, faults: list[dict[str, Any]]) -> None:
    """Sets the faults of a server in another process."""
    post(url, "/stand_in/faults", faults)


def get(url: str) -> bytes:
    """Returns what is at an address."""
    with urllib.request.urlopen(url, timeout=60) as reply:
        return reply.read()


def calls(url: str) -> list[Any]:
    """Returns what a server in another process was asked so far."""
    return json.loads(get(f"{url}/stand_in/calls"))
