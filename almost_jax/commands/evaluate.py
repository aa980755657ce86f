"""almost-jax evaluate: one evaluation of one model, a file out with every item."""

import json
import math
from pathlib import Path
from typing import Annotated

import jax
import typer

from almost_jax.commands.chat import ends
from almost_jax.commands.places import DtypeOption, MeshOption, check_dtype, on_disk, parse_mesh
from almost_jax.config import COLDEST, MeshConfig, SamplingConfig
from almost_jax.core.partitioning import exact_products, make_mesh, whole_rows
from almost_jax.errors import InputError
from almost_jax.evaluation import duel, vicuna
from almost_jax.evaluation.answers import PLAIN, answer
from almost_jax.evaluation.benchmarks import BENCHMARKS, evaluate
from almost_jax.evaluation.judge import Endpoint, Judge
from almost_jax.evaluation.judge_prompts import SCORES, read_prompt
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.models import Model, load_model
from almost_jax.io.paths import local_path
from almost_jax.io.progress import stderr_progress
from almost_jax.io.records import Record, check_writable
from almost_jax.io.transfer import locate

REWARD_MODEL = "reward_model"
_SHOWN = 5
_HOW = "plain (Human: and Assistant:), chat (the tokenizer's template), or NAME:K (K demonstrations of NAME)."

app = typer.Typer(
    help="One evaluation of one model; a file out with every item.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

ModelOption = Annotated[
    str, typer.Option("--model", help="A model of ours, a Hugging Face folder or hub name, or a GGUF file.")
]
OutOption = Annotated[Path, typer.Option("--out", help="The result: figures and items, JSON.", callback=on_disk)]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Texts per forward pass.")]


@app.command("hhh")
def hhh_command(
    model: ModelOption,
    out: OutOption,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines in the fields of HuggingFaceH4/hhh_alignment; from the hub when not given.",
            callback=on_disk,
        ),
    ] = None,
    batch_size: BatchSize = 16,
    dtype: DtypeOption = "float32",
    mesh: MeshOption = None,
) -> None:
    """Static HHH: is the labelled answer likelier, or scored higher by a reward model."""
    _evaluate("hhh", model, data, out, batch_size, dtype, mesh)


@app.command("truthfulqa")
def truthfulqa_command(
    model: ModelOption,
    out: OutOption,
    data: Annotated[
        Path | None, typer.Option(help="TruthfulQA's mc_task.json; from the hub when not given.", callback=on_disk)
    ] = None,
    batch_size: BatchSize = 16,
    dtype: DtypeOption = "float32",
    mesh: MeshOption = None,
) -> None:
    """TruthfulQA, MC1 and MC2 with lm-evaluation-harness's prompt."""
    _evaluate("truthfulqa", model, data, out, batch_size, dtype, mesh)


@app.command("vicuna")
def vicuna_command(
    model: ModelOption,
    against: Annotated[str, typer.Option(help="The other model, or a JSON-lines file of its answers.")],
    data: Annotated[
        Path, typer.Option(help="Questions, JSON lines of question_id and text or turns.", callback=on_disk)
    ],
    judge: Annotated[str, typer.Option(help="The judge's name at the endpoint, or reward_model.")],
    out: OutOption,
    reward_model: Annotated[str | None, typer.Option(help="The reward model, with --judge reward_model.")] = None,
    prompt: Annotated[str, typer.Option(help=f"How --model is asked: {_HOW}")] = PLAIN,
    against_prompt: Annotated[str, typer.Option(help="How --against is asked, likewise.")] = PLAIN,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set that holds this probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the answers and of the resamples.")] = 0,
    judge_prompts: Annotated[
        Path | None, typer.Option(help="FastChat's judge_prompts.jsonl.", callback=on_disk)
    ] = None,
    judge_prompt: Annotated[str, typer.Option(help="A pairwise prompt of that file.")] = "pair-v2",
    url: Annotated[str, typer.Option(help="The endpoint's base.")] = "https://api.openai.com/v1",
    key_variable: Annotated[str, typer.Option(help="The environment variable with the key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(help="Requests in flight at once.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a reply.")] = 120.0,
    attempts: Annotated[int, typer.Option(help="Tries of one item.")] = 6,
    pause: Annotated[float, typer.Option(min=0, help="Seconds before the second try; doubled each time.")] = 1.0,
    reply_tokens: Annotated[int, typer.Option(help="The most tokens of a reply.")] = 1024,
    max_requests: Annotated[int, typer.Option(min=0, help="The most requests of this call.")] = 400,
    max_tokens: Annotated[int, typer.Option(min=0, help="The most tokens of this call.")] = 1_000_000,
    samples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples.")] = 1000,
    batch_size: BatchSize = 16,
    dtype: DtypeOption = "float32",
    mesh: MeshOption = None,
) -> None:
    """Two models' answers before a judge, in both orders: win rates with intervals, at equal length too, and flips."""
    check_dtype(dtype)
    check_writable(out)
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: must be above 0 and at most 1")
    if temperature != 0 and not COLDEST <= temperature < math.inf:
        raise InputError(f"--temperature {temperature}: must be 0 (greedy), or {COLDEST:g} or more, and finite")
    questions = vicuna.read_questions(data)
    if (judge == REWARD_MODEL) != (reward_model is not None):
        raise InputError("--judge reward_model and --reward-model MODEL belong together; give both or neither")
    place = make_mesh(MeshConfig()) if mesh is None else parse_mesh(mesh)
    size = whole_rows(place, batch_size)
    sampling = SamplingConfig(
        temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, batch_size=size
    )
    folder = out.with_name(f"{out.stem}_files")
    judged_by: duel.EndpointJudge | duel.RewardJudge
    if reward_model is None:
        asked = SCORES if judge_prompts is None else read_prompt(judge_prompts, judge_prompt)
        endpoint = Endpoint(
            url=url,
            model=judge,
            key_variable=key_variable,
            timeout=timeout,
            attempts=attempts,
            pause=pause,
            concurrency=concurrency,
            reply_tokens=reply_tokens,
            max_requests=max_requests,
            max_tokens=max_tokens,
        )
        judged_by = duel.EndpointJudge(Judge(endpoint, folder / "replies"), asked)
    sides: list[list[Record]] = []
    with jax.set_mesh(place), exact_products(dtype):
        for source, how in ((model, prompt), (against, against_prompt)):
            path = local_path(source)
            if path.suffix == ".jsonl" and path.is_file():
                sides.append(vicuna.read_answers(path, questions))
            else:
                located = locate(source)
                loaded: Model = load_model(located, place, dtype)
                own = ends(loaded, located)
                sides.append(answer(loaded, questions, how, sampling, seed, folder, stderr_progress, own))
                # Two large models need not fit.
                del loaded
        if reward_model is not None:
            judged_by = duel.RewardJudge(load_model(locate(reward_model), place, dtype), size)
        found = duel.duel(questions, sides[0], sides[1], judged_by, Bootstrap(samples, seed), (model, against), out)
    typer.echo(json.dumps({key: value for key, value in found.items() if key != "items"}, indent=2))
    lines = duel.missing(found["items"])
    for line in lines[:_SHOWN]:
        typer.echo(line)
    if len(lines) > _SHOWN:
        typer.echo(f"and {len(lines) - _SHOWN} replies more without verdict")
    if found["not_judged"]:
        typer.echo(f"{found['not_judged']} pairs have no verdict yet; the same command asks for what is missing")
        raise typer.Exit(1)


def _evaluate(
    name: str, model: str, data: Path | None, out: Path, batch_size: int, dtype: str, mesh: str | None
) -> None:
    check_dtype(dtype)
    check_writable(out)
    benchmark = BENCHMARKS[name]
    questions = benchmark.load(data)
    place = make_mesh(MeshConfig()) if mesh is None else parse_mesh(mesh)
    loaded = load_model(locate(model), place, dtype)

    with jax.set_mesh(place):
        found = evaluate(benchmark, loaded, questions, whole_rows(place, batch_size), out, stderr_progress)
    figures = {key: value for key, value in found.items() if key != "items"}
    typer.echo(json.dumps(figures, indent=2, ensure_ascii=False))
