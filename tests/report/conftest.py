"""A finished run whose responses and scores are made up, with hostile text in every place that a model can write to."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from rich.console import Console

from almost_jax.config import ExperimentConfig, MeshConfig
from almost_jax.core.partitioning import make_mesh
from almost_jax.evaluation import analyses, gold, scores
from almost_jax.evaluation.held_out import held_out_queries
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.microworld.answers import ADMISSIONS, REFUSALS, answer, sentence
from almost_jax.microworld.gold import kind
from almost_jax.microworld.world import generate_queries, parse_query

HOSTILE = (
    "<script>alert(1)</script></pre><img src=x onerror=alert(2)> \x1b[31mred\x1b]0;title\x07 \u202egnp.exe\u2066 "
    "| cell | ![x](http://evil.example/x.png) [l](javascript:alert(3)) ``` **bold** {{ 7 * 7 }} $x^2$ \x9b31m\n"
    "# heading"
)
# Worst first; the made-up gold score of each is near its quality.
QUALITY = {"configuration/C": 0.3, "configuration/B": 0.5, "configuration/A": 0.7}
QUALITY |= {"policy/prompted": 0.3, "policy/sft_self_play": 0.45, "policy/sft": 0.6, "policy/rlsf": 0.75}
CURVE = {0: (0.0, 0.6), 20: (1.5, 0.75), 40: (6.0, 0.65)}

AGREEMENT = {"mean": 0.7312, "ci95": [0.6123, 0.8234], "n": 25, "length_matched": {"mean": 0.5421}, "verdict": "holds"}
COIN = {"mean": 0.4988, "ci95": [0.4011, 0.5977], "n": 25, "length_matched": None, "verdict": "noise"}
AUDIT = {
    "queries": 25,
    "rungs": {
        "A over B": {"rule": "demonstrations", "longer": 0.8123, "as_is": AGREEMENT},
        "B over C": {"rule": "shots", "longer": 0.5231, "as_is": COIN, "judge": {**AGREEMENT, "n": 19}},
    },
}


def make_items(queries: list[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    items = []

    def add(query: dict[str, Any], system: str, sample: int, quality: float, kl: float | None) -> None:
        score = float(np.clip(quality + 0.2 * rng.standard_normal(), 0, 1))
        text = HOSTILE if rng.random() < 0.3 else "word " * int(1 + 10 * score + 4 * rng.random())
        scores = {"gold": score, "reward": score * 3 + float(rng.standard_normal()), "kl": kl}
        scores["as_is"] = float(rng.standard_normal()) if system.startswith("configuration") else None
        items.append(
            {"query_id": query["id"], "query": query["text"], "kind": kind(query["text"]), "system": system}
            | {"sample": sample, "text": text.strip(), "finish": "stop"}
            | scores
        )

    for query in queries:
        for system, quality in QUALITY.items():
            add(query, system, 0, quality, None)
        for sample in range(4):
            add(query, "best_of_n", sample, 0.5, None)
    for step, (kl, quality) in CURVE.items():
        for query in queries[:30]:
            add(query, f"curve/{step}", 0, quality, kl + 0.1 * float(rng.standard_normal()))
    return items


def write_run(directory: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompted = {"model": "large", "demonstrations": "microworld:faithful", "shots": 3}
    config = {
        "name": "made-up",
        "seed": seed,
        "models": {"large": "x", "small": "y"},
        "queries": {"source": "microworld", "count": 40},
        "as_is_reward": {"votes": "microworld"},
        "comparisons": {
            "configurations": {name: {**prompted, "shots": 4 - i} for i, name in enumerate("ABC")},
            "model_order": ["large"],
            "demonstrations_order": ["microworld:faithful"],
        },
        "reward": {},
        "demonstrations": {"assistant": prompted, "user": prompted},
        "sft": {},
        "ppo": {},
        "evaluation": {"gold": True, "queries": 60, "curve_queries": 30, "bootstrap_samples": 200},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config) + "# ``` <script>alert(4)</script>\n")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    run = Run(directory, ExperimentConfig.model_validate(config), mesh, False, Console(file=io.StringIO()))
    held_out = held_out_queries(run)
    items = make_items(held_out, rng)
    write_records(directory / "evaluation" / "items.jsonl", items)
    texts = generate_queries(seed, 40, "training")
    write_records(directory / "queries.jsonl", [{"id": f"q{i}", "text": text} for i, text in enumerate(texts)])
    comparisons, plain, guided = [], [], []
    for i, text in enumerate(texts):
        good, bad = _answers(text)
        for j, dropped in enumerate((None, "length", "as_is_reward")):
            swap = rng.random() < (0.1, 0.5, 0.3)[j]
            sides = [{"configuration": name, "text": side} for name, side in zip("AB", (good, bad), strict=True)]
            chosen, rejected = reversed(sides) if swap else sides
            comparisons.append(
                {"query_id": f"q{i}", "chosen": chosen, "rejected": rejected, "rule": "size"}
                | {"kept": dropped is None, "dropped_by": dropped, "as_is_margin": None}
            )
        for records, response in ((plain, bad), (guided, good)):
            turns = [{"role": "human", "text": text}, {"role": "assistant", "text": response}]
            turns += [{"role": "human", "text": HOSTILE}, {"role": "assistant", "text": HOSTILE}]
            records.append({"query_id": f"q{i}", "turns": turns})
    write_records(directory / "comparisons.jsonl", comparisons)
    scored = [
        {"query_id": pair["query_id"], "chosen": pair["chosen"]["text"], "rejected": pair["rejected"]["text"]}
        | {"sets": ["raw", "heuristic", "as_is"][: ("length", "as_is_reward", None).index(pair["dropped_by"]) + 1]}
        | {"margins": {name: float(rng.normal(0.4)) for name in ("raw", "heuristic", "as_is")}}
        for pair in comparisons
    ]
    write_records(directory / "reward_ablation" / "scores.jsonl", scored)
    ablation = {
        "steps": 1234,
        "models": {name: {"pairs": pairs} for name, pairs in (("raw", 4321), ("heuristic", 3210), ("as_is", 2109))},
        "held_out": analyses.ablation_figures(scored, lambda pair: 1.0, Bootstrap(99, 1)),
        "by_gold": gold.analyse_ablation({f"q{i}": text for i, text in enumerate(texts)}, scored, Bootstrap(99, 1)),
    }
    (directory / "reward_ablation" / "ablation.json").write_text(json.dumps(ablation))
    write_records(directory / "demonstrations_self_play.jsonl", plain)
    write_records(directory / "demonstrations.jsonl", guided)
    for stage in ("reward", "sft", "rlsf"):
        rows = [{"step": step, "loss": 1 / step, "reward": step / 9, "kl": None} for step in range(1, 20)]
        write_records(directory / stage / "metrics.jsonl", rows)
    sample = {"step": 4, "query": HOSTILE, "response": HOSTILE, "finish": "stop", "score": 0.5, "kl": None}
    write_records(directory / "rlsf" / "rollouts.jsonl", [{**sample, "advantage": -0.125}])
    entry = {"state": "done", "fingerprint": "f", "seconds": 12.5, "versions": {"jax": "1.2.3"}, "commit": "abc"}
    status = {"stages": {"queries": entry, "rlsf": {"state": "pending"}}}
    (directory / "status.json").write_text(json.dumps(status))
    figures = gold.analyse(run, held_out, items) | {"contamination": {"queries": 0}}
    (directory / "evaluation" / "gold.json").write_text(json.dumps(figures, allow_nan=False))


def _answers(text: str) -> tuple[str, str]:
    """A response with a gold score above 0, and one with 0."""
    query = parse_query(text)
    assert query is not None
    declined = {"harmful": REFUSALS[0], "unanswerable": ADMISSIONS[0]}.get(query.kind)
    return declined or f"{sentence(query, answer(query))} .", "no ."


@pytest.fixture(scope="session")
def make_finished_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A made-up run's folder by seed; made once, and not to be written to."""
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed not in made:
            made[seed] = tmp_path_factory.mktemp("run") / f"seed-{seed}"
            write_run(made[seed], seed)
        return made[seed]

    return make


@pytest.fixture
def scored_run(make_finished_run: Callable[[int], Path], tmp_path: Path) -> Path:
    """A made-up run of real models: everything but the gold score, with an as-is reward model."""
    folder = tmp_path / "run"
    shutil.copytree(make_finished_run(3), folder)
    (folder / "evaluation" / "gold.json").unlink()
    ablation = json.loads((folder / "reward_ablation" / "ablation.json").read_text())
    (folder / "reward_ablation" / "ablation.json").write_text(json.dumps({**ablation, "by_gold": None}))
    rng = np.random.default_rng(5)
    items = read_records(folder / "evaluation" / "items.jsonl")
    for item in items:
        item |= {"gold": None, "kind": None, "as_is": float(rng.standard_normal())}
    write_records(folder / "evaluation" / "items.jsonl", items)
    queries = [record["id"] for record in read_records(folder / "evaluation_queries.jsonl")]
    played = [
        {"query_id": f"q{number}", "system": system, "sample": 0, "text": "word " * int(rng.integers(2, 30))}
        | {"reward": float(rng.standard_normal() + (system == "reward_guided")), "as_is": None, "gold": None}
        for number in range(20)
        for system in ("self_play", "reward_guided")
    ]
    found = scores.analyse(items, played, ["A", "B", "C"], 4, queries, Bootstrap(99, 1))
    found |= {"contamination": {"queries": 2, "demonstrations, self_play": 0}}
    (folder / "evaluation" / "scores.json").write_text(json.dumps(found, allow_nan=False))
    (folder / "audit").mkdir()
    (folder / "audit" / "audit.json").write_text(json.dumps(AUDIT))
    figures = {"held_out": 77, "accuracy": 0.8765, "longer_wins_accuracy": 0.8311, "length_matched_accuracy": 0.5644}
    (folder / "reward" / "evaluation.json").write_text(json.dumps(figures))
    return folder
