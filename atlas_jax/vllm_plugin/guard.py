"""Middleware of vLLM's front end that requires the server's token on every route but `/health`.

vLLM's own check (VLLM_API_KEY) covers only the routes below /v1 and /inference. It leaves open the
development routes, which pause the server, load weights and call methods of its workers.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

_REFUSAL = b'{"error":"Unauthorized"}'


class Guard:
    """ASGI middleware that answers 401 to a request without `Authorization: Bearer TOKEN`."""

    def __init__(self, app: Any) -> None:
        """Reads the token from VLLM_API_KEY, which neither flags nor /server_info show."""
        self._app = app
        self._token = os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._knows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})

    def _knows(self, scope: Any) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = (values or [b""])[0].partition(b" ")
        # In constant time: the time of an answer must not tell anything about the token.
        return scheme.lower() == b"bearer" and hmac.compare_digest(token, self._token)
