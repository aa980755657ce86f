"""Stage 0: the queries, from the micro-world, from a file, or by Self-Instruct."""

import hashlib
from typing import Any

from almost_jax.errors import InputError
from almost_jax.io.paths import local_path
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.microworld.world import generate_queries
from almost_jax.stages.self_instruct import self_instruct


def query_id(text: str) -> str:
    """16 hexadecimal digits from a query's text: the same text is the same query in every run."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_stage(run: Run) -> dict[str, Any]:
    """Write queries.jsonl: {id, text, source, origin}, no text twice.

    Raises:
        InputError: the source can't give what the config asks for.
    """
    config = run.config.queries
    summary: dict[str, Any] = {"source": config.source}
    if config.source == "microworld":
        found, dropped = from_microworld(run.seed("queries"), config.count), 0
    elif config.source == "file":
        found, dropped = from_file(config.file, config.count)
        summary["duplicates"] = dropped
    else:
        return {**summary, **self_instruct(run, query_id)}
    if len(found) < config.count:
        run.say(f"queries: {len(found)} instead of the {config.count} of queries.count; the source has no more")
    write_records(run.path("queries.jsonl"), found)
    return {**summary, "queries": len(found)}


def from_microworld(seed: int, count: int) -> list[dict[str, Any]]:
    """Query records from the micro-world's generator, of the side that training may see.

    Raises:
        InputError: the world has fewer queries.
    """
    try:
        texts = generate_queries(seed, count, "training")
    except ValueError as error:
        raise InputError(f"queries: {error}") from error
    origin = f"seed {seed}"
    return [{"id": query_id(text), "text": text, "source": "microworld", "origin": origin} for text in texts]


def from_file(file: str | None, count: int) -> tuple[list[dict[str, Any]], int]:
    """The first `count` distinct queries of a jsonl file with a `text` field.

    Returns:
        The records, their origin being the file's own `id` or the place in the file, and how many duplicates were
        passed over.

    Raises:
        InputError: no file was given, it can't be read, holds nothing, or a record has no text.
    """
    if file is None:
        raise InputError("queries.file: must name a jsonl file when queries.source is file")
    path = local_path(file)
    found: dict[str, dict[str, Any]] = {}
    duplicates = 0
    for number, record in enumerate(read_records(path), start=1):
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{path}: record {number} has no `text`; every record needs one that is not empty")
        identifier = query_id(text.strip())
        if identifier in found:
            duplicates += 1
        elif len(found) < count:
            origin = f"{path.name}: {record.get('id', f'record {number}')}"
            found[identifier] = {"id": identifier, "text": text.strip(), "source": "file", "origin": origin}
    if not found:
        raise InputError(f"queries.file: {path} holds no query; it needs one `text` a line at least")
    return list(found.values()), duplicates
