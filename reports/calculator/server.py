"""The calculator's HTTP server: pages, parts of pages, JSON and plan folders; it answers GET requests only."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from translution.planner.common import InputError, build_schemas, usable_cores

from .choice import Choice, ChoiceError, parse_choice
from .connections import ConnectionLimits, connection_settings
from .guard import LOOPBACK, RequestGuard, comes_from_other_site, error_response
from .pages import asset, free_choice, render_answer, render_page
from .result import Outcome, PlanView, costs_of, plan_zip
from .search_pool import QueueFullError, SearchEntry, SearchPool
from .verdict import COMPARE, Answer, PageChoice, parse_page

POLL_S = 8.0
"""Maximum time in seconds that a request waits for a plan."""
HEARTBEAT_S = 0.5
"""Seconds between two checks that a waiting client is still connected."""
MAX_WORKERS = 64
LIMITS = ConnectionLimits()
SHUTDOWN_S = 3
"""Time for responses in progress when the server shuts down."""


async def _choice_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ChoiceError)
    return error_response(422, error.message, error.field)


async def _queue_full(_: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFullError)
    return error_response(503, str(error), headers={"Retry-After": str(error.retry_s)})


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: "there is nothing at this address", 405: "only GET is allowed"}
    return error_response(error.status_code, texts.get(error.status_code, error.detail), headers=error.headers)


async def _internal_error(_: Request, error: Exception) -> Response:
    return error_response(500, f"the calculator failed ({type(error).__name__}); see the server's log")


def _raise_if_refused(outcome: Outcome) -> None:
    if outcome.state == "refused":
        raise ChoiceError(outcome.message, outcome.field)


class _Routes:
    """Handlers of the routes.

    Args:
        searches: searches that find the plans.
    """

    def __init__(self, searches: SearchPool) -> None:
        self._searches = searches

    async def _answer(self, choice: Choice, search: SearchEntry | None = None, label: str = "") -> Answer:
        """Return costs and outcome without waiting.

        Args:
            choice: the choice.
            search: its search; None starts one, or finds it.
            label: begins the line of an error.
        """
        try:
            costs = await run_in_threadpool(costs_of, choice)
            outcome = (search or self._searches.ask(choice)).outcome
            _raise_if_refused(outcome)
        except QueueFullError as error:
            outcome = Outcome(state="busy", message=str(error))
        except ChoiceError as error:
            raise ChoiceError(label + error.message, None if label else error.field) from None
        return Answer(choice, costs, outcome)

    async def _answers(self, page: PageChoice, *searches: SearchEntry) -> tuple[Answer, Answer | None, PlanView | None]:
        """Return what the page shows: the choice, choice A of a comparison, and the plan with the trade-off.

        Args:
            page: what the address asks for.
            searches: searches of the choice and of choice A, if they were waited for.
        """
        first, second = (*searches, None, None)[:2]
        answer = await self._answer(page.choice, first)
        other = None if page.other is None else await self._answer(page.other, second, f"{COMPARE}: ")
        free = free_choice(page)
        known = None if free == page.choice else self._searches.known(free)
        return answer, other, None if known is None else known.outcome.plan

    async def _wait(self, request: Request, *choices: Choice) -> list[SearchEntry]:
        """Return the searches of choices once all are done, or after `POLL_S`."""
        searches = []
        for choice in choices:
            await run_in_threadpool(costs_of, choice)  # Raises ChoiceError for an invalid choice.
            searches.append(self._searches.ask(choice))
        clock = asyncio.get_running_loop().time
        deadline = clock() + POLL_S
        for search in searches:
            while not self._searches.ending and clock() < deadline and not await request.is_disconnected():
                if await self._searches.wait(search, HEARTBEAT_S):
                    break
        return searches

    async def _outcome(self, request: Request) -> tuple[Choice, SearchEntry]:
        choice = parse_choice(request.query_params.multi_items())
        return choice, (await self._wait(request, choice))[0]

    async def home(self, request: Request) -> Response:
        """Return the page; a rejected choice is shown with its error.

        If another site chose, nothing is computed before the user presses the button: a page full of links or images
        could otherwise fill the queue with searches.
        """
        page = PageChoice(Choice())
        try:
            page = parse_page(request.query_params.multi_items())
            if page != PageChoice(Choice()) and comes_from_other_site(request.headers):
                return HTMLResponse(await run_in_threadpool(render_page, page, None, None))
            answer, other, front = await self._answers(page)
        except ChoiceError as error:
            return HTMLResponse(render_page(page, None, error), 422)
        return HTMLResponse(await run_in_threadpool(render_page, page, answer, None, other, front))

    async def answer(self, request: Request) -> Response:
        """Return the parts of the page that change with the form."""
        page = parse_page(request.query_params.multi_items())
        answer, other, front = await self._answers(page)
        return HTMLResponse(await run_in_threadpool(render_answer, page, answer, other, front))

    async def plan(self, request: Request) -> Response:
        """Return the same parts once the plans are found."""
        page = parse_page(request.query_params.multi_items())
        searches = await self._wait(request, page.choice, *([] if page.other is None else [page.other]))
        answer, other, front = await self._answers(page, *searches)
        return HTMLResponse(await run_in_threadpool(render_answer, page, answer, other, front))

    async def health(self, _: Request) -> Response:
        """Return whether the server can search, without a search."""
        state = self._searches.state
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    async def api_answer(self, request: Request) -> Response:
        """Return costs and outcome as JSON."""
        choice = parse_choice(request.query_params.multi_items())
        answer = await self._answer(choice)
        plan = answer.outcome.model_dump(mode="json")
        return JSONResponse({"choice": choice.model_dump(), "costs": answer.costs.model_dump(), "plan": plan})

    async def api_plan(self, request: Request) -> Response:
        """Return the outcome as JSON; the status is 202 while the search runs."""
        _, search = await self._outcome(request)
        outcome = search.outcome
        _raise_if_refused(outcome)
        return JSONResponse(outcome.model_dump(mode="json"), 202 if outcome.state == "searching" else 200)

    async def folder(self, request: Request) -> Response:
        """Return the plan folder as a zip file."""
        choice, search = await self._outcome(request)
        plan, outcome = search.plan, search.outcome
        _raise_if_refused(outcome)
        if outcome.state == "searching":
            return error_response(503, "the search is running: try again in 2 s", headers={"Retry-After": "2"})
        if plan is None:
            return error_response(409, outcome.message)
        name = f"plan-{choice.model}-{choice.nodes}x{choice.gpus}x{choice.gpu}.zip".replace("/", "-")
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(await run_in_threadpool(plan_zip, plan), media_type="application/zip", headers=headers)


def _asset(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(_: Request) -> Response:
        return Response(asset(name), media_type=kind)

    return send


def make_app(searches: SearchPool, hosts: Iterable[str] = (), *, any_address: bool = False) -> Starlette:
    """Return the application.

    Args:
        searches: searches; opened and closed with the application.
        hosts: host names that requests may use in addition to the loopback names. Others are rejected, so that no
            foreign page can reach the server through DNS rebinding.
        any_address: accept any IP address as host.
    """
    handlers = _Routes(searches)
    # Read the catalog and compile the templates now, not during the first request.
    start = Choice()
    render_page(PageChoice(start), Answer(start, costs_of(start), Outcome(state="searching")), None)
    build_schemas()  # Of all modules that are loaded by now: requests are answered in threads.

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        searches.open()
        yield
        await run_in_threadpool(searches.close)

    routes = {
        "/": handlers.home,
        "/answer": handlers.answer,
        "/plan": handlers.plan,
        "/plan.zip": handlers.folder,
        "/api/answer": handlers.api_answer,
        "/api/plan": handlers.api_plan,
        "/healthz": handlers.health,
        "/calculator.css": _asset("calculator.css", "text/css"),
        "/calculator.js": _asset("calculator.js", "text/javascript"),
    }
    return Starlette(
        routes=[Route(path, endpoint, methods=["GET"]) for path, endpoint in routes.items()],
        middleware=[
            Middleware(RequestGuard, frozenset((*LOOPBACK, *(host.lower() for host in hosts))), any_address=any_address)
        ],
        exception_handlers={
            ChoiceError: _choice_error,
            QueueFullError: _queue_full,
            HTTPException: _http_error,
            Exception: _internal_error,
        },
        lifespan=lifespan,
    )


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Args:
        host: name or address of an interface of this machine.
        port: port; 0 takes a free one.

    Raises:
        InputError: if the port is taken, or the host is not this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(f"--host: {host[:80]!r} is not allowed: must be a name or address of this machine") from None
    try:
        return socket.create_server((str(address[0]), int(address[1])), family=family, backlog=LIMITS.total)
    except OSError as error:
        allowed = "must be a free port of this machine" if port else "must be a name or address of this machine"
        raise InputError(f"--host {host} --port {port}: is not allowed: {allowed}: {error.strerror}") from None


class _Server(uvicorn.Server):
    """A server that releases the requests which wait for a plan when it is told to stop."""

    def __init__(self, config: uvicorn.Config, searches: SearchPool) -> None:
        super().__init__(config)
        self._searches = searches

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._searches.ending = True
        super().handle_exit(sig, frame)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def serve(host: str, port: int, *, workers: int | None, warm: bool, on_start: Callable[[str], None]) -> None:
    """Serve the calculator until Ctrl-C or SIGTERM.

    Args:
        host: interface to listen on.
        port: port to listen on; 0 takes a free one.
        workers: search processes; None starts one per core.
        warm: search in advance while idle.
        on_start: called once with the page's URL when the socket listens.

    Raises:
        InputError: if the port is taken, or the host is not this machine.
    """
    listener = open_socket(host, port)
    searches = SearchPool(workers or min(MAX_WORKERS, usable_cores()), warm=warm)
    config = uvicorn.Config(
        make_app(searches, (host, socket.gethostname()), any_address=not is_loopback(host)),
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=SHUTDOWN_S,
        **connection_settings(LIMITS),
    )
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, _interrupt) for number in signals]
    try:
        address = f"[{host}]" if ":" in host else host
        on_start(f"http://{address}:{listener.getsockname()[1]}/")
        _Server(config, searches).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn shuts down and then raises the signal again that stopped it.
    finally:
        listener.close()
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
