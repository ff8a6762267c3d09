"""``translution serve``."""

from __future__ import annotations

import ipaddress
import signal
import socket
import webbrowser
from types import FrameType
from typing import Annotated

import typer

from translution.planner.common.errors import InputError, MissingPackageError
from translution.planner.common.machine import usable_cores

from ..output import note
from . import app

MOST_WORKERS = 64
CONNECTIONS = 512
KEEP_ALIVE_S = 30
"""A reader who looks at a plan need not connect anew."""
GRACE_S = 3
"""For answers under way when the server is told to end."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: name or address of an interface of this machine.
        port: 0 takes a free one.

    Raises:
        InputError: if the port is taken, or the host is not this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(f"--host: {host[:80]!r} is not allowed: must be a name or address of this machine") from None
    try:
        return socket.create_server((str(address[0]), int(address[1])), family=family, backlog=CONNECTIONS)
    except OSError as error:
        allowed = "must be a free port of this machine" if port else "must be a name or address of this machine"
        raise InputError(f"--host {host} --port {port}: is not allowed: {allowed}: {error.strerror}") from None


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@app.command(
    "serve",
    epilog="Examples: **translution serve** · **translution serve --port 8080 --open** · "
    "**translution serve --host 0.0.0.0 --workers 4**",
)
def serve_cli(
    host: Annotated[str, typer.Option(help="Interface to listen on; only this machine by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Search processes; one per core by default.")
    ] = None,
    warm: Annotated[bool, typer.Option(help="While idle, search in advance for likely next choices.")] = True,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve a page where you choose a model, operator, cluster and batch, and see costs and the best plan."""
    try:
        import uvicorn

        from translution.reports.calculator.search_pool import SearchPool
        from translution.reports.calculator.server import make_app
    except ImportError as error:
        raise MissingPackageError(f"{error.name} is missing: pip install 'translution-scale[serve]'") from None
    listener = open_socket(host, port)
    port = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    if not is_loopback(host):
        note(f"--host {host}: anyone who reaches this machine may use the calculator; 127.0.0.1 is for you alone")
    searches = SearchPool(workers or min(MOST_WORKERS, usable_cores()), warm=warm)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            searches.ending = True  # Who waits for a plan is let go.
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        make_app(searches, (host, socket.gethostname()), any_address=not is_loopback(host)),
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    previous = [signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        print(f"http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
        if open_page:
            webbrowser.open(f"http://{shown}:{port}/")
        Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn raises anew, when all has ended, what told it to end.
    finally:
        listener.close()
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), previous, strict=True):
            signal.signal(number, handler)
