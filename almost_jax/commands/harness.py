"""almost-jax lm-eval: lm-evaluation-harness's own command line, with our model class known to it."""

import re
import sys
from typing import Annotated

import typer

from almost_jax.errors import InputError
from almost_jax.io.paths import local_path


def harness_command(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="What lm_eval takes; --help after -- shows it.", metavar="[ARGUMENT]...")
    ] = None,
) -> None:
    """lm-evaluation-harness with `--model almost_jax --model_args pretrained=M,...`; all else as lm_eval has it."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import almost_jax.evaluation.harness  # noqa: F401 (registers the class)
    except ModuleNotFoundError as error:
        raise InputError(f"lm-eval: {error.name} is missing; pip install -e '.[eval]' in its source") from error
    before = sys.argv
    sys.argv = ["lm_eval", *map(_on_disk, arguments or [])]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _on_disk(argument: str) -> str:
    """An argument, or what stands behind an option's equals sign, with a path of this machine for gs://BUCKET/..."""
    found = re.fullmatch(r"(--[\w-]+=)?(gs://.*)", argument)
    return argument if found is None else f"{found[1] or ''}{local_path(found[2])}"
