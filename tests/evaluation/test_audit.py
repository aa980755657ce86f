"""The assumption audit: what it samples, how it judges rungs, and whom it asks."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from almost_jax.errors import InputError
from almost_jax.evaluation import audit
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.stages.comparisons import run_responses


@pytest.fixture
def auditing(home: Path, tmp_path: Path, make_run: Callable[..., Run]) -> Callable[..., Run]:
    folder = tmp_path / "run"
    shutil.copytree(home / "run", folder, ignore=lambda *_: ["evaluation"])
    return lambda **settings: make_run(folder, home, audit={"queries": 3, "bootstrap_samples": 99, **settings})


def said(run: Run) -> str:
    return str(run.console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("ci95", "expected"),
    [([0.51, 0.7], "holds"), ([0.5, 0.7], "noise"), ([0.3, 0.5], "noise"), ([0.2, 0.49], "reversed")],
)
def test_a_rung_holds_when_its_interval_is_above_one_half(ci95: list[float], expected: str) -> None:
    assert audit.verdict(ci95) == expected


@pytest.mark.parametrize(("n", "expected"), [(3, "noise"), (5, "noise"), (6, "holds")])
def test_a_handful_that_all_agree_shows_nothing(auditing: Callable[..., Run], n: int, expected: str) -> None:
    queries = [{"id": f"q{number}"} for number in range(n)]
    items = [
        {"query_id": query["id"], "system": f"configuration/{name}", "text": "x", "as_is": score}
        for query in queries
        for name, score in (("A", 1.0), ("B", 0.0))
    ]
    found = audit.analyse(auditing(), queries, items)["rungs"]["A over B"]["as_is"]
    assert found["mean"] == 1.0 and found["verdict"] == expected


def test_it_draws_what_the_responses_will_be_and_resumes_to_the_byte(auditing: Callable[..., Run]) -> None:
    run = auditing()
    summary = audit.run_stage(run)
    assert summary["queries"] == 3 and set(summary["A over B"]) == {"as_is"}
    drawn = read_records(run.path("audit", "responses.jsonl"))
    assert len(drawn) == 6
    run_responses(run)
    later = {(r["configuration"], r["query_id"]): r["text"] for r in read_records(run.path("responses.jsonl"))}
    assert len(later) == 10
    for record in drawn:
        assert record["text"] == later[record["configuration"], record["query_id"]]

    figures = json.loads(run.path("audit", "audit.json").read_text())
    rung = figures["rungs"]["A over B"]
    assert rung["rule"] == "shots" and rung["as_is"]["n"] == 3
    assert rung["as_is"]["verdict"] == audit.verdict(rung["as_is"]["ci95"])
    whole = {path.name: path.read_bytes() for path in run.path("audit").iterdir()}
    shutil.rmtree(run.path("audit"))
    run.path("audit").mkdir()
    run.path("audit", "responses.jsonl.partial").write_bytes(whole["responses.jsonl"][:450])
    audit.run_stage(auditing())
    assert {path.name: path.read_bytes() for path in run.path("audit").iterdir()} == whole


def test_warnings_name_the_rung_the_figures_and_who_was_asked() -> None:
    found = {"mean": 0.41, "ci95": [0.3, 0.48], "n": 50, "verdict": "reversed"}
    good = {"mean": 0.8, "ci95": [0.7, 0.9], "n": 50, "verdict": "holds"}
    noise = {"mean": 0.52, "ci95": [0.4, 0.64], "n": 48, "verdict": "noise"}
    rungs = {"A over B": {"rule": "size", "as_is": good, "judge": noise}, "B over C": {"rule": "shots", "as_is": found}}
    assert audit.warnings({"rungs": rungs}) == [
        "audit: warning: A over B (size): the judge agrees in 52% of n = 48 (95% 40% to 64%): can't be told from a "
        "coin",
        "audit: warning: B over C (shots): the as-is reward model agrees in 41% of n = 50 (95% 30% to 48%): the rule "
        "is the wrong way round",
    ]


def test_with_nobody_to_ask_it_says_so(auditing: Callable[..., Run]) -> None:
    run = auditing()
    shutil.rmtree(run.path("as_is_reward"))
    assert audit.run_stage(run) == {"queries": 3, "A over B": {}}
    assert "nothing can say whether the rule of thumb holds" in said(run)
    assert set(json.loads(run.path("audit", "audit.json").read_text())["rungs"]["A over B"]) == {"longer", "rule"}


def test_off_it_does_nothing(auditing: Callable[..., Run]) -> None:
    run = auditing(queries=0)
    assert audit.run_stage(run) == {"queries": 0}
    assert not run.path("audit").exists()


class Asked(ThreadingHTTPServer):
    """A judge that prefers what is shown first, whatever it is, up to `patience` requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.requests = 0
        self.patience = 1000


class Handler(BaseHTTPRequestHandler):
    server: Asked

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.requests += 1
        reply = json.dumps({"choices": [{"message": {"content": "9 2\nThe first."}}]}).encode()
        self.send_response(200 if self.server.requests <= self.server.patience else 503)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    running = Asked()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_27_a_judge_who_prefers_the_first_place_gives_ties_and_is_asked_once(
    auditing: Callable[..., Run], server: Asked
) -> None:
    judge = {"url": server.url, "model": "judge", "pause": 0.0, "attempts": 1}
    run = auditing(judge=judge)
    summary = audit.run_stage(run)
    assert summary["A over B"]["judge"] == "noise"
    figures = json.loads(run.path("audit", "audit.json").read_text())
    rung = figures["rungs"]["A over B"]["judge"]
    assert rung["mean"] == 0.5 and rung["n"] == 3 and rung["unparsed"] == 0
    assert "the judge agrees in 50% of n = 3" in said(run)
    for name in "AB":
        scores = figures["configurations"][name]["judge"]
        assert scores["mean"] == 5.5 and scores["n"] == 6
        assert figures["configurations"][name]["as_is"]["n"] == 3
    assert 0 < server.requests <= 6
    # What is on disk is not asked again, even when the stage starts anew: without a server the same figures come out.
    asked, server.patience = server.requests, 0
    shutil.rmtree(run.path("audit"))
    audit.run_stage(auditing(judge={**judge, "max_requests": 1}))
    assert server.requests == asked
    assert json.loads(run.path("audit", "audit.json").read_text()) == figures


def test_pairs_without_a_reply_are_asked_again(auditing: Callable[..., Run], server: Asked) -> None:
    judge = {"url": server.url, "model": "judge", "pause": 0.0, "attempts": 1, "concurrency": 1}
    server.patience = 1
    run = auditing(judge=judge)
    with pytest.raises(InputError, match=r"audit.judge: \d pairs have no reply yet \(question .*HTTP 503\); the same"):
        audit.run_stage(run)
    assert not run.path("audit", "audit.json").exists()
    asked, server.patience = server.requests, 1000
    audit.run_stage(run)
    assert server.requests == 2 * asked - 1, "what came is not asked again"
    assert json.loads(run.path("audit", "audit.json").read_text())["rungs"]["A over B"]["judge"]["n"] == 3
