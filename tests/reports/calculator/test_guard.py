"""What pages of other sites can make the calculator do: show its form, but search nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from translution.reports.calculator.choice import Choice
from translution.reports.calculator.result import Outcome, WorkerResult
from translution.reports.calculator.search_pool import SearchEntry, SearchPool
from translution.reports.calculator.server import make_app

SMALL = "model=vit-tiny%2F56&gpus=2"
SITES = [
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"},  # another port of this machine
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    {"Referer": "http://attacker.example/page"},
    {"Origin": "null"},
    {"Origin": "http://["},
]
OWN = [
    {},
    {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
    {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Referer": "http://attacker.example/"},
    {"Referer": "http://LOCALHOST:80/?gpus=4", "Host": "localhost:80"},
]


class Asked(SearchPool):
    """Counts what it is asked for, and starts nothing."""

    def __init__(self) -> None:
        super().__init__(1, warm=False)
        self.asked: list[Choice] = []

    def ask(self, choice: Choice) -> SearchEntry:
        self.asked.append(choice)
        entry = SearchEntry(choice)
        entry.finish(WorkerResult(Outcome(state="stopped", message="a test").model_dump_json().encode(), None))
        return entry


def ask(path: str, headers: dict[str, str]) -> tuple[int, str, int]:
    """Return the status and the text of an answer, and how many searches it asked for."""
    searches, sent = Asked(), list[dict[str, Any]]()
    where, _, query = path.partition("?")
    lines = [(name.lower().encode(), value.encode()) for name, value in ({"Host": "localhost"} | headers).items()]
    scope = {
        "type": "http", "method": "GET", "path": where, "query_string": query.encode(), "headers": lines,
        "http_version": "1.1", "scheme": "http", "root_path": "",
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(make_app(searches)(scope, receive, send))
    searches.close()
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode(), len(searches.asked)


@pytest.mark.parametrize("headers", SITES, ids=lambda headers: " ".join(headers.values()))
def test_other_sites_start_no_search(headers: dict[str, str]) -> None:
    status, page, searches = ask(f"/?{SMALL}", headers)
    assert searches == 0
    if headers.get("Sec-Fetch-Mode") == "no-cors":
        assert status == 403
    else:
        assert status == 200
        assert "Another site made this choice. Press Calculate" in page
        assert '<option value="vit-tiny/56" selected>' in page
        assert 'id="plan"' not in page and "refresh" not in page
    for path in ("/answer", "/plan", "/plan.zip", "/api/answer", "/api/plan"):
        status, text, searches = ask(f"{path}?{SMALL}", headers)
        assert (status, searches) == (403, 0)
        assert "pages of other sites may link to the page" in text


@pytest.mark.parametrize("headers", OWN, ids=lambda headers: " ".join(headers.values()) or "none")
def test_the_own_page_typed_addresses_and_programs_start_searches(headers: dict[str, str]) -> None:
    for path in ("/", "/answer", "/plan", "/api/answer", "/api/plan"):
        status, text, searches = ask(f"{path}?{SMALL}", headers)
        assert (status, searches) == (200, 1)
        assert "Another site" not in text


def test_other_sites_may_link_to_the_start_page() -> None:
    status, page, searches = ask("/", SITES[0])
    assert (status, searches) == (200, 1)
    assert "Another site" not in page
