"""The calculator over HTTP and in a browser: immediate costs, the plan when it is found, and errors."""

from __future__ import annotations

import http.client
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import pytest
from helpers.browser import Browser
from helpers.waiting import PATIENCE_S, wait_until

from translution.cli.main import run
from translution.planner.plans.plan import load_plan
from translution.reports import calculator
from translution.reports.calculator.choice import Choice, parse_choice
from translution.reports.calculator.pages import query_of
from translution.reports.calculator.result import search_choice

SMALL = "model=vit-tiny%2F56&gpus=2"
OTHER = "model=vit-tiny%2F56&operator=attention&gpus=2"


class Server(NamedTuple):
    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].strip("/"))


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str | None]:
        return dict(json.loads(self.body)["error"])


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(scope="module", autouse=True)
def stop_servers() -> Iterator[None]:
    """Kill the servers of failed tests."""
    yield
    for process in _started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def start(*arguments: str, **environment: str) -> Server:
    command = [
        sys.executable,
        "-X",
        "dev",
        "-m",
        "translution.cli",
        "serve",
        "--port",
        "0",
        "--workers",
        "1",
        *arguments,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    _started.append(process)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://"), process.communicate()
    return Server(process, line.split(" ")[0])


def children(pid: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


def end(server: Server, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
    server.process.send_signal(number)
    _, errors = server.process.communicate(timeout=PATIENCE_S)
    # Python's development mode also reports what a busy machine delays.
    lines = [line for line in errors.splitlines(keepends=True) if not line.startswith("Executing <")]
    return server.process.returncode, "".join(lines)


def get(server: Server, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()


def plan_of(server: Server, query: str) -> dict[str, object]:
    answers: list[Answer] = []
    wait_until(lambda: answers.append(get(server, f"/api/plan?{query}")) or answers[-1].status != 202, every_s=0.0)
    answer = answers[-1]
    assert answer.status == 200, answer.body
    return dict(json.loads(answer.body))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = start("--no-warm")
    yield server
    code, errors = end(server)
    assert (code, errors) == (0, "")


@pytest.mark.slow
def test_costs_are_immediate_and_the_plan_follows(server: Server, tmp_path: Path) -> None:
    first = json.loads(get(server, f"/api/answer?{SMALL}").body)
    assert first["costs"]["operators"][0]["operator"] == "translution"
    assert first["plan"]["state"] == "searching"
    outcome = plan_of(server, SMALL)
    assert outcome["state"] == "found"
    again = json.loads(get(server, f"/api/answer?gpus=2&{SMALL.split('&')[0]}").body)
    assert again["plan"] == outcome
    archive = zipfile.ZipFile(io.BytesIO(get(server, f"/plan.zip?{SMALL}").body))
    archive.extractall(tmp_path)
    found = search_choice(Choice(model="vit-tiny/56", gpus=2)).plan
    assert found is not None
    assert load_plan(tmp_path / "plan").model_dump_json() == found.decode()


def test_concurrent_requests_for_a_choice_share_its_search(server: Server) -> None:
    with ThreadPoolExecutor(20) as pool:
        plans = [pool.submit(plan_of, server, OTHER) for _ in range(12)]
        others = [pool.submit(get, server, f"/answer?model=gpt-tiny/{length}") for length in range(100, 108)]
        assert all(future.result().status == 200 for future in others)
        assert len({json.dumps(future.result()) for future in plans}) == 1


@pytest.mark.parametrize(
    ("path", "status", "field", "text"),
    [
        ("/answer?modle=3", 422, None, "did you mean 'model'?"),
        ("/api/answer?dim=x", 422, "dim", "valid integer"),
        ("/plan?heads=5", 422, "heads", "must divide"),
        ("/api/plan?offload=nvme", 422, "nvme_path", "is required"),
        ("/plan.zip?gpu=H1", 422, "gpu", "did you mean"),
        ("/api/answer?model=%00%ff", 422, "model", "is not allowed"),
        ("/answer?" + "a" * 17000, 414, None, "too long"),
        ("/answer?compare=heads%3D5", 422, None, "compare: "),
        ("/plan?compare=modle%3D5", 422, None, "compare: unknown key 'modle'"),
        ("/api/answer?compare=gpus%3D2", 422, None, "unknown key 'compare'"),
        ("/answer?model_yaml=" + "a" * 4001, 422, "model_yaml", "at most 4000"),
        ("/answer?model_yaml=family:%20bert", 422, "model_yaml", "must be vit, gpt or video"),
        ("/answer?cluster_yaml=base:%20cpu:2", 422, "cluster_yaml", "must be a cluster of GPUs"),
        ("/plans", 404, None, "nothing at this address"),
        ("/../../etc/passwd", 404, None, "nothing at this address"),
    ],
)
def test_invalid_request_gets_an_error(server: Server, path: str, status: int, field: str | None, text: str) -> None:
    answer = get(server, path)
    assert answer.status == status
    assert answer.error["field"] == field
    assert text in str(answer.error["message"])
    assert answer.headers["content-type"] == "application/json"


def test_health_is_told_without_a_search(server: Server) -> None:
    answer = get(server, "/healthz")
    assert answer.status == 200
    state = json.loads(answer.body)
    assert (state["status"], state["workers"]) == ("ok", 1)
    assert {"running", "waiting"} <= set(state)
    assert get(server, "/healthz", Host="attacker.example").status == 400


def test_only_get_requests_for_its_own_host_names_are_accepted(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = get(server, "/", method)
        assert answer.status == 405
        assert "GET" in answer.headers["allow"]
    assert get(server, "/", Host="attacker.example").status == 400
    for foreign in ("192.0.2.1", "[", ""):
        assert "Host: " in str(get(server, "/", Host=foreign).error["message"])
    for own in (f"localhost:{server.port}", "[::1]", "LOCALHOST"):
        assert get(server, "/", Host=own).status == 200
    answer = get(server, "/", Origin="http://attacker.example")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_button_starts_the_search_that_another_site_chose(server: Server, browser: Browser) -> None:
    browser.open("data:text/html,other")
    browser.evaluate(f"setTimeout(() => location.assign('{server.url}?{OTHER}')) && true")
    asked = browser.wait(
        "location.hostname === '127.0.0.1' && document.readyState === 'complete' && "
        "document.getElementById('status')?.textContent"
    )
    assert "Press Calculate" in asked
    browser.evaluate("document.querySelector('#choice button').click()")
    assert "2 GPUs" in shown(browser)["Cluster"]


def test_page_without_scripts_includes_form_and_answer(server: Server) -> None:
    plan_of(server, SMALL)
    html = get(server, f"/?{SMALL}&stage=").body.decode()
    assert '<option value="vit-tiny/56" selected>' in html
    assert "Plan: ZeRO-" in html
    assert "GPU-hours" in html.split('<div class="columns">')[0]
    assert "https://arxiv.org/abs/2510.10060" in html
    assert 'http-equiv="refresh"' not in html
    refused = get(server, "/?heads=5")
    assert refused.status == 422
    assert "must divide dim 768" in refused.body.decode()


def shown(browser: Browser) -> dict[str, str]:
    """Return the terms and values of the plan, once it is found."""
    browser.wait("document.querySelector('#plan[data-state=found] dl') && !document.querySelector('.stale')")
    pairs = "[...document.querySelectorAll('#plan dl div')].map((e) => [...e.children].map((c) => c.innerText))"
    return {str(name): str(value) for name, value in browser.evaluate(pairs)}


def pick(browser: Browser, field: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const f = document.getElementById({field!r}); f.value = {value!r};"
        "f.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )


def test_changing_the_form_updates_plan_and_url(server: Server, browser: Browser) -> None:
    browser.open(f"{server.url}?{SMALL}")
    assert "2 GPUs" in shown(browser)["Cluster"]
    pick(browser, "operator", "attention")
    browser.wait(
        "document.querySelector('#operators tr.own th').textContent", lambda text: text.startswith("attention")
    )
    facts = shown(browser)
    assert browser.evaluate("location.search").lstrip("?").split("&") == OTHER.split("&")
    assert browser.wait("document.getElementById('status').textContent", lambda text: text.startswith("Fits: "))
    assert browser.evaluate("document.getElementById('command').innerText").startswith(
        "translution plan vit-tiny/56 --cluster 1x2xH100 --operator attention"
    )
    config = json.loads(browser.evaluate("document.getElementById('config').textContent"))
    micro, *_ = facts["Batch"].split(" ")
    assert config["train_micro_batch_size_per_gpu"] == int(micro)
    browser.call("Page.reload")
    assert (
        browser.wait("document.readyState === 'complete' && document.getElementById('operator').value") == "attention"
    )
    assert shown(browser) == facts
    assert browser.complaints() == []
    assert {url.split("?")[0] for url in browser.requests()} <= {
        server.url + name for name in ("", "answer", "plan", "calculator.css", "calculator.js")
    }


def test_invalid_value_is_reported_at_its_field(server: Server, browser: Browser) -> None:
    browser.open(f"{server.url}?{SMALL}")
    shown(browser)
    pick(browser, "heads", "5")
    error = browser.wait("document.getElementById('error-heads').innerText")
    assert "5 is not allowed: must divide dim 192" in error
    heads = "document.getElementById('heads')"
    assert browser.evaluate(f"{heads}.getAttribute('aria-invalid')") == "true"
    assert browser.evaluate(f"{heads}.closest('details').open")
    pick(browser, "heads", "")
    browser.wait("document.getElementById('error-heads').innerText === ''")
    assert browser.evaluate(f"{heads}.hasAttribute('aria-invalid')") is False
    shown(browser)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_page_fits_the_window_and_every_control_has_a_label(
    server: Server, browser: Browser, width: int, scheme: str
) -> None:
    browser.open(f"{server.url}?{SMALL}", width=width, scheme=scheme)
    shown(browser)
    assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    named = "[...document.forms[0].elements].filter((e) => e.name && e.type !== 'hidden')"
    nameless = f"{named}.filter((e) => !e.labels.length).map((e) => e.id)"
    assert browser.evaluate(nameless) == []
    tables = "[...document.querySelectorAll('table')].every((e) => e.caption.innerText !== undefined)"
    assert browser.evaluate(tables)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(13, 17, 23)" if scheme == "dark" else "rgb(255, 255, 255)")
    reached = []
    for _ in range(4):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(
            browser.evaluate("(({ id, className, href }) => id || className || href)(document.activeElement)")
        )
    assert reached == ["skip", "https://arxiv.org/abs/2510.10060", "keep", "model"]
    assert browser.complaints() == []


@pytest.mark.slow
def test_server_stops_with_its_workers_while_a_request_waits() -> None:
    server = start()  # Idle workers start searching at once.
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(get, server, "/plan?model=gpt-large/1024&nodes=64&minimize=nodes")
        family = wait_until(lambda: children(server.process.pid))
        assert end(server, signal.SIGINT) == (0, "")
        assert waiting.exception() is not None or waiting.result().status in (200, 503), waiting.result()
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in family))


@pytest.mark.slow
def test_public_server_warns_and_its_workers_end_with_it() -> None:
    server = start("--host", "0.0.0.0")
    assert get(server, "/calculator.css", Host="192.0.2.1:80").status == 200
    assert get(server, "/calculator.css", Host="attacker.example").status == 400
    family = wait_until(lambda: children(server.process.pid))
    server.process.kill()
    _, errors = server.process.communicate()
    assert errors.splitlines()[0].startswith("note: --host 0.0.0.0: anyone who can reach this machine")
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in family))


def test_open_shows_the_page_in_the_default_browser(tmp_path: Path) -> None:
    browser, told = tmp_path / "browser", tmp_path / "told"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {told}.part && mv {told}.part {told}\n')
    browser.chmod(0o755)
    server = start("--open", BROWSER=str(browser))
    wait_until(told.exists)
    assert told.read_text() == f"http://127.0.0.1:{server.port}/"
    assert end(server) == (0, "")


def test_taken_port_is_one_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "--port", str(port)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"--port {port}: is not allowed" in captured.err
    assert run(["serve", "--host", "no.such.host.invalid"]) == 2
    assert "--host: 'no.such.host.invalid' is not allowed" in capsys.readouterr().err


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # An earlier test may have loaded the module, and the package caches names that were used.
    monkeypatch.delitem(sys.modules, "translution.reports.calculator.server", raising=False)
    for name in ("serve", "is_loopback"):
        monkeypatch.delitem(vars(calculator), name, raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["serve"]) == 2
    assert "uvicorn is missing: pip install 'translution-scale[serve]'" in capsys.readouterr().err


def test_committed_figures_match_the_benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    benchmark = runpy.run_path(str(root / "benchmarks" / "serve.py"))
    results = root / "benchmarks" / "results"
    document = json.loads((results / "serve.json").read_text())
    assert (results / "serve.md").read_text() == benchmark["render"](document)
    assert document["users"] == 20
    for name, values in benchmark["FIELDS"].items():
        for value in values:
            choice = Choice().replacing(**{name: value})
            assert parse_choice(parse_qsl(query_of(choice))) == choice
