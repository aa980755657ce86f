"""The assumption audit: what it samples, how it judges rungs, and whom it asks."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

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


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A judge that prefers what is shown first, whatever it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            reply = json.dumps({"choices": [{"message": {"content": "9 2\nThe first."}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_27_a_judge_who_prefers_the_first_place_gives_ties_and_is_asked_once(
    auditing: Callable[..., Run], endpoint: str
) -> None:
    run = auditing(judge={"url": endpoint, "model": "judge", "pause": 0.0, "attempts": 1})
    summary = audit.run_stage(run)
    assert summary["A over B"]["judge"] == "noise"
    rung = json.loads(run.path("audit", "audit.json").read_text())["rungs"]["A over B"]["judge"]
    assert rung["mean"] == 0.5 and rung["n"] == 3 and rung["unparsed"] == rung["not_judged"] == 0
    assert "the judge agrees in 50% of n = 3" in said(run)
    replies = len(list(run.path("audit", "judge").iterdir()))
    # What is on disk is not asked again: without a server the same figures come out.
    again = auditing(judge={"url": endpoint, "model": "judge", "pause": 0.0, "attempts": 1, "max_requests": 1})
    audit.run_stage(again)
    assert len(list(run.path("audit", "judge").iterdir())) == replies <= 6
    assert json.loads(run.path("audit", "audit.json").read_text())["rungs"]["A over B"]["judge"] == rung
