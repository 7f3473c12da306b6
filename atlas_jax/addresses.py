"""Addresses of servers, as options list them. Imports no JAX."""

from __future__ import annotations

import urllib.parse

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PORTS = {"http": 80, "https": 443}


def split(text: str) -> list[str]:
    """Returns the addresses of a comma-separated list, without trailing slashes."""
    return [part.strip().rstrip("/") for part in text.split(",") if part.strip()]


def canonical(address: str) -> str:
    """Returns the one spelling that all spellings of an address share.

    Raises:
        ValueError: if it is not an http address.
    """
    parts = urllib.parse.urlsplit(address)
    try:
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        port = None
    if parts.scheme not in _PORTS or not parts.hostname or port is None:
        raise ValueError(f"{address!r} is not the address of a server; write http://HOST:PORT")
    host = "localhost" if parts.hostname in _LOOPBACK else parts.hostname
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}"


def is_loopback(address: str) -> bool:
    """Returns whether an address is one of this host itself."""
    return urllib.parse.urlsplit(address).hostname in _LOOPBACK
