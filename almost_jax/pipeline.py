"""The stages in order: what is done, what is stale and why, and how an interrupted run goes on.

Each stage has a fingerprint: the config values that it reads, the seed, the models and files that these name, and the
fingerprints of the stages before it. A finished stage whose fingerprint still holds is skipped. One that was
interrupted goes on by itself from its last record or checkpoint. One whose fingerprint changed is stale: its outputs
move to `stale/STAGE-FINGERPRINT/` and it runs anew; should the old settings come back, so do the outputs.
"""

import dataclasses
import datetime
import difflib
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jax.sharding import Mesh
from rich.console import Console

from almost_jax.config import EvaluationConfig, ExperimentConfig
from almost_jax.core.partitioning import exact_products, make_mesh
from almost_jax.errors import InputError
from almost_jax.evaluation import audit, benchmark_stage, reward_ablation
from almost_jax.evaluation.held_out import run_stage as draw_held_out_queries
from almost_jax.evaluation.stage import run_stage as evaluation_stage
from almost_jax.experiments import dump_experiment
from almost_jax.folder import (
    Entry,
    Status,
    bring_back,
    git_commit,
    locked,
    now,
    owned,
    read_status,
    set_aside,
    set_aside_entry,
    versions,
    write_status,
)
from almost_jax.inputs import Values, all_values, check_inputs, differences, values_of
from almost_jax.io.distributed import from_primary
from almost_jax.io.models import is_complete
from almost_jax.io.preemption import stops_on_sigterm
from almost_jax.io.records import write_bytes
from almost_jax.io.run import Run
from almost_jax.report import page
from almost_jax.stages import as_is_reward, comparisons, demonstrations, dpo, queries, reward, rlsf, sft
from almost_jax.stages.guards import consequential, loosened
from almost_jax.stages.training import check_batches

# status.json says this often how far a running stage is.
SECONDS_BETWEEN_STEPS = 5.0

Action: TypeAlias = Literal["skip", "resume", "run", "stale"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its function, what of the config it reads, the stages whose outputs it reads, and its own outputs.

    `alone`: process 0 runs it while the others wait, since it uses no devices. `ignores`: keys of what it reads that it
    has values of its own for.
    """

    name: str
    run: Callable[[Run], dict[str, Any]]
    reads: tuple[str, ...]
    upstream: tuple[str, ...]
    outputs: tuple[str, ...]
    alone: bool = False
    ignores: tuple[str, ...] = ()


# The sections of `evaluation` that the stage `benchmarks` reads.
BENCHMARKS = ("hhh", "truthfulqa", "vicuna")
# Outputs that are folders of training, with a model in each.
TRAINED = ("as_is_reward", "reward", "sft", "sft_self_play", "dpo", "rlsf", "over_optimisation")
# The one key of the mesh that changes more than the last bits of a result.
_SUMS = "mesh.gradient_dtype"

STAGES: tuple[Stage, ...] = (
    Stage("queries", queries.run_stage, ("queries",), (), ("queries.jsonl", "self_instruct")),
    Stage(
        "evaluation_queries",
        draw_held_out_queries,
        ("evaluation.gold", "evaluation.queries", "evaluation.questions", "evaluation.split"),
        (),
        ("evaluation_queries.jsonl",),
    ),
    Stage(
        "as_is_reward",
        as_is_reward.run_stage,
        ("as_is_reward", "reward.reference_samples", _SUMS),
        (),
        ("as_is_reward",),
    ),
    Stage(
        "audit",
        audit.run_stage,
        (
            "audit",
            "comparisons.configurations",
            "comparisons.sampling",
            "comparisons.model_order",
            "comparisons.demonstrations_order",
        ),
        ("queries", "as_is_reward"),
        ("audit",),
    ),
    Stage(
        "responses",
        comparisons.run_responses,
        ("comparisons.configurations", "comparisons.sampling"),
        ("queries",),
        ("responses.jsonl",),
    ),
    Stage(
        "comparisons",
        comparisons.run_stage,
        (
            "comparisons.configurations",
            "comparisons.model_order",
            "comparisons.demonstrations_order",
            "comparisons.pairs",
            "filters",
        ),
        ("responses", "as_is_reward"),
        ("comparisons.jsonl",),
    ),
    Stage("reward", reward.run_stage, ("reward", _SUMS), ("comparisons",), ("reward",)),
    Stage(
        "demonstrations",
        demonstrations.run_stage,
        ("demonstrations",),
        ("queries", "evaluation_queries", "reward"),
        ("demonstrations.jsonl", "demonstrations_self_play.jsonl"),
    ),
    Stage("sft", sft.run_stage, ("sft", _SUMS), ("demonstrations",), ("sft", "sft_self_play")),
    Stage("dpo", dpo.run_stage, ("dpo", _SUMS), ("queries", "comparisons", "sft"), ("dpo",)),
    Stage("rlsf", rlsf.run_stage, ("ppo", _SUMS), ("reward", "demonstrations", "sft"), ("rlsf",)),
    Stage(
        "over_optimisation",
        rlsf.run_over_optimised,
        ("over_optimisation", "ppo", _SUMS),
        ("reward", "demonstrations", "sft"),
        ("over_optimisation",),
        ignores=tuple(f"ppo.{key}" for key in rlsf.OVER_OPTIMISED),
    ),
    Stage(
        "reward_ablation",
        reward_ablation.run_stage,
        ("reward_ablation", "reward", "evaluation.bootstrap_samples", "evaluation.gold", _SUMS),
        ("queries", "comparisons"),
        ("reward_ablation",),
    ),
    Stage(
        "evaluation",
        evaluation_stage,
        tuple(f"evaluation.{key}" for key in EvaluationConfig.model_fields if key not in BENCHMARKS),
        (
            "evaluation_queries", "as_is_reward", "comparisons", "reward", "demonstrations", "sft", "dpo", "rlsf",
            "over_optimisation",
        ),
        tuple(f"evaluation/{name}" for name in ("items.jsonl", "played.jsonl", "scores.json", "gold.json")),
    ),
    Stage(
        "benchmarks",
        benchmark_stage.run_stage,
        (*(f"evaluation.{key}" for key in BENCHMARKS), "evaluation.bootstrap_samples", "sft.model"),
        ("as_is_reward", "reward", "reward_ablation", "sft", "dpo", "rlsf"),
        tuple(f"evaluation/{name}{end}" for name in BENCHMARKS for end in ("", ".json")),
    ),
    Stage(
        "report",
        page.run_stage,
        ("name",),
        ("audit", "reward_ablation", "evaluation", "benchmarks"),
        ("report.md", "report.html", "figures"),
        alone=True,
    ),
)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What outputs depend on: values by name, the digests of the stages before, and the digest of all that."""

    digest: str
    values: Values
    upstream: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done with a stage, and why: what changed or is missing, "" where nothing did."""

    stage: Stage
    fingerprint: Fingerprint
    action: Action
    why: str


def run_experiment(
    config: ExperimentConfig, directory: Path, until: str | None, tensorboard: bool, console: Console
) -> Status:
    """Run every stage that is not done, in order.

    Args:
        config: the experiment.
        directory: the run's folder; made if missing, taken up where it was left otherwise.
        until: the last stage to run; None for all.
        tensorboard: whether metrics also go to TensorBoard's files.
        console: where progress is shown.

    Returns:
        The content of status.json.

    Raises:
        InputError: something in the config or on disk is wrong, or another process works in the folder.
        Preempted: SIGTERM came; the same call goes on from there.
    """
    # One process's files decide for all, whatever lies on the disks of the others.
    config, directory = from_primary(lambda: (config, directory))
    last = len(STAGES) if until is None else _place(until) + 1

    def look() -> dict[str, Fingerprint]:
        check_inputs(config)
        return fingerprints(config)

    prints = from_primary(look)
    try:
        mesh = make_mesh(config.mesh)
    except ValueError as error:
        raise InputError(str(error)) from error
    with locked(directory), stops_on_sigterm():
        made_with = {"versions": versions(), "commit": git_commit()}
        status = from_primary(lambda: read_status(directory))

        def to_run() -> list[str]:
            plans = (plan_stage(stage, prints[stage.name], directory, status) for stage in STAGES[:last])
            return [plan.stage.name for plan in plans if plan.action != "skip"]

        check_batches(config, mesh, from_primary(to_run))
        pipeline = _Pipeline(config, directory, mesh, tensorboard, console, made_with, status)
        write_bytes(directory / "config.yaml", dump_experiment(config).encode())
        for number, stage in enumerate(STAGES[:last], start=1):
            plan = from_primary(partial(plan_stage, stage, prints[stage.name], directory, pipeline.status))
            with exact_products(config.compute_dtype):
                pipeline.bring_up_to_date(plan, f"[{number}/{len(STAGES)}] {stage.name}")
        return pipeline.status


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """What one `run_experiment` works with; `status` is changed in place and written after every change."""

    config: ExperimentConfig
    directory: Path
    mesh: Mesh
    tensorboard: bool
    console: Console
    made_with: Entry
    status: Status

    def bring_up_to_date(self, plan: Plan, title: str) -> None:
        """Skip, resume or run one stage, after saying which and why."""
        stage = plan.stage
        entry = self.status.get(stage.name)
        if plan.action == "skip" and entry is not None:
            self.say(f"{title}: done already, in {_duration(entry)}")
            return
        self.say(f"{title}: {plan.action}{f': {plan.why}' if plan.why else ''}")
        if plan.action == "stale":
            from_primary(lambda: set_aside(self.directory, stage.name, owned(stage.name, stage.outputs), entry))
            self.status.pop(stage.name, None)
            self.write()
        digest = plan.fingerprint.digest
        kept = from_primary(lambda: set_aside_entry(self.directory, stage.name, digest))
        if kept is not None:
            # The entry first: a kill in between leaves outputs that are known to be missing, not unknown ones.
            self.status[stage.name] = kept
            self.write()
            paths = owned(stage.name, stage.outputs)
            if from_primary(lambda: bring_back(self.directory, stage.name, paths, digest)):
                self.say(f"{stage.name}: ran with these settings before; its outputs are back from stale/")
            # Not all of them need have been there.
            action, why = from_primary(lambda: _compare(stage, plan.fingerprint, self.directory, self.status))
            if action == "skip":
                return
            if kept["state"] == "done":
                self.say(f"{title}: {action}: {why}")
        self.run(plan)

    def run(self, plan: Plan) -> None:
        """Run one stage and keep status.json true before, during and after it."""
        name = plan.stage.name
        before = self.status.get(name, {})
        entry: Entry = {
            "state": "running",
            "started": before.get("started") or now(),
            "ended": None,
            "seconds": before.get("seconds", 0.0),
            "steps": None,
            "summary": None,
            "error": None,
            "outputs": [],
            **self.made_with,
            "fingerprint": plan.fingerprint.digest,
            "values": plan.fingerprint.values,
            "upstream": plan.fingerprint.upstream,
        }
        self.status[name] = entry
        began, spent = time.monotonic(), entry["seconds"]
        written = began

        def save() -> None:
            entry["seconds"] = round(spent + time.monotonic() - began, 3)
            self.write()

        def on_progress(description: str, done: int, total: int) -> None:
            nonlocal written
            entry["steps"] = {"description": description, "done": done, "total": total}
            if time.monotonic() - written >= SECONDS_BETWEEN_STEPS:
                written = time.monotonic()
                save()

        save()
        try:
            run = Run(self.directory, self.config, self.mesh, self.tensorboard, self.console, on_progress)
            if plan.stage.alone:
                entry["summary"] = from_primary(lambda: plan.stage.run(run))
            else:
                entry["summary"] = plan.stage.run(run)
        except BaseException as error:
            # Ctrl-C leaves the stage "running", as a power cut would: the next run goes on with it.
            if isinstance(error, Exception):
                what = " ".join(f"{type(error).__name__}: {error}".split())
                entry |= {"state": "failed", "ended": now(), "error": what}
            save()
            maker = self.maker_of(error, plan.stage) if isinstance(error, InputError) else None
            if maker is not None:
                raise InputError(f"{error}; delete it, and the stage {maker} makes it again") from error
            raise
        outputs = from_primary(
            lambda: [output for output in plan.stage.outputs if (self.directory / output).exists()]
        )
        entry |= {"state": "done", "ended": now(), "outputs": outputs}
        save()
        self.say(f"{name}: done in {_duration(entry)}")

    def maker_of(self, error: InputError, stage: Stage) -> str | None:
        """The stage before this one that made what an error is about, as the error begins with its path; else None."""
        for earlier in STAGES[: _place(stage.name)]:
            for output in earlier.outputs:
                # The path whole, or of something in that folder: not `reward` of `reward_ablation`.
                start, rest = f"{self.directory / output}", str(error)
                if rest.startswith(start) and rest[len(start) : len(start) + 1] in ("", "/", ":", ",", " "):
                    return earlier.name
        return None

    def write(self) -> None:
        """Write status.json."""
        write_status(self.directory, self.status, [stage.name for stage in STAGES])

    def say(self, line: str) -> None:
        """Print one line as it is."""
        self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def make_plan(config: ExperimentConfig, directory: Path, status: Status) -> list[Plan]:
    """What is to be done with every stage.

    Raises:
        InputError: a model, or a file that the config names, is missing.
    """
    prints = fingerprints(config)
    return [plan_stage(stage, prints[stage.name], directory, status) for stage in STAGES]


def fingerprints(config: ExperimentConfig) -> dict[str, Fingerprint]:
    """Of every stage: what it reads now, and a digest of that and of the stages before it."""
    found = all_values(config)
    prints: dict[str, Fingerprint] = {}
    for stage in STAGES:
        values = values_of(stage.reads, stage.ignores, found)
        upstream = {name: prints[name].digest for name in stage.upstream}
        content = json.dumps([stage.name, consequential(values), upstream], sort_keys=True)
        prints[stage.name] = Fingerprint(hashlib.sha256(content.encode()).hexdigest(), values, upstream)
    return prints


def plan_stage(stage: Stage, fingerprint: Fingerprint, directory: Path, status: Status) -> Plan:
    """Compare what a stage would read now with what it read when it ran, and look for its outputs."""
    action, why = _compare(stage, fingerprint, directory, status)
    return Plan(stage, fingerprint, action, why)


def _compare(stage: Stage, fingerprint: Fingerprint, directory: Path, status: Status) -> tuple[Action, str]:
    entry = status.get(stage.name)
    if entry is None:
        left = [output for output in owned(stage.name, stage.outputs) if (directory / output).exists()]
        return ("stale", f"{left[0]} is there, but status.json does not know it") if left else ("run", "")
    if entry["fingerprint"] != fingerprint.digest:
        reasons = differences(entry["values"], fingerprint.values)
        unfinished = entry["state"] != "done" and entry["upstream"] == fingerprint.upstream
        if unfinished and loosened(entry["values"], fingerprint.values):
            # Outputs that were made with these settings from the start go before.
            if set_aside_entry(directory, stage.name, fingerprint.digest) is None:
                return "resume", ", ".join(reasons)
        if not reasons:
            changed = [name for name, digest in fingerprint.upstream.items() if entry["upstream"].get(name) != digest]
            reasons = [f"upstream {name} is stale" for name in changed] or ["the stages before it are others"]
        return "stale", ", ".join(reasons)
    if entry["state"] != "done":
        return "resume", ", ".join(differences(entry["values"], fingerprint.values))
    if stage.name == "report" and page.has_notes(directory):
        return "resume", "report.html was built in between, from stages that were not up to date"
    missing = [output for output in entry["outputs"] if not (directory / output).exists()]
    # A folder may be there and not all that was in it, on a machine to which a run was copied.
    missing += [
        f"{output}/model"
        for output in entry["outputs"]
        if output in TRAINED and not is_complete(directory / output / "model")
    ]
    return ("resume", f"{missing[0]} is missing") if missing else ("skip", "")


def _place(name: str) -> int:
    names = [stage.name for stage in STAGES]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise InputError(
            f"--until {name}: {f'did you mean {near[0]}' if near else 'the stages are ' + ', '.join(names)}"
        )
    return names.index(name)


def _duration(entry: Entry) -> str:
    return str(datetime.timedelta(seconds=round(entry["seconds"])))
