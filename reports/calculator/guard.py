"""What the calculator refuses before it looks at a choice: long addresses, other host names, other sites' requests."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_QUERY_LENGTH = 16384
"""Characters of a query, which may hold two pasted texts, percent-encoded."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_OWN_SITE = ("same-origin", "none")
"""Values of Sec-Fetch-Site for requests of the calculator's page, and for addresses that a person typed."""


def error_response(
    status: int, message: str, field: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an error as JSON.

    Args:
        status: status of the response.
        message: error line.
        field: form field that the line is about, if any.
        headers: further headers.
    """
    return JSONResponse({"error": {"field": field, "message": message}}, status, headers)


def _host_of(header: str) -> str:
    """Return the name or address in a Host header; empty if there is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def comes_from_other_site(headers: Headers) -> bool:
    """Return True if a page of another origin caused a request: a link, a form, an image or a script.

    Browsers say so in Sec-Fetch-Site; older ones in Origin or Referer. A request without any of them, such as curl's,
    comes from no page.

    Args:
        headers: headers of the request.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in _OWN_SITE
    source = headers.get("origin") or headers.get("referer")
    if source is None:
        return False
    try:
        return urlsplit(source).netloc.lower() != headers.get("host", "").lower()
    except ValueError:
        return True


class RequestGuard:
    """Middleware that adds the common headers and rejects long URLs, other host names, and requests by other sites.

    Other sites may link to the page, which then waits for its button.

    Args:
        app: application that answers accepted requests.
        names: host names that requests may use for this server.
        any_address: accept any IP address as host too; DNS rebinding needs a name, so addresses are safe.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str], *, any_address: bool) -> None:
        self._app, self._names, self._any_address = app, names, any_address

    def _rejection(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if len(scope["query_string"]) > MAX_QUERY_LENGTH or len(scope["path"]) > MAX_QUERY_LENGTH:
            return error_response(414, f"the address is too long: at most {MAX_QUERY_LENGTH} characters after the ?")
        host = _host_of(headers.get("host", ""))
        if host not in self._names and not (self._any_address and _is_address(host)):
            return error_response(400, f"Host: {host[:60]!r} is not allowed: must be a name or address of this server")
        opens_page = scope["path"] == "/" and headers.get("sec-fetch-mode", "navigate") == "navigate"
        if comes_from_other_site(headers) and not opens_page:
            return error_response(403, "pages of other sites may link to the page, but not send requests")
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with a rejection, or let the application do it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        await (self._rejection(scope) or self._app)(scope, receive, send_with_headers)
