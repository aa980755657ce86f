"""The judge against a real server on this machine that misbehaves: nothing is lost, nothing is paid twice."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from almost_jax import cli
from almost_jax.errors import InputError
from almost_jax.evaluation import judge, vicuna
from almost_jax.evaluation.duel import missing
from almost_jax.evaluation.judge import Endpoint, Judge, Reply, parse_scores
from almost_jax.evaluation.judge_prompts import SCORES, read_prompt
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.records import read_records, write_records

KEY = "sk-very-secret"
BOOTSTRAP = Bootstrap(200, 0)


class Server(ThreadingHTTPServer):
    """Answers chats; `faults` says what goes wrong at the n-th time of asking a content, `answer` what is said."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.release = threading.Event()
        self.fault: Callable[[str, int], str | None] = lambda text, time: None
        self.answer: Callable[[str], str] = lambda text: "8 6\nThe first is better."

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked[text] += 1
            self.server.keys.add(self.headers["authorization"])
            fault = self.server.fault(text, self.server.asked[text])
        if self.path != "/v1/chat/completions":
            fault = "404"
        if fault is not None and fault.isdigit():
            return self.send(int(fault), f'{{"error": "no {self.headers["authorization"]}"}}'.encode())
        if fault == "held":
            self.server.release.wait(60)
            self.close_connection = True
            return None
        if fault == "slow":
            time.sleep(1.5)
            self.close_connection = True
            return None
        if fault == "garbage":
            return self.send(200, b"<html>busy</html>")
        if fault == "empty":
            return self.send(200, b'{"choices": []}')
        if fault == "nested":
            return self.send(200, b"[" * 100_000)
        message = {"role": "assistant", "content": self.server.answer(text)}
        if fault == "null":
            message = {"role": "assistant", "content": None, "refusal": "I \x1b[31mrefuse."}
        data = json.dumps({"choices": [{"message": message}], "usage": {"total_tokens": 10}}).encode()
        if fault == "cut":
            return self.send(200, data, len(data) + 50)
        with self.server.lock:
            self.server.paid[text] += 1
        return self.send(200, data)

    def send(self, code: int, data: bytes, size: int | None = None) -> None:
        self.send_response(code)
        self.send_header("content-length", str(len(data) if size is None else size))
        # Said beforehand: a client that reuses a connection being closed would ask once more than the server hears.
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def endpoint(url: str, **changes: Any) -> Endpoint:
    settings: dict[str, Any] = {
        "model": "judge-1",
        "key_variable": "JUDGE_KEY",
        "timeout": 20.0,
        "attempts": 4,
        "pause": 0.01,
        "concurrency": 4,
        "reply_tokens": 100,
        "max_requests": 1000,
        "max_tokens": 1_000_000,
    }
    return Endpoint(url=url, **{**settings, **changes})


def chats(size: int) -> list[list[dict[str, str]]]:
    return [SCORES.messages(f"question {number}?", "one", "two") for number in range(size)]


def pairs(size: int) -> list[dict[str, Any]]:
    return [
        {"question_id": number, "question": f"question {number}?", "first": "a longer one", "second": "two"}
        for number in range(size)
    ]


@pytest.mark.parametrize("fault", ["429", "500", "503", "slow", "cut", "garbage", "empty", "nested"])
def test_a_fault_that_passes_loses_nothing_and_pays_once(server: Server, tmp_path: Path, fault: str) -> None:
    server.fault = lambda text, time: fault if time == 1 else None
    judge = Judge(endpoint(server.url, timeout=1.0 if fault == "slow" else 20.0), tmp_path)
    replies = judge.ask(chats(6))
    assert [reply.text for reply in replies] == ["8 6\nThe first is better."] * 6
    assert set(server.paid.values()) == {1} and len(server.paid) == 6
    assert judge.spent.requests == sum(server.asked.values()) == 12
    assert server.keys == {f"Bearer {KEY}"}
    again = Judge(endpoint(server.url), tmp_path)
    assert again.ask(chats(6)) == replies
    assert again.spent.requests == 0 and again.spent.cached == 6 and sum(server.asked.values()) == 12


@pytest.mark.parametrize("fault", ["429", "slow", "cut", "garbage"])
def test_a_fault_that_stays_is_kept_as_the_items_own_and_asked_again_alone(
    server: Server, tmp_path: Path, fault: str
) -> None:
    server.fault = lambda text, time: fault if "question 2?" in text else None
    hasty = endpoint(server.url, attempts=2, timeout=1.0 if fault == "slow" else 20.0)
    replies = Judge(hasty, tmp_path).ask(chats(4))
    assert [reply.text is None for reply in replies] == [False, False, True, False] and replies[2].error
    server.fault = lambda text, time: None
    again = Judge(endpoint(server.url), tmp_path)
    assert all(reply.text for reply in again.ask(chats(4))) and again.spent.requests == 1


def test_equal_chats_are_asked_once(server: Server, tmp_path: Path) -> None:
    judge = Judge(endpoint(server.url), tmp_path)
    assert len(judge.ask(chats(2) * 3)) == 6 and judge.spent.requests == 2
    other = Judge(endpoint(server.url, model="judge-2"), tmp_path)
    other.ask(chats(2))
    assert other.spent.requests == 2


def test_a_refusal_ends_the_run_keeps_what_came_and_hides_the_key(server: Server, tmp_path: Path) -> None:
    server.fault = lambda text, time: "401" if "question 3?" in text else None
    with pytest.raises(InputError, match=r"HTTP 401.*\[key\]") as error:
        Judge(endpoint(server.url, concurrency=1), tmp_path).ask(chats(4))
    assert KEY not in str(error.value)
    server.fault = lambda text, time: None
    again = Judge(endpoint(server.url), tmp_path)
    again.ask(chats(4))
    assert again.spent.cached == 3 and set(server.paid.values()) == {1}
    assert not any(KEY in path.read_text(encoding="utf-8") for path in tmp_path.iterdir())


def test_28_who_waits_to_ask_again_stops_with_the_call(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault = lambda text, time: "503"

    def interrupted(futures: Any) -> Any:
        while sum(server.asked.values()) < 4:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(judge, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Judge(endpoint(server.url, pause=60.0), tmp_path).ask(chats(4))
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize("fault", ["400", "413", "422", "null"])
def test_an_item_that_is_refused_is_final_and_stands_alone(server: Server, tmp_path: Path, fault: str) -> None:
    server.fault = lambda text, time: fault if "question 1?" in text else None
    judge = Judge(endpoint(server.url), tmp_path)
    items = vicuna.judge_pairs(pairs(3), judge)
    found = vicuna.summarize(items, BOOTSTRAP)
    assert (found["tie"], found["unparsed"], found["not_judged"]) == (2, 1, 0) and judge.spent.requests == 6
    shown = missing(items)
    assert len(shown) == 2 and all(KEY not in line and "\x1b" not in line for line in shown)
    said = r"no text ('I \x1b[31mrefuse.')" if fault == "null" else f"HTTP {fault}: '{{"
    assert shown[0].startswith(f"question 1: {said}")
    again = Judge(endpoint(server.url), tmp_path)
    assert vicuna.judge_pairs(pairs(3), again) == items and again.spent.requests == 0


def test_when_every_item_is_refused_it_is_not_the_items(server: Server, tmp_path: Path) -> None:
    server.fault = lambda text, time: "400"
    with pytest.raises(InputError, match=r"refused all that it was asked with HTTP 400: .*\[key\]") as error:
        Judge(endpoint(server.url), tmp_path).ask(chats(3))
    assert KEY not in str(error.value) and not list(tmp_path.iterdir())
    server.fault = lambda text, time: None
    assert all(reply.text for reply in Judge(endpoint(server.url), tmp_path).ask(chats(3)))


@pytest.mark.parametrize("code", ["401", "402", "403", "404"])
def test_a_refusal_of_the_caller_is_no_items_own(server: Server, tmp_path: Path, code: str) -> None:
    server.fault = lambda text, time: code if "question 1?" in text else None
    with pytest.raises(InputError, match=f"refused with HTTP {code}"):
        Judge(endpoint(server.url), tmp_path).ask(chats(3))


def test_half_a_surrogate_pair_in_a_reply_can_be_written(server: Server, tmp_path: Path) -> None:
    server.answer = lambda text: "8 6\nhalf \ud83d"
    for _ in range(2):
        (reply,) = Judge(endpoint(server.url), tmp_path).ask(chats(1))
        assert reply.text == "8 6\nhalf ?"
    assert sum(server.asked.values()) == 1


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_asked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "replies"):
        with pytest.raises(InputError, match="can't keep the judge's replies"):
            Judge(endpoint(server.url), folder)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--top-p", "0", "above 0"), ("--top-p", "1.5", "at most 1"), ("--top-p", "nan", "above 0"),
     ("--temperature", "inf", "finite")],
)  # fmt: skip
def test_bad_sampling_is_one_line(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments_of(server, tmp_path, pairs(1)), option, value])
    line = capsys.readouterr().err
    assert ended.value.code == 2 and f"{option} {value.removesuffix('.0')}" in line and said in line
    assert not server.asked


@pytest.mark.parametrize("cap", [{"max_requests": 3}, {"max_tokens": 1200}])
def test_the_cap_holds_and_a_further_run_goes_on(server: Server, tmp_path: Path, cap: dict[str, int]) -> None:
    judge = Judge(endpoint(server.url, **cap), tmp_path)
    replies = judge.ask(chats(40))
    answered = sum(reply.text is not None for reply in replies)
    assert 0 < answered == sum(server.asked.values()) < 40
    assert judge.spent.requests <= cap.get("max_requests", 40) and judge.spent.tokens <= 1200
    assert any("cap" in (reply.error or "") for reply in replies)
    Judge(endpoint(server.url), tmp_path).ask(chats(40))
    assert set(server.paid.values()) == {1} and len(server.paid) == 40


def test_no_server_is_told_for_each_item(tmp_path: Path) -> None:
    judge = Judge(endpoint("http://127.0.0.1:9/v1", attempts=2), tmp_path)
    assert all("no connection" in (reply.error or "") for reply in judge.ask(chats(2))) and judge.spent.tokens == 0


def test_statement_27_both_orders_disagreement_is_a_tie_and_unread_replies_are_never_scored(
    server: Server, tmp_path: Path
) -> None:
    def answer(text: str) -> str:
        straight = text.index("a longer one") < text.index("two\n")
        if "question 0?" in text:
            return "9 3" if straight else "3 9"
        if "question 1?" in text:
            return "9 3\nThe first is always better."
        if "question 2?" in text:
            return "5, 5\nEqual." if straight else "7/10 6/10"
        return "I prefer the first: 9 3" if straight else "3 9"

    server.answer = answer
    items = vicuna.judge_pairs(pairs(4), Judge(endpoint(server.url), tmp_path))
    assert [item["verdict"] for item in items] == ["win", "tie", "tie", None]
    assert [item["winners"] for item in items] == [[1, 1], [1, -1], [0, -1], [None, 1]]
    assert items[0]["scores"] == [[9.0, 3.0], [9.0, 3.0]]
    assert len(server.asked) == 8, "each pair is asked in both orders"
    found = vicuna.summarize(items, BOOTSTRAP)
    assert (found["win"], found["tie"], found["loss"], found["unparsed"], found["not_judged"]) == (1, 2, 0, 1, 0)
    assert found["win_rate"]["mean"] == pytest.approx(2 / 3) and found["win_rate"]["n"] == 3
    assert found["flips"] == {"pairs": 3, "disagreements": 2, "flips": 1, "first_place": 1}
    assert items[3]["replies"][0]["text"] == "I prefer the first: 9 3"
    again = Judge(endpoint(server.url), tmp_path)
    assert vicuna.judge_pairs(pairs(4), again) == items and again.spent.requests == 0, "an unread reply is paid too"


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 9\nwhy", (8, 9)),
        ("\n 7.5, 8\r\nwhy", (7.5, 8)),
        ("8/10 9/10", (8, 9)),
        ("8", None),
        ("8 9 7", None),
        ("11 9", None),
        ("-1 9", None),
        ("Assistant 1 gets 8 9", None),
        ("", None),
        ("89", None),
        ("why\n8 9", None),
    ],
)
def test_scores_are_two_numbers_on_the_first_line(text: str, scores: tuple[float, float] | None) -> None:
    assert parse_scores(text) == scores


def test_the_command_shows_what_it_could_not_read_and_goes_on(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = pairs(3)
    write_records(tmp_path / "q.jsonl", ({"question_id": one["question_id"], "text": one["question"]} for one in made))
    for side in ("first", "second"):
        rows = ({"question_id": one["question_id"], "text": one[side]} for one in made)
        write_records(tmp_path / f"{side}.jsonl", rows)
    arguments = ["judge", "--questions", str(tmp_path / "q.jsonl"), "--url", server.url, "--model", "judge-1"]
    for side in ("first", "second"):
        arguments += [f"--{side}", str(tmp_path / f"{side}.jsonl")]
    arguments += ["--out", str(tmp_path / "out"), "--key-variable", "JUDGE_KEY", "--pause", "0", "--attempts", "2"]
    server.fault = lambda text, time: "500" if "question 1?" in text else None
    server.answer = lambda text: "Both are fine." if "question 2?" in text else "8 6"
    for code in (1, 0):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == code
        shown = capsys.readouterr().out
        assert "question 2: no two scores: 'Both are fine.'" in shown and KEY not in shown
        assert ("question 1: HTTP 500" in shown) == (code == 1)
        server.fault = lambda text, time: None
    assert set(server.paid.values()) == {1} and len(server.paid) == 6
    items = read_records(tmp_path / "out" / "items.jsonl")
    assert [item["verdict"] for item in items] == ["tie", "tie", None]
    assert vicuna.judged_item(made[0], Reply("1 2"), Reply("2 1"))["verdict"] == "loss"


def arguments_of(server: Server, folder: Path, made: list[dict[str, Any]]) -> list[str]:
    """`evaluate vicuna` over two files of answers."""
    write_records(folder / "q.jsonl", ({"question_id": one["question_id"], "text": one["question"]} for one in made))
    for side in ("first", "second"):
        rows = ({"question_id": one["question_id"], "text": one[side]} for one in made)
        write_records(folder / f"{side}.jsonl", rows)
    given = {
        "--model": folder / "first.jsonl",
        "--against": folder / "second.jsonl",
        "--data": folder / "q.jsonl",
        "--judge": "judge-1",
        "--url": server.url,
        "--key-variable": "JUDGE_KEY",
        "--pause": 0,
        "--attempts": 2,
        "--out": folder / "vicuna.json",
    }
    return ["evaluate", "vicuna", *(str(part) for pair in given.items() for part in pair)]


@pytest.mark.parametrize("command", ["hhh", "truthfulqa", "vicuna", "judge"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("kept")
    arguments = ["evaluate", command, "--model", "none", "--out", str(tmp_path / "file" / "out.json")]
    if command == "vicuna":
        arguments += ["--against", "none", "--data", str(tmp_path / "none.jsonl"), "--judge", "judge-1"]
    elif command == "judge":
        sides = [part for side in ("questions", "first", "second") for part in (f"--{side}", str(tmp_path / "none"))]
        arguments = ["judge", *sides, "--model", "judge-1", "--out", str(tmp_path / "file")]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "file is no folder" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_evaluate_vicuna_keeps_what_it_paid_for(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments_of(server, tmp_path, pairs(4))
    server.fault = lambda text, time: ("429", "cut", "garbage", None)[int(text[text.index("?") - 1])]
    server.answer = lambda text: "No idea." if "question 3?" in text else "8 6"
    for code in (1, 0, 0):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == code
        shown = capsys.readouterr().out
        assert "question 3: no verdict in 'No idea.'" in shown and KEY not in shown
        server.fault = lambda text, time: None
    assert set(server.paid.values()) == {1} and len(server.paid) == 8
    found = json.loads((tmp_path / "vicuna.json").read_text(encoding="utf-8"))
    assert (found["win"], found["tie"], found["loss"], found["unparsed"]) == (0, 3, 0, 1)
    assert found["flips"] == {"pairs": 3, "disagreements": 3, "flips": 3, "first_place": 3}
    assert found["items"][0]["answers"] == ["a longer one", "two"] and found["length_controlled"]["n"] == 3


def test_reviews_are_compared_with_a_result_of_evaluate_vicuna(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments_of(server, tmp_path, pairs(3)))
    write_records(tmp_path / "reviews.jsonl", ({"question_id": number, "score": [7, 7]} for number in range(3)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["reviews", str(tmp_path / "reviews.jsonl"), "--against", str(tmp_path / "vicuna.json")])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["against"]["agreement"] == 1.0
    for content in ('{"items": 3}', '{"items": [{"verdict": "best", "question_id": 1}]}', "{"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SystemExit) as ended:
            cli.main(["reviews", str(tmp_path / "reviews.jsonl"), "--against", str(tmp_path / "bad.json")])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "bad.json" in said and said.count("\n") == 1


def test_28_a_killed_call_asks_only_for_what_is_missing(server: Server, tmp_path: Path) -> None:
    arguments = arguments_of(server, tmp_path, pairs(3))
    reached, release = threading.Event(), threading.Event()

    def fault(text: str, time: int) -> str | None:
        # Nothing is answered, and nothing paid, from the fourth request on.
        if len(server.asked) > 3:
            reached.set()
            return "held"
        return None

    server.fault, server.release = fault, release
    command = [sys.executable, "-m", "almost_jax", *arguments, "--concurrency", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert reached.wait(120)
        process.kill()
    release.set()
    server.fault = lambda text, time: None
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0 and len(server.paid) == 6 and set(server.paid.values()) == {1}
    assert sum(server.asked.values()) == 7, "the request that was under way is the one that is asked again"


def test_letters_are_read_with_prompts_of_fastchats_file(server: Server, tmp_path: Path) -> None:
    rows = [
        {
            "name": name,
            "type": kind,
            "system_prompt": "Judge.",
            "prompt_template": template,
            "output_format": "[[A]]",
        }
        for name, kind, template in (
            ("pair", "pairwise", "Q {question}\nA {answer_a}\nB {answer_b}"),
            ("math", "pairwise", "Q {question} {ref_answer_1} {answer_a} {answer_b}"),
            ("single", "single", "Q {question} {answer}"),
        )
    ]
    write_records(tmp_path / "prompts.jsonl", rows)
    for name, said in (("math", "'ref_answer_1'"), ("single", "expected a pairwise"), ("other", "it has pair, math")):
        with pytest.raises(InputError, match=said):
            read_prompt(tmp_path / "prompts.jsonl", name)
    prompt = read_prompt(tmp_path / "prompts.jsonl", "pair")

    def answer(text: str) -> str:
        straight = text.index("a longer one") < text.index("B ")
        if "question 0?" in text:
            return "Better: [[A]]" if straight else "So [[B]], as [[B]] said."
        if "question 1?" in text:
            return "[[A]]"
        return "[[C]]" if straight else "[[A]] or [[B]]"

    server.answer = answer
    items = vicuna.judge_pairs(pairs(3), Judge(endpoint(server.url), tmp_path / "replies"), prompt)
    assert [item["verdict"] for item in items] == ["win", "tie", None]
    assert [item["winners"] for item in items] == [[1, 1], [1, -1], [0, None]]
    assert items[0]["scores"] == [None, None]
