"""A model's answers to a list of questions, written as they come: what a judge compares.

How a model is asked is a choice: `plain` is the dialogue that models of ours are trained on, `chat` the tokenizer's own
template, and `NAME:K` a few-shot prompt of the first K demonstrations of NAME, for vanilla models.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from almost_jax.config import PromptedModel, SamplingConfig
from almost_jax.errors import InputError
from almost_jax.io.distributed import from_primary
from almost_jax.io.models import Model, model_digest
from almost_jax.io.progress import ShowProgress
from almost_jax.io.records import Record, RecordWriter, read_records
from almost_jax.sampling.engine import Engine, Request, in_order
from almost_jax.stages.prompting import (
    DialogueRequest,
    Reply,
    Responder,
    engine_settings,
    group_size,
    reply,
    sampling_rules,
)
from almost_jax.stages.templates import demonstrations_text

PLAIN, CHAT = "plain", "chat"


def answer(
    model: Model,
    questions: Sequence[Record],
    asked: str,
    sampling: SamplingConfig,
    seed: int,
    folder: Path,
    show_progress: ShowProgress,
    ends: Sequence[int] = (),
) -> list[Record]:
    """Answer every question, going on where an interrupted call left off.

    Args:
        model: a language model.
        questions: {"question_id", "question"}.
        asked: `plain`, `chat` or `NAME:K`.
        sampling: how tokens are drawn.
        seed: with a question's id the source of all chance.
        folder: of the answers: a file whose name tells this model, these questions and settings from others.
        show_progress: shows how many of the questions are answered.
        ends: tokens that end a turn of `chat` beside the tokenizer's end of text.

    Returns:
        {"question_id", "text", "tokens", "finish": "stop" or "length"}, in order.

    Raises:
        InputError: a reward model, a prompt that can't be, or a question too long for the model.
    """
    if model.kind != "policy":
        raise InputError(f"model {model.name!r}: a reward model answers nothing; expected a language model")
    few_shot = prompted(asked)
    prompt = "" if few_shot is None else demonstrations_text(few_shot)
    # What the answers depend on, and not how fast they come.
    drawn = sampling.model_dump(include={"temperature", "top_p", "top_k", "max_new_tokens", "trim_unfinished"})
    own = sorted({*ends} - {model.tokenizer.eos_id}) if asked == CHAT else []
    content = json.dumps([model_digest(model), asked, prompt, drawn, seed, list(questions), *([own] if own else [])])
    path = folder / f"answers-{hashlib.sha256(content.encode()).hexdigest()[:12]}.jsonl"
    if from_primary(path.exists):
        return read_records(path)
    with RecordWriter(path, key=lambda record: json.dumps(record["question_id"])) as writer:
        keys = [json.dumps(one["question_id"]) for one in questions]
        reply_to = _replier(model, asked, prompt, sampling, seed, own)
        with show_progress(f"answers of {model.name}", len(keys), len(writer.done)) as progress:
            for places in writer.torn_groups(keys, group_size(sampling)):
                group = questions[places.start : places.stop]
                for one, found in zip(group, reply_to(group), strict=True):
                    record = {
                        "question_id": one["question_id"],
                        "text": found.text,
                        "tokens": found.tokens,
                        "finish": found.finish,
                    }
                    if writer.write_missing(record):
                        progress.advance()
        writer.finish()
        return writer.records


def prompted(asked: str) -> PromptedModel | None:
    """The few-shot prompt that `NAME:K` names, before a model of no name; None for `plain` and `chat`.

    Raises:
        InputError: it is none of these.
    """
    if asked in (PLAIN, CHAT):
        return None
    name, _, shots = asked.rpartition(":")
    if not name or not shots.isdecimal() or int(shots) < 1:
        raise InputError(f"prompt {asked!r}: expected plain, chat, or NAME:K for the first K demonstrations of NAME")
    return PromptedModel(model="-", demonstrations=name, shots=int(shots))


def _replier(
    model: Model, asked: str, prompt: str, sampling: SamplingConfig, seed: int, ends: Sequence[int]
) -> Callable[[Sequence[Record]], Iterator[Reply]]:
    """What gives the replies to a group of questions, in their order."""
    if asked != CHAT:
        responder = Responder(model, prompt, next_role="assistant", sampling=sampling, seed=seed)
        return lambda group: responder.respond(
            [
                DialogueRequest(f"answer/{one['question_id']}", [{"role": "human", "text": str(one["question"])}])
                for one in group
            ]
        )
    rules = sampling_rules(sampling, (model.tokenizer.eos_id, *ends))
    engine = Engine(model.params, model.config, rules, engine_settings(sampling), seed=seed, prefix_tokens=())

    def by_template(group: Sequence[Record]) -> Iterator[Reply]:
        prompts = [model.tokenizer.encode_chat([{"role": "user", "content": str(one["question"])}]) for one in group]
        requests = [
            Request(f"answer/{one['question_id']}", tuple(tokens)) for one, tokens in zip(group, prompts, strict=True)
        ]
        for completion in in_order(requests, engine.run(requests)):
            yield reply(model.tokenizer, completion, (), False)

    return by_template
