"""Ports of the ranks of this machine."""

from __future__ import annotations

import socket

import pytest

from translution.distributed.system import environment
from translution.planner.common.errors import InputError


def test_a_free_port_is_none_that_connections_get() -> None:
    """Between its choice and its use, a connection of another process would take such a port."""
    ports = {environment.free_port() for _ in range(20)}
    assert len(ports) > 10
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert max(ports) < 32_768 <= server.getsockname()[1]


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    free = environment.free_port()
    with socket.create_server(("127.0.0.1", environment.free_port())) as server:
        used = server.getsockname()[1]
        monkeypatch.setattr(environment, "_PORTS", (used, free))
        assert {environment.free_port() for _ in range(10)} == {free}
        monkeypatch.setattr(environment, "_PORTS", (used,))
        with pytest.raises(InputError, match=f"no port from {used} to {used} is free"):
            environment.free_port()
