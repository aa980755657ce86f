"""almost-jax lm-eval: lm-evaluation-harness's own command line, with our model class known to it."""

import sys
from typing import Annotated

import typer

from almost_jax.errors import InputError


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
        raise InputError(f"lm-eval: {error.name} is missing; pip install 'almost-jax[eval]'") from error
    before = sys.argv
    sys.argv = ["lm_eval", *(arguments or [])]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
