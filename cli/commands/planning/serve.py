"""``translution serve``."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from ...extras import requires_extra
from ...output import note
from .. import app


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
    with requires_extra("serve"):
        from translution.reports.calculator import is_loopback, serve

    def on_start(url: str) -> None:
        if not is_loopback(host):
            note(f"--host {host}: anyone who can reach this machine can use it; 127.0.0.1 restricts it to you")
        print(f"{url} (Ctrl-C ends it)", flush=True)
        if open_page:
            webbrowser.open(url)

    serve(host, port, workers=workers, warm=warm, on_start=on_start)
