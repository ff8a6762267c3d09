"""The pool that searches plans: its queue, time limit and searches while it is idle."""

from __future__ import annotations

import asyncio
import time

import pytest

from translution.reports.calculator.choice import Choice
from translution.reports.calculator.search_pool import QueueFullError, SearchPool

PATIENCE_S = 60.0


def test_queue_is_bounded_and_a_choice_is_searched_once() -> None:
    async def body() -> None:
        searches = SearchPool(1, warm=False, queue=2, limit_s=PATIENCE_S)
        searches.open()
        try:
            long = searches.ask(Choice(model="gpt-large/1024", nodes=64, minimize="nodes"))
            assert searches.ask(Choice(model="gpt-large/1024", nodes=64, minimize="nodes")) is long
            queued = [searches.ask(Choice(model="vit-tiny/56", gpus=gpus)) for gpus in (1, 2)]
            with pytest.raises(QueueFullError, match="2 searches are waiting"):
                searches.ask(Choice(model="vit-tiny/56", gpus=4))
            for entry in queued:
                entry.requested_at -= 60
            later = searches.ask(Choice(model="vit-tiny/56", gpus=4))  # No request waits for the two.
            assert [entry.outcome.state for entry in queued] == ["stopped", "stopped"]
            assert later.outcome.state == "searching"
        finally:
            searches.close()
        assert long.outcome.state == later.outcome.state == "stopped"

    asyncio.run(body())


@pytest.mark.slow
def test_search_beyond_its_time_limit_is_stopped_and_the_next_one_runs() -> None:
    async def body() -> None:
        searches = SearchPool(1, warm=False, limit_s=0.2)
        searches.open()
        try:
            # The search over 512 nodes takes seconds.
            long = searches.ask(Choice(model="gpt-large/1024", nodes=512, minimize="nodes"))
            assert await searches.wait(long, PATIENCE_S)
            assert long.outcome.state == "stopped"
            assert "stopped after 0.2 s" in long.outcome.message
            searches._limit_s = PATIENCE_S
            entry = searches.ask(Choice(model="vit-tiny/56", gpus=1))
            assert await searches.wait(entry, PATIENCE_S)
            assert entry.outcome.state == "found"
        finally:
            searches.close()

    asyncio.run(body())


@pytest.mark.slow
def test_idle_searches_cover_likely_choices_and_give_way_to_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine an idle search would take longer than it may.
    monkeypatch.setattr("translution.reports.calculator.search_pool.IDLE_LIMIT_S", PATIENCE_S)

    async def body() -> None:
        searches = SearchPool(1, warm=True)
        searches._popular = iter([Choice(model="vit-tiny/56", gpus=1)])
        searches.open()
        try:
            warmed = next(iter(searches._running.values()))
            asked = searches.ask(Choice(model="vit-tiny/56", operator="attention", gpus=1))
            assert await searches.wait(asked, PATIENCE_S)
            neighbour = Choice(model="vit-tiny/56", operator="attention", gpus=1, nodes=2)
            deadline = time.monotonic() + PATIENCE_S
            while warmed.state != "done" or neighbour not in searches._known:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        finally:
            searches.close()

    asyncio.run(body())
