"""almost-jax run, sweep, status and report: experiments as runs in folders."""

import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from almost_jax.commands.places import keep_compiled_programs, on_disk
from almost_jax.errors import InputError, TrainingDiverged, complain
from almost_jax.experiments import load_experiment, load_sweep
from almost_jax.folder import is_locked, read_status
from almost_jax.io.distributed import from_primary, initialize, is_primary
from almost_jax.io.preemption import stops_on_sigterm
from almost_jax.pipeline import make_plan, run_experiment
from almost_jax.report import page, sweep

RUNS = Path("runs")

Experiment = Annotated[Path, typer.Argument(help="The experiment's yaml file.", metavar="EXPERIMENT", callback=on_disk)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values to change, as in ppo.kl_coef=0.1.", metavar="[a.b=v]...")
]
Out = Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME when not given.", callback=on_disk)]
Folder = Annotated[Path, typer.Argument(help="The run's folder.", metavar="DIR", callback=on_disk)]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard too.")]


def run_command(
    experiment: Experiment,
    overrides: Overrides = None,
    out: Out = None,
    until: Annotated[str | None, typer.Option(help="The last stage to run.", metavar="STAGE")] = None,
    tensorboard: Tensorboard = False,
) -> None:
    """Run an experiment: finished stages are skipped, an interrupted one goes on, stale ones run anew and say why."""
    config = load_experiment(experiment, overrides or [])
    directory = out or RUNS / config.name
    initialize()
    console = _console()
    keep_compiled_programs()
    status = run_experiment(config, directory, until, tensorboard, console)
    if status.get("report", {}).get("state") == "done" and until in (None, "report"):
        table = from_primary(lambda: page.summary_table(directory))
        _show(console, f"\n{table}\n\n{directory / 'report.html'}")


def sweep_command(
    experiment: Experiment, overrides: Overrides = None, out: Out = None, tensorboard: Tensorboard = False
) -> None:
    """Run every point of an experiment's `sweep:`, then write and print one table over all of them."""
    found = load_sweep(experiment, overrides or [])
    directory = out or RUNS / found.name
    initialize()
    console = _console()
    keep_compiled_programs()
    finished: list[tuple[str, Path]] = []
    with stops_on_sigterm():
        for number, (name, config) in enumerate(found.points, start=1):
            _show(console, f"\npoint {number}/{len(found.points)}: {name}")
            try:
                run_experiment(config, directory / name, None, tensorboard, console)
            except TrainingDiverged as error:
                # The other points say whether this is the setting's fault.
                complain(f"point {name}: {error}")
                continue
            finished.append((name, directory / name))
        if not finished:
            raise TrainingDiverged(f"{directory}: every point diverged")
        table = from_primary(lambda: sweep.write_sweep(directory, finished))
    _show(console, f"\n{table}")
    if len(finished) < len(found.points):
        raise typer.Exit(1)


def status_command(folder: Folder) -> None:
    """Show where a run stands."""
    status = read_status(folder)
    if not status and not (folder / "config.yaml").exists():
        raise InputError(f"{folder}: is no run's folder (it has neither status.json nor config.yaml)")
    plans = make_plan(load_experiment(folder / "config.yaml", []), folder, status)
    running = is_locked(folder)
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "time", "steps", "note"):
        table.add_column(column, overflow="fold")
    for plan in plans:
        entry = status.get(plan.stage.name, {"state": "pending"})
        state, note = entry["state"], entry.get("error") or ""
        if state == "running" and not running:
            state, note = "interrupted", "goes on with the next run"
        if plan.action == "stale":
            state, note = "stale", plan.why
        elif state == "done" and plan.why:
            state, note = "incomplete", plan.why
        seconds = entry.get("seconds")
        steps = entry.get("steps")
        cells = (
            plan.stage.name,
            state,
            "" if seconds is None else str(datetime.timedelta(seconds=round(seconds))),
            f"{steps['done']}/{steps['total']}" if steps else "",
            note,
        )
        table.add_row(*(Text(cell) for cell in cells))
    console = _console()
    if not console.is_terminal:
        # A file or a pipe has no width; reasons stay on their line.
        console.width = 1000
    console.print(table)


def report_command(folder: Folder) -> None:
    """Build a run's report.html and report.md anew, and print the final table; what isn't up to date is said."""
    if not (folder / "config.yaml").exists():
        raise InputError(f"{folder}: is no run's folder (it has no config.yaml)")
    notes = _out_of_date(folder)
    built = page.build(folder, notes)
    _show(_console(), f"{page.summary_table(folder)}\n\n{built}")
    for note in notes if is_primary() else ():
        complain(f"warning: {note}")


def _out_of_date(folder: Path) -> list[str]:
    """What a report must say of stages whose outputs are of other settings than config.yaml's, or unfinished."""
    status = read_status(folder)
    try:
        plans = make_plan(load_experiment(folder / "config.yaml", []), folder, status)
    except InputError as error:
        # A run that was copied here without its models can be read all the same.
        return [f"Whether all of this is up to date can't be told ({error})."]
    found = []
    for plan in plans:
        if plan.stage.name in status and plan.action != "skip" and plan.stage.name != "report":
            what = "stale" if plan.action == "stale" else "unfinished"
            found.append(f"{plan.stage.name} is {what}{f' ({plan.why})' if plan.why else ''}")
    return [f"Not all of this is of the settings below: {'; '.join(found)}."] if found else []


def _console() -> Console:
    # Of several processes one speaks; what goes wrong is told by whoever it happens to.
    return Console(highlight=False, quiet=not is_primary())


def _show(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
