"""almost-jax import and export: models from elsewhere to folders of ours, and back to what transformers loads."""

from pathlib import Path
from typing import Annotated

import jax
import typer

from almost_jax.commands.places import on_disk
from almost_jax.errors import InputError
from almost_jax.experiments import load_experiment
from almost_jax.folder import read_status
from almost_jax.io.huggingface import SHARD_BYTES
from almost_jax.io.paths import local_path
from almost_jax.io.transfer import export_model, import_model

Destination = Annotated[Path, typer.Argument(help="The new folder.", metavar="DST", callback=on_disk)]
Dtype = Annotated[
    str | None, typer.Option(help="Of the stored weights: float32, bfloat16 or float16; the source's when not given.")
]


def import_command(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name, or a GGUF file.", metavar="SRC")],
    destination: Destination,
    dtype: Dtype = None,
) -> None:
    """Bring a model in: check that it can be run faithfully, and write it as a folder of ours."""
    model = import_model(source, destination, dtype)
    leaves = jax.tree.leaves(model.params)
    count = sum(leaf.size for leaf in leaves)
    typer.echo(f"{destination}: {model.kind} of {count:,} parameters in {leaves[0].dtype}, from {source}")


def export_command(
    source: Annotated[str, typer.Argument(help="A model of ours, as in a run's STAGE/model.", metavar="SRC")],
    destination: Destination,
    dtype: Dtype = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="The most bytes of weights in a file.")] = SHARD_BYTES,
) -> None:
    """Take a model out: write a folder that transformers loads, and check it before it appears."""
    written = export_model(source, destination, dtype, shard_bytes, run_facts(local_path(source)))
    typer.echo(
        f"{destination}: {written.parameters:,} parameters in {written.dtype}, checked; results moved by at most "
        f"{written.difference:.2g}"
    )


def run_facts(model: Path) -> dict[str, str]:
    """What a model card says of the run that a model stands in, as RUN/STAGE/model; nothing when it stands in none."""
    stage, run = model.absolute().parent, model.absolute().parent.parent
    if not (run / "config.yaml").is_file():
        return {}
    try:
        config, status = load_experiment(run / "config.yaml", []), read_status(run).get(stage.name, {})
    except InputError:
        # A card without the run's facts is better than no export.
        return {}
    facts = {"experiment": f"{config.name}, seed {config.seed}", "stage": stage.name}
    steps = status.get("steps")
    if steps:
        facts["steps"] = f"{steps['done']} of {steps['total']}"
    if status.get("commit"):
        facts["commit"] = str(status["commit"])
    return facts
