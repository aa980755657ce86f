"""Static benchmarks of one model, into one file: the figures, and every item with what decided it.

Items are kept as they come, in groups: a killed evaluation goes on from its last whole group and ends with the same
file. What it left belongs to this model and these questions alone, by a digest in its name.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from almost_jax.evaluation import hhh, truthfulqa
from almost_jax.io.distributed import from_primary, wait_for_all
from almost_jax.io.models import Model, model_digest
from almost_jax.io.progress import ShowProgress
from almost_jax.io.records import Record, RecordWriter, partial_path, write_bytes


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A static benchmark: where its questions come from, what a model makes of them, what that amounts to.

    Attributes:
        name: of the command and of the config section.
        load: questions from a file, or from the hub when there is none.
        judge: items for (model, questions, batch size), in order.
        summarize: figures for (items, the model's kind).
        group: so many questions are judged, and kept, together.
    """

    name: str
    load: Callable[[Path | None], list[Record]]
    judge: Callable[[Model, Sequence[Record], int], list[Record]]
    summarize: Callable[[Sequence[Record], str], dict[str, Any]]
    group: int


BENCHMARKS = {
    "hhh": Benchmark("hhh", hhh.load_comparisons, hhh.judge, hhh.summarize, 64),
    "truthfulqa": Benchmark(
        "truthfulqa", truthfulqa.load_questions, truthfulqa.judge, truthfulqa.summarize, 32
    ),
}


def evaluate(
    benchmark: Benchmark,
    model: Model,
    questions: Sequence[Record],
    batch_size: int,
    out: Path,
    show_progress: ShowProgress,
) -> dict[str, Any]:
    """Judge a model on a benchmark and write the result; what an interrupted call has judged is kept.

    Args:
        benchmark: which.
        model: a language model or a reward model.
        questions: from `benchmark.load`.
        batch_size: texts per forward pass.
        out: of the result, JSON; replaced when it is there.
        show_progress: shows how many of the questions are judged.

    Returns:
        The benchmark's figures, {"benchmark", "model", "kind"} and "items".

    Raises:
        InputError: a question that the model can't read.
    """
    digest = hashlib.sha256(f"{model_digest(model)} {json.dumps([benchmark.name, *questions])}".encode()).hexdigest()
    kept = out.with_name(f".{out.name}.{digest[:12]}")
    # The number is the key, and no part of what is written.
    with RecordWriter(kept, key=lambda record: str(record["place"])) as writer:
        keys = [str(place) for place in range(len(questions))]
        with show_progress(f"{benchmark.name}: {model.name}", len(keys), len(writer.done)) as progress:
            for places in writer.torn_groups(keys, benchmark.group):
                judged = benchmark.judge(model, questions[places.start : places.stop], batch_size)
                for place, item in zip(places, judged, strict=True):
                    if writer.write_missing({"place": place, **item}):
                        progress.advance()
        items = [{key: value for key, value in record.items() if key != "place"} for record in writer.records]
    result = {
        "benchmark": benchmark.name,
        "model": model.name,
        "kind": model.kind,
        **benchmark.summarize(items, model.kind),
        "items": items,
    }
    write_bytes(out, (json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    wait_for_all()
    from_primary(partial_path(kept).unlink)
    return result
