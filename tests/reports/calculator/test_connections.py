"""Limits of connections: silent and slow ones are cut, and one client leaves room for the others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from translution.reports.calculator.connections import ConnectionLimits, client_of, connection_settings

LONG_S = 600.0
Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Site:
    """A server whose answers wait for `free`."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.free, self.requests = asyncio.Event(), 0
        self._limits, self._opened = limits, list[Pair]()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += 1
        if scope["path"] == "/wait":
            await self.free.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Site]:
        config = uvicorn.Config(
            self._app, interface="asgi3", lifespan="off", log_level="critical", **connection_settings(self._limits)
        )
        config.load()
        state = uvicorn.server.ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: config.http_protocol_class(config=config, server_state=state, app_state={}, _loop=loop),
            "0.0.0.0",
            0,
        )
        self.port, self.state = server.sockets[0].getsockname()[1], state
        try:
            yield self
        finally:
            self.free.set()
            for _, writer in self._opened:
                writer.close()
            server.close()
            for connection in list(state.connections):
                connection.transport.abort()
            await asyncio.gather(*state.tasks, return_exceptions=True)

    async def connect(self, client: str = "127.0.0.1", sent: bytes = b"") -> Pair:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(client, 0))
        self._opened.append((reader, writer))
        writer.write(sent)
        return reader, writer


async def answered(pair: Pair, request: bytes = REQUEST) -> bool:
    reader, writer = pair
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(2) == b"ok"
    return head.startswith(b"HTTP/1.1 200 ")


async def is_cut(pair: Pair) -> bool:
    try:
        return await pair[0].read() == b""
    except ConnectionError:
        return True


def with_site(limits: ConnectionLimits, body: Callable[[Site], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), Site(limits).serving() as site:
            await body(site)

    asyncio.run(run())


def test_silent_connections_keep_no_other_client_out_and_not_even_their_own() -> None:
    limits = ConnectionLimits(total=16, per_client=4, request_s=LONG_S)

    async def body(site: Site) -> None:
        silent = [await site.connect() for _ in range(40)]
        assert await answered(await site.connect("127.0.0.2"))
        assert await answered(await site.connect())
        assert all([await is_cut(pair) for pair in silent[:36]])
        assert len(site.state.connections) == 5

    with_site(limits, body)


def test_clients_together_stay_below_the_total() -> None:
    limits = ConnectionLimits(total=8, per_client=4, request_s=LONG_S)

    async def body(site: Site) -> None:
        silent = [await site.connect(f"127.0.0.{number}") for number in range(2, 14)]
        assert await answered(await site.connect())
        assert all([await is_cut(pair) for pair in silent[:5]])
        assert len(site.state.connections) == 8

    with_site(limits, body)


def test_a_client_whose_connections_all_wait_for_answers_gets_no_more() -> None:
    limits = ConnectionLimits(total=16, per_client=2, request_s=LONG_S)

    async def body(site: Site) -> None:
        waiting = [await site.connect(sent=REQUEST.replace(b"/ ", b"/wait ", 1)) for _ in range(2)]
        while site.requests < 2:
            await asyncio.sleep(0)
        assert await is_cut(await site.connect())
        assert await answered(await site.connect("127.0.0.2"))
        site.free.set()
        assert all([await answered(pair, b"") for pair in waiting])

    with_site(limits, body)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", REQUEST], ids=["silent", "slow", "second"])
def test_a_request_that_does_not_come_in_time_is_cut(sent: bytes) -> None:
    async def body(site: Site) -> None:
        began = time.monotonic()  # The limit of the first request begins with the connection.
        pair = await site.connect()
        if sent == REQUEST:
            assert await answered(pair)
            pair[1].write(b"GET /")  # uvicorn limits only the time before the first byte.
        else:
            pair[1].write(sent)

        async def drip() -> None:
            while not pair[1].is_closing():
                pair[1].write(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip()) if sent else None
        assert await is_cut(pair)
        assert time.monotonic() - began >= 0.1
        if dripping is not None:
            dripping.cancel()

    with_site(ConnectionLimits(request_s=0.1), body)


def test_a_response_that_takes_too_long_is_cut_and_an_ordinary_client_is_not() -> None:
    async def body(site: Site) -> None:
        pair = await site.connect()
        assert await answered(pair)
        assert await answered(pair)
        assert await is_cut(await site.connect(sent=REQUEST.replace(b"/ ", b"/wait ", 1)))
        assert await answered(pair)

    with_site(ConnectionLimits(request_s=LONG_S, response_s=0.1), body)


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("testclient", "testclient"),
    ],
)
def test_a_client_is_an_address_or_an_ipv6_network(address: str, client: str) -> None:
    assert client_of(address) == client
