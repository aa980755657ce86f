"""The command line: runs and sweeps, checkpoints in and out, generate, score, evaluate, chat, plan, doctor.

Most of a command's start is importing what it needs, so that only the one that is asked for is imported.
"""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from almost_jax.errors import InputError, TrainingDiverged, complain

# What a shell is told: bad input, a run that failed, a run that was interrupted.
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

# What the list of commands says of each.
COMMANDS = {
    "run": "Run an experiment, or go on with one that was stopped.",
    "sweep": "Run every point of an experiment's `sweep:`, with one table.",
    "status": "Show where a run stands.",
    "report": "Build a run's report anew, and print its final table.",
    "import": "Bring a model in: a Hugging Face folder or name, or a GGUF file.",
    "export": "Take a model out: a folder that transformers loads.",
    "generate": "Continue prompts, a file in and a file out.",
    "score": "Score completions: log-probs, and a reward model's score.",
    "evaluate": "One evaluation of one model: HHH, TruthfulQA, Vicuna's questions.",
    "chat": "Talk to a model.",
    "lm-eval": "lm-evaluation-harness with our model class.",
    "plan": "Compile an experiment's programs for a TPU that isn't there.",
    "doctor": "Check this machine, and a model with its tokenizer on it.",
    "judge": "Judge two models' answers over an OpenAI-compatible endpoint.",
    "reviews": "Count recorded reviews, and how far another judge agrees.",
}


def find_command(name: str) -> Callable[..., Any] | typer.Typer:
    """A command's function, or the application of a group of commands; what it needs is imported now.

    Args:
        name: one of COMMANDS.
    """
    match name:
        case "run":
            from almost_jax.commands.runs import run_command

            return run_command
        case "sweep":
            from almost_jax.commands.runs import sweep_command

            return sweep_command
        case "status":
            from almost_jax.commands.runs import status_command

            return status_command
        case "report":
            from almost_jax.commands.runs import report_command

            return report_command
        case "import":
            from almost_jax.commands.models import import_command

            return import_command
        case "export":
            from almost_jax.commands.models import export_command

            return export_command
        case "generate":
            from almost_jax.commands.generate import generate_command

            return generate_command
        case "score":
            from almost_jax.commands.scoring import score_command

            return score_command
        case "evaluate":
            from almost_jax.commands.evaluate import app

            return app
        case "chat":
            from almost_jax.commands.chat import chat_command

            return chat_command
        case "lm-eval":
            from almost_jax.commands.harness import harness_command

            return harness_command
        case "plan":
            from almost_jax.commands.plan import plan_command

            return plan_command
        case "doctor":
            from almost_jax.commands.doctor import doctor_command

            return doctor_command
        case "judge":
            from almost_jax.commands.judge import vicuna_command

            return vicuna_command
        case "reviews":
            from almost_jax.commands.judge import reviews_command

            return reviews_command
        case _:
            raise KeyError(name)


def application(name: str | None) -> typer.Typer:
    """The command line with one command in place; of the others there is what the list of commands says of them.

    Args:
        name: the command that is asked for; None, or one that there isn't, for none.
    """
    made = typer.Typer(
        help="ALMoST in JAX: align a language model through synthetic feedback (arXiv 2305.13735).",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    for own, line in COMMANDS.items():
        found = find_command(own) if own == name else _not_asked_for
        if isinstance(found, typer.Typer):
            made.add_typer(found, name=own, short_help=line)
            continue
        # What lm-eval takes is the harness's business.
        context = {"ignore_unknown_options": own == "lm-eval"}
        made.command(own, short_help=line, context_settings=context)(found)
    return made


def _not_asked_for() -> None:
    raise AssertionError("another command was asked for")


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0, or 1 for a failed run, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # Before a command stands nothing but --help.
        app = application(next((word for word in arguments if not word.startswith("-")), None))
        code = app(args=arguments, prog_name="almost-jax", standalone_mode=False)
    except InputError as error:
        complain(str(error))
        code = BAD_INPUT
    except TrainingDiverged as error:
        complain(str(error))
        code = FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Whatever was being written has a name of its own until it is whole.
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror}; nothing finished is lost: make room, and the same command goes on")
        code = FAILED
    except SystemExit as ended:
        preemption = sys.modules.get("almost_jax.io.preemption")
        if preemption is not None and preemption.broke_off():
            preemption.leave(ended.code)
        raise
    except KeyboardInterrupt:
        # While a command was being imported; later on Typer turns Ctrl-C into this code.
        code = INTERRUPTED
    except typer.TyperException as error:
        complain(f"{error.format_message()} (see almost-jax --help)")
        code = BAD_INPUT
    if code == INTERRUPTED:
        complain("interrupted; nothing finished is lost, the same command goes on from here")
    distributed = sys.modules.get("almost_jax.io.distributed")
    if code and distributed is not None and distributed.several():
        # A process that leaves the others behind must not wait for them: whoever started it stops them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code or 0)
