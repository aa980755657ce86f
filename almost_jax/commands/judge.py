"""judge: two models' answers before a judge over HTTP; reviews: recorded reviews, and agreement with another judge."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from almost_jax.commands.places import on_disk
from almost_jax.errors import InputError
from almost_jax.evaluation import vicuna
from almost_jax.evaluation.judge import Endpoint, Judge
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.records import Record, check_writable, read_records, write_bytes, write_records

_SHOWN = 5

Questions = Annotated[Path, typer.Option(help="JSON lines of question_id and text or turns.", callback=on_disk)]
First = Annotated[
    Path, typer.Option(help="Answers of the model whose wins are counted: question_id, text.", callback=on_disk)
]
Second = Annotated[Path, typer.Option(help="Answers of the model it is held against.", callback=on_disk)]
Out = Annotated[
    Path, typer.Option(help="The folder for items.jsonl, summary.json and the cache of replies.", callback=on_disk)
]
Samples = Annotated[int, typer.Option(min=1, help="Bootstrap resamples.")]
Seed = Annotated[int, typer.Option(min=0, help="The seed of the resamples.")]


def vicuna_command(
    questions: Questions,
    first: First,
    second: Second,
    out: Out,
    model: Annotated[str, typer.Option(help="The judge's name at the endpoint.")],
    url: Annotated[str, typer.Option(help="The endpoint's base.")] = "https://api.openai.com/v1",
    key_variable: Annotated[str, typer.Option(help="The environment variable with the key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(help="Requests in flight at once.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a reply.")] = 120.0,
    attempts: Annotated[int, typer.Option(help="Tries of one item.")] = 6,
    pause: Annotated[float, typer.Option(min=0, help="Seconds before the second try; doubled each time.")] = 1.0,
    reply_tokens: Annotated[int, typer.Option(help="The most tokens of a reply.")] = 1024,
    max_requests: Annotated[int, typer.Option(min=0, help="The most requests of this run.")] = 400,
    max_tokens: Annotated[int, typer.Option(min=0, help="The most tokens of this run.")] = 1_000_000,
    samples: Samples = 1000,
    seed: Seed = 0,
) -> None:
    """Judge two models' answers in both orders over an OpenAI-compatible endpoint; replies on disk cost nothing."""
    endpoint = Endpoint(
        url=url,
        model=model,
        key_variable=key_variable,
        timeout=timeout,
        attempts=attempts,
        pause=pause,
        concurrency=concurrency,
        reply_tokens=reply_tokens,
        max_requests=max_requests,
        max_tokens=max_tokens,
    )
    for name in ("items.jsonl", "summary.json"):
        check_writable(out / name)
    judge = Judge(endpoint, out / "replies")
    items = vicuna.judge_pairs(vicuna.read_pairs(questions, first, second), judge)
    write_records(out / "items.jsonl", items)
    summary = vicuna.summarize(items, Bootstrap(samples, seed))
    write_bytes(out / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
    _print({**summary, "spent": asdict(judge.spent)}, items)
    if summary["not_judged"]:
        typer.echo(f"{summary['not_judged']} pairs have no verdict yet; the same command asks for what is missing")
        raise typer.Exit(1)


def reviews_command(
    reviews: Annotated[Path, typer.Argument(help="Recorded FastChat reviews.", metavar="REVIEWS", callback=on_disk)],
    questions: Annotated[
        Path | None, typer.Option(help="The questions, for rates at equal length.", callback=on_disk)
    ] = None,
    first: Annotated[Path | None, typer.Option(help="The first model's answers.", callback=on_disk)] = None,
    second: Annotated[Path | None, typer.Option(help="The second model's answers.", callback=on_disk)] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="What another judge said, to compare with: items.jsonl, the file of evaluate vicuna, or reviews.",
            callback=on_disk,
        ),
    ] = None,
    samples: Samples = 1000,
    seed: Seed = 0,
) -> None:
    """Count recorded reviews (one order each), and say how far another judge agrees with them."""
    pairs: list[Record] = []
    if questions and first and second:
        pairs = vicuna.read_pairs(questions, first, second)
    elif questions or first or second:
        raise InputError("--questions, --first and --second belong together; give all three or none")
    items = vicuna.read_reviews(reviews, pairs)
    found: dict[str, Any] = vicuna.summarize(items, Bootstrap(samples, seed))
    if against:
        found["against"] = vicuna.compare_judges(items, _items(against))
    _print(found, items)


def _items(path: Path) -> list[Record]:
    """Items that `judge` wrote, or those of a result of `evaluate vicuna`, or reviews."""
    records = _of_a_result(path)
    if records is None:
        records = read_records(path)
    if not records or not all("verdict" in record for record in records):
        return vicuna.read_reviews(path)
    for number, record in enumerate(records, start=1):
        if record["verdict"] not in (*vicuna.VERDICTS, None) or "question_id" not in record:
            raise InputError(f"{path}, record {number}: verdict is {record['verdict']!r}; expected win, tie or loss")
    return records


def _of_a_result(path: Path) -> list[Record] | None:
    """The items of a file that is one JSON object with such; None for all else, which has lines."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return items if isinstance(items, list) and all(isinstance(item, dict) for item in items) else None


def _print(summary: dict[str, Any], items: list[Record]) -> None:
    typer.echo(json.dumps(summary, indent=2))
    unread = [item for item in items if item["verdict"] is None]
    for item in unread[:_SHOWN]:
        for reply, winner in zip(item["replies"], item["winners"], strict=True):
            if winner is None:
                said = reply["error"] or reply.get("refused") or f"no two scores: {(reply['text'] or '')[:120]!r}"
                typer.echo(f"question {item['question_id']}: {said}")
    if len(unread) > _SHOWN:
        typer.echo(f"and {len(unread) - _SHOWN} pairs more without verdict")
