"""Limits of the calculator's connections: time for a request and between two, and a share for each client.

uvicorn ends connections that are idle after a response, but waits without limit for the first request, for the rest of
one, and for clients that do not read. A client that opens connections and sends nothing would lock everyone out.
"""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a client may hold, and for how long."""

    total: int = 512
    """Connections of all clients."""
    per_client: int = 64
    """Connections of one client, which is an IPv4 address or an IPv6 network of 64 bits."""
    request_s: float = 10.0
    """Seconds until a request is complete, from the connection or from its first byte."""
    response_s: float = 60.0
    """Seconds until its response is sent; a request waits for a plan for less."""
    idle_s: int = 30
    """Seconds between a response and the next request; long enough for a reader who studies a plan."""


def client_of(address: str) -> str:
    """Return the client that an address belongs to: itself, or the IPv6 network of 64 bits, which one host can have."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 4 or found.is_loopback:
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))


class LimitedConnection(H11Protocol):
    """A connection that is cut at its limits, and makes room for itself by cutting those that wait for a request."""

    limits = ConnectionLimits()
    owner = ""
    """The client that opened the connection."""
    waiting_since: float | None = None
    """Time since which the connection has had no request to answer; None while it has one."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        """Start the time of the first request; close a connection beyond the share, or one that waits in its place."""
        super().connection_made(transport)
        self.owner = client_of(self.client[0]) if self.client else ""
        others = [other for other in self.connections if isinstance(other, LimitedConnection) and other is not self]
        own = [other for other in others if other.owner == self.owner]
        if len(own) >= self.limits.per_client and not _cut_longest_waiting(own):
            self.cut()
            return
        if len(others) >= self.limits.total:
            _cut_longest_waiting(others)
        self.waiting_since = self.loop.time()
        self._limit(self.limits.request_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time."""
        self._limit(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Start the time of a later request with its first byte."""
        if self._timer is None:
            self._limit(self.limits.request_s)
        super().data_received(data)

    def handle_events(self) -> None:
        """Start the time of a response when its request is complete."""
        super().handle_events()
        if self.waiting_since is not None and self.cycle is not None and not self.cycle.response_complete:
            self.waiting_since = None
            self._limit(self.limits.response_s)

    def on_response_complete(self) -> None:
        """Stop the time of the response; uvicorn limits the time until the next request."""
        self.waiting_since = self.loop.time()
        self._limit(None)
        super().on_response_complete()

    def cut(self) -> None:
        """Close the connection at once."""
        self._limit(None)
        self.connections.discard(self)
        self.transport.abort()

    def _limit(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.cut)


def _cut_longest_waiting(connections: list[LimitedConnection]) -> bool:
    """Cut the connection that has waited for a request for the longest time; return False if all have one."""
    waiting = [(one.waiting_since, id(one), one) for one in connections if one.waiting_since is not None]
    if waiting:
        min(waiting)[2].cut()
    return bool(waiting)


def connection_settings(limits: ConnectionLimits) -> dict[str, Any]:
    """Return the settings of uvicorn for connections with limits."""
    return {
        "http": type("Connection", (LimitedConnection,), {"limits": limits}),
        # Beyond it, requests get 503; a connection that waits for its request has made room before.
        "limit_concurrency": limits.total + 1,
        "timeout_keep_alive": limits.idle_s,
    }
