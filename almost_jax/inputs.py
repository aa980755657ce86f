"""What a stage's outputs depend on: the config values it reads, and the content of the models and files these name."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import almost_jax
from almost_jax.config import ExperimentConfig, PromptedModel
from almost_jax.errors import InputError
from almost_jax.evaluation.answers import prompted
from almost_jax.evaluation.benchmark_stage import POLICIES
from almost_jax.io.paths import local_path
from almost_jax.stages.templates import demonstrations_text, prompt_file
from almost_jax.stages.votes import votes_are_a_file

Values: TypeAlias = dict[str, Any]

PACKAGE = Path(almost_jax.__file__).resolve().parent

# Keys that change how a stage computes, but (up to rounding) not what: they make nothing stale, so that a run that went
# out of memory can go on with smaller batches.
NEUTRAL = (
    *(
        f"{section}.{key}"
        for section in ("sampling", "user_sampling")
        for key in ("batch_size", "steps_per_wake", "refill", "prefill_tokens", "group_batches")
    ),
    *("hhh.batch_size", "truthfulqa.batch_size"),
    *("micro_batches", "judge_micro_batches", "packed_length", "steps_per_call"),
    *("checkpoint_every", "max_to_keep", "log_every"),
    # How long a judge is waited for and what a run may spend on it, of the Vicuna questions and of the audit.
    *(
        f"{section}.{key}"
        for section in ("vicuna", "judge")
        for key in ("concurrency", "timeout", "attempts", "pause", "max_requests", "max_tokens", "key_variable")
    ),
)
# Files up to this size are told apart by their content, larger ones by their size and this many blocks spread over
# them: other weights differ everywhere, and a copy is no change, whenever it was made.
HASHED_BYTES = 64 * 2**20
BLOCKS, BLOCK_BYTES = 256, 2**16


@dataclasses.dataclass(frozen=True)
class Value:
    """Something that outputs depend on: the config key by which a stage reads it, its name to people, and itself."""

    key: str
    name: str
    value: Any


def all_values(config: ExperimentConfig) -> list[Value]:
    """Everything outside a run's folder that the outputs of its stages depend on.

    The seed and the compute dtype have the key "": every stage reads them.

    Raises:
        InputError: a model, or a file that the config names, is missing.
    """
    found = [Value("", "seed", config.seed), Value("", "compute_dtype", config.compute_dtype)]
    for key, value in _flatten(config.model_dump(mode="json"), ""):
        # Self-instruct compares its own settings when it goes on, batch size included; its rounds are no groups.
        within_self_instruct = key.startswith("queries.self_instruct.")
        if within_self_instruct and (config.queries.source != "self_instruct" or key.endswith(".group_batches")):
            continue
        if within_self_instruct or not key.endswith(tuple(f".{end}" for end in NEUTRAL)):
            found.append(Value(key, key, value))
    contents = {
        name: _digest(model_path(name, config.models[name])) for name in {name for _, name in config.model_references()}
    }
    for key, name in config.model_references():
        found.append(Value(key, f"models.{name}", config.models[name]))
        found.append(Value(key, f"content of models.{name}", contents[name]))
    return found + [Value(key, f"content of {key}", _digest(path)) for key, path in _files(config)]


def values_of(reads: Sequence[str], ignores: Sequence[str], found: Sequence[Value]) -> Values:
    """Those values that a stage reads, by their names; `reads` are its sections and keys, `ignores` keys of them."""
    return {
        one.name: one.value
        for one in found
        if one.key not in ignores
        and (not one.key or any(one.key == read or one.key.startswith(f"{read}.") for read in reads))
    }


def differences(before: Values, now: Values) -> list[str]:
    """What changed, as "ppo.kl_coef: 0.05 -> 0.1"."""

    def shown(values: Values, key: str) -> str:
        return json.dumps(values[key], ensure_ascii=False) if key in values else "not set"

    keys = [*now, *(key for key in before if key not in now)]
    return [
        f"{key}: {shown(before, key)} -> {shown(now, key)}"
        for key in keys
        if key not in before or key not in now or before[key] != now[key]
    ]


def check_inputs(config: ExperimentConfig) -> None:
    """Look for every model, demonstration and file that the experiment names, before anything is computed.

    Raises:
        InputError: one is missing or malformed, or there are fewer demonstrations than shots.
    """
    for _, name in config.model_references():
        model_path(name, config.models[name])
    for key, model in _prompted(config):
        try:
            demonstrations_text(model)
        except InputError as error:
            raise InputError(f"{key}.{error}") from error
    for key, path in _files(config):
        if not path.is_file():
            raise InputError(f"{key}: there is no file {path}")


def model_path(name: str, source: str) -> Path:
    """The folder behind a model's source.

    Raises:
        InputError: there is none.
    """
    shipped = source.removeprefix("microworld:")
    folder = PACKAGE / "microworld" / "weights" / shipped if shipped != source else _local(f"models.{name}", source)
    if not folder.is_dir():
        known = sorted(path.name for path in folder.parent.glob("*") if path.is_dir()) if shipped != source else []
        hint = f"; shipped are {', '.join(known)}" if known else ""
        if shipped == source and source.count("/") == 1:
            hint = f"; if it is a model of the hub: almost-jax import {source} FOLDER, and name that folder"
        raise InputError(f"models.{name}: {source!r}: there is no folder {folder}{hint}")
    return folder


def _prompted(config: ExperimentConfig) -> Iterator[tuple[str, PromptedModel]]:
    for name, model in config.comparisons.configurations.items():
        yield f"comparisons.configurations.{name}", model
    yield "demonstrations.assistant", config.demonstrations.assistant
    yield "demonstrations.user", config.demonstrations.user
    if config.evaluation.prompted is not None:
        yield "evaluation.prompted", config.evaluation.prompted
    if config.evaluation.vicuna is not None:
        try:
            asked = prompted(config.evaluation.vicuna.prompt)
        except InputError as error:
            raise InputError(f"evaluation.vicuna.{error}") from error
        if asked is not None:
            yield "evaluation.vicuna.prompt", asked


def _files(config: ExperimentConfig) -> Iterator[tuple[str, Path]]:
    """Every (dotted key, file) that the stages will read."""
    for key, model in _prompted(config):
        yield f"{key}.demonstrations", prompt_file(model.demonstrations)
    if config.queries.source == "file":
        yield "queries.file", _local("queries.file", config.queries.file or "")
    if config.queries.source == "self_instruct":
        yield "queries.self_instruct.seeds", prompt_file(config.queries.self_instruct.seeds)
    if config.evaluation.questions is not None:
        yield "evaluation.questions", prompt_file(config.evaluation.questions)
    for name in ("hhh", "truthfulqa"):
        section = getattr(config.evaluation, name)
        if section is not None and section.data is not None:
            yield f"evaluation.{name}.data", _local(f"evaluation.{name}.data", section.data)
    if config.evaluation.vicuna is not None:
        yield "evaluation.vicuna.questions", _local("evaluation.vicuna.questions", config.evaluation.vicuna.questions)
        if config.evaluation.vicuna.against not in POLICIES:
            yield "evaluation.vicuna.against", _local("evaluation.vicuna.against", config.evaluation.vicuna.against)
    if votes_are_a_file(config.as_is_reward.votes):
        yield "as_is_reward.votes", _local("as_is_reward.votes", config.as_is_reward.votes)


def _local(key: str, source: str) -> Path:
    try:
        return local_path(source)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def _flatten(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists are leaves. The order of a mapping is a value too."""
    if not isinstance(tree, dict):
        yield key, tree
        return
    if key == "comparisons.configurations":
        yield f"{key}.order", list(tree)
    for name, value in tree.items():
        yield from _flatten(value, f"{key}.{name}" if key else name)


def _digest(path: Path) -> str:
    """Twelve hexadecimal digits for the content of a file, or of the files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(str(file.relative_to(path.parent)).encode())
            if size <= HASHED_BYTES:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
                continue
            digest.update(str(size).encode())
            with file.open("rb") as opened:
                for block in range(BLOCKS):
                    opened.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                    digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest()[:12]
