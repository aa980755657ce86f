"""The stage `benchmarks`: HHH, TruthfulQA and the Vicuna questions on every policy and reward model of a run.

Each is off unless the experiment gives its section. A model's result is a file of its own with every item
(evaluation/hhh/rlsf.json), in the form of the `evaluate` commands; evaluation/hhh.json holds the figures of all models
side by side. A killed stage goes on with the first model, and the first items, that are missing.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from almost_jax.config import VicunaConfig
from almost_jax.errors import InputError
from almost_jax.evaluation import vicuna
from almost_jax.evaluation.analyses import AFTER_FILTERS
from almost_jax.evaluation.answers import PLAIN, answer
from almost_jax.evaluation.benchmarks import BENCHMARKS, Benchmark, evaluate
from almost_jax.evaluation.duel import EndpointJudge, RewardJudge, check_judged, duel
from almost_jax.evaluation.judge import REPLIES, Endpoint, Judge
from almost_jax.evaluation.judge_prompts import SCORES
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.distributed import from_primary
from almost_jax.io.models import Model
from almost_jax.io.paths import local_path
from almost_jax.io.records import Record, write_bytes
from almost_jax.io.run import Run
from almost_jax.stages.reward import load_reward_model

VANILLA = "vanilla"
POLICIES = (VANILLA, "sft_self_play", "sft", "dpo", "rlsf")
REWARDS = ("as_is_reward", "reward", *(f"reward_ablation/{name}" for name in AFTER_FILTERS))
REWARD_MODEL = "reward_model"


def run_stage(run: Run) -> dict[str, Any]:
    """Evaluate what the run has; writes evaluation/NAME.json and evaluation/NAME/MODEL.json for each benchmark given.

    Returns:
        {benchmark: {model: its first figure}}.

    Raises:
        InputError: questions can't be had, or the judge left pairs without a reply: the next run asks for these alone.
    """
    settings = run.config.evaluation
    given = {name: getattr(settings, name) for name in BENCHMARKS if getattr(settings, name) is not None}
    found: dict[str, Any] = {}
    for name, section in given.items():
        data = None if section.data is None else local_path(section.data)
        results = _static(run, BENCHMARKS[name], data, section.batch_size)
        _write(run.path(f"evaluation/{name}.json"), {"benchmark": name, "models": results})
        figure = "accuracy" if name == "hhh" else "mc1"
        found[name] = {model: result[figure] for model, result in results.items()}
    if settings.vicuna is not None:
        results = _vicuna(run, settings.vicuna)
        _write(run.path("evaluation/vicuna.json"), {"benchmark": "vicuna", "models": results})
        found["vicuna"] = {
            model: result["win_rate"] and result["win_rate"]["mean"] for model, result in results.items()
        }
    if not found:
        run.say("benchmarks: evaluation has none of hhh, truthfulqa, vicuna; nothing written")
    return found


def _static(run: Run, benchmark: Benchmark, data: Path | None, batch_size: int) -> dict[str, Any]:
    questions = benchmark.load(data)
    found: dict[str, Any] = {}
    for name, load in _models(run, (*POLICIES, *REWARDS)):
        path = run.path(f"evaluation/{benchmark.name}/{name}.json")
        found[name] = _figures(_finished(path) or _judged(run, benchmark, load, questions, batch_size, path))
    return found


def _judged(
    run: Run, benchmark: Benchmark, load: Callable[[], Model], questions: list[Record], batch_size: int, path: Path
) -> dict[str, Any]:
    with jax.set_mesh(run.sampling_mesh):
        return evaluate(benchmark, load(), questions, batch_size, path, run.progress)


def _vicuna(run: Run, settings: VicunaConfig) -> dict[str, Any]:
    questions = vicuna.read_questions(local_path(settings.questions))
    folder = run.path("evaluation/vicuna")
    bootstrap = Bootstrap(run.config.evaluation.bootstrap_samples, run.seed("benchmarks/bootstrap"))
    seed = run.seed("benchmarks/answers")
    models = dict(_models(run, POLICIES))
    answers: dict[str, list[Record]] = {}

    def answers_of(name: str) -> list[Record]:
        if name not in answers:
            how = settings.prompt if name == VANILLA else PLAIN
            with jax.set_mesh(run.sampling_mesh):
                answers[name] = answer(
                    models[name](), questions, how, settings.sampling, seed, folder / name, run.progress
                )
        return answers[name]

    if settings.against in models:
        other = answers_of(settings.against)
    elif settings.against in POLICIES:
        raise InputError(f"evaluation.vicuna.against: the run has no {settings.against}; it has {', '.join(models)}")
    else:
        other = vicuna.read_answers(local_path(settings.against), questions)
    asked: list[EndpointJudge] = []
    if settings.judge != REWARD_MODEL:
        # One process asks: a judge costs money, and need not answer twice alike. It is one judge for all models, so
        # that its caps hold for the run.
        from_primary(lambda: asked.append(_endpoint_judge(run, settings)))

    def judged(name: str, mine: list[Record], path: Path) -> dict[str, Any]:
        def by(judge: EndpointJudge | RewardJudge) -> dict[str, Any]:
            return duel(questions, mine, other, judge, bootstrap, (name, settings.against), path)

        if settings.judge == REWARD_MODEL:
            with jax.set_mesh(run.sampling_mesh):
                return by(_reward_judge(run, settings))
        return from_primary(lambda: by(asked[0]))

    found: dict[str, Any] = {}
    for name in models:
        if name == settings.against:
            continue
        path = folder / f"{name}.json"
        result = _finished(path)
        if result is None or result["not_judged"]:
            result = judged(name, answers_of(name), path)
        check_judged(result, f"evaluation.vicuna: {name}")
        found[name] = _figures(result)
    return found


def _reward_judge(run: Run, settings: VicunaConfig) -> RewardJudge:
    return RewardJudge(load_reward_model(run, "reward", alone=True), settings.sampling.batch_size)


def _endpoint_judge(run: Run, settings: VicunaConfig) -> EndpointJudge:
    endpoint = Endpoint(
        url=settings.url,
        model=settings.judge,
        key_variable=settings.key_variable,
        timeout=settings.timeout,
        attempts=settings.attempts,
        pause=settings.pause,
        concurrency=settings.concurrency,
        reply_tokens=settings.reply_tokens,
        max_requests=settings.max_requests,
        max_tokens=settings.max_tokens,
    )
    return EndpointJudge(Judge(endpoint, run.path(REPLIES)), SCORES)


def _models(run: Run, names: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], Model]]]:
    """The models of the run among these names, loaded when they are called for."""
    for name in names:
        if name == VANILLA:
            yield name, partial(run.model, run.config.sft.model)
        elif run.exists(name, "model"):
            yield name, partial(run.load, name, "model")


def _finished(path: Path) -> dict[str, Any] | None:
    def read() -> dict[str, Any] | None:
        found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return found

    return from_primary(read)


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("items", "spent", "model", "benchmark")}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
