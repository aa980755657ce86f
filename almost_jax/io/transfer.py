"""Models from elsewhere to folders of ours, and from ours to folders that transformers loads."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

import almost_jax
from almost_jax.config import MeshConfig
from almost_jax.core.heads import HEAD, token_scores
from almost_jax.core.llama import LlamaConfig, Params, hidden_states, logits
from almost_jax.core.partitioning import make_mesh
from almost_jax.errors import InputError
from almost_jax.io.folders import whole_folder
from almost_jax.io.huggingface import save_llama
from almost_jax.io.models import MICROWORLD, Model, read_model, save_model
from almost_jax.io.paths import local_path
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.io.weights import DTYPES

GENERATION = "generation_config.json"
# What is fetched of a model on the hub: no pickles, no weights of other frameworks.
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
# The check of an export reads this many tokens.
_PROBE = 16
# Our dialogue, for models that bring no template of their own: as `stages.dialogues` writes it, with the end of text
# behind each of the assistant's turns. The reply begins with a space.
DIALOGUE_TEMPLATE = (
    "{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ 'Assistant: ' if message['role'] == 'assistant' else 'Human: ' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written: the number of parameters, their dtype, and how far the results moved by rounding to it.

    `difference` is the largest one between log-probs (a reward model's raw scores) of what was written and of what was
    held, over a few tokens; 0 when nothing was rounded.
    """

    parameters: int
    dtype: str
    difference: float


def import_model(source: str, destination: Path, dtype: str | None) -> Model:
    """Write a model as a folder of ours.

    Args:
        source: a Hugging Face folder, a name on the Hugging Face hub, a GGUF file, or what `load_model` takes.
        destination: a folder that doesn't exist yet; it appears when it is whole.
        dtype: of the stored parameters; None keeps the source's.

    Returns:
        The model, in host memory.

    Raises:
        InputError: the source can't be had or run faithfully, or the destination exists or can't be written.
    """
    _refuse_existing(destination)
    _check_dtype(dtype)
    found = locate(source)
    model = dataclasses.replace(read_model(found, host_mesh(), dtype), name=source)
    generation = Path(found) / GENERATION
    save_model(destination, model, {GENERATION: generation.read_bytes()} if generation.is_file() else {})
    return model


def export_model(
    source: str, destination: Path, dtype: str | None, shard_bytes: int, facts: Mapping[str, str]
) -> Export:
    """Write a model as a folder that transformers loads, and check it before it appears.

    A policy becomes a LlamaForCausalLM. A reward model becomes a LlamaForSequenceClassification of raw scores; their
    normalisation, for which that class has no place, stands in config.json as `reward_mean` and `reward_std`.

    Args:
        source: what `load_model` takes.
        destination: a folder that doesn't exist yet.
        dtype: of the weights; None keeps the one that they are stored in.
        shard_bytes: a file with more weights than this is split.
        facts: for the model card, by name.

    Raises:
        InputError: the model can't be read, the destination exists or can't be written, or what was written isn't what
            was held.
    """
    _refuse_existing(destination)
    _check_dtype(dtype)
    found = locate(source)
    model = read_model(found, host_mesh(), None)
    reward = model.kind == "reward"
    if model.config.hidden_size % model.config.num_heads:
        raise InputError(
            f"{source}: hidden_size {model.config.hidden_size} isn't a multiple of num_attention_heads "
            f"{model.config.num_heads}, as transformers' LlamaConfig wants it, whatever head_dim says"
        )
    dtype = dtype or str(jax.tree.leaves(model.params)[0].dtype)
    # Sequence classifiers have no output matrix.
    params = {name: tree for name, tree in model.params.items() if not (reward and name == "lm_head")}
    config = dataclasses.replace(model.config, tie_embeddings=True) if reward else model.config
    tokenizer, extra = _tokenizer_to_export(model)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    with whole_folder(destination, count * jnp.dtype(dtype).itemsize) as folder:
        save_llama(folder, config, params, dtype, tokenizer, extra, shard_bytes)
        if not reward:
            (folder / GENERATION).write_bytes(_generation_config(found, tokenizer))
        difference = _check(folder, config, params, dtype, tokenizer)
        written = Export(count, dtype, difference)
        (folder / "README.md").write_text(_card(model, destination.name, written, facts), encoding="utf-8")
    return written


def host_mesh() -> Mesh:
    """A mesh of one device, the host's processor."""
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices(backend="cpu")[:1])


def locate(source: str) -> str:
    """Where a model lies on this machine; one that is named on the hub is fetched, or found where it was fetched to.

    Raises:
        InputError: the hub doesn't have it, or can't be reached; a bucket isn't mounted.
    """
    if source.startswith(MICROWORLD):
        return source
    path = local_path(source)
    if path != Path(source):
        return str(path)
    if path.expanduser().exists():
        return str(path.expanduser())
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is None:
        return source
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(source, allow_patterns=_HUB_FILES))
    # The library lets through whatever the network raises.
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(
            f"model {source!r}: no such folder, and it can't be had from the hub ({type(error).__name__}: {line})"
        ) from error


def _refuse_existing(destination: Path) -> None:
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise InputError(f"{destination}: exists already; expected the name of a new folder")


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} isn't known; expected one of {', '.join(DTYPES)}")


def _tokenizer_to_export(model: Model) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and further fields of config.json."""
    if model.kind == "policy":
        return model.tokenizer.with_chat_template(DIALOGUE_TEMPLATE), {}
    extra: dict[str, Any] = {
        "reward_mean": model.reward_mean,
        "reward_std": model.reward_std,
        "score_at_end": model.score_at_end,
    }
    tokenizer = model.tokenizer
    if tokenizer.pad_id == tokenizer.eos_id:
        # transformers reads the score before the first padding, so what pads must not be what ends a text.
        other = next((one for one in (tokenizer.bos_id, tokenizer.unk_id) if one not in (None, tokenizer.eos_id)), None)
        if other is None:
            extra["pad_token_id"] = None
        else:
            tokenizer = tokenizer.with_pad(other)
    return tokenizer, extra


def _generation_config(source: str, tokenizer: Tokenizer) -> bytes:
    given = Path(source) / GENERATION
    if given.is_file():
        return given.read_bytes()
    fields = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return (json.dumps(fields, indent=2) + "\n").encode()


def _check(folder: Path, config: LlamaConfig, params: Params, dtype: str, tokenizer: Tokenizer) -> float:
    """Read back what was written and compare it: every number, the config, the tokenizer, and the results.

    Returns:
        The largest difference between results of what was written and of what was held.
    """
    back = read_model(str(folder), host_mesh(), dtype)
    if back.config != dataclasses.replace(config, dtype=back.config.dtype, scan_layers=True, remat="none"):
        raise InputError(f"{folder}: the config that was written isn't the model's: {back.config}, held {config}")
    if back.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(f"{folder}: the tokenizer that was written isn't the model's")
    held, written = jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(back.params)
    for (path, mine), theirs in zip(held, written, strict=True):
        if np.asarray(mine.astype(dtype)).tobytes() != np.asarray(theirs).tobytes():
            raise InputError(f"{folder}: {jax.tree_util.keystr(path)} isn't what was held")
    ours = _results(config, params)
    difference = float(np.abs(ours - _results(config, back.params)).max())
    exact = all(mine.dtype == jnp.dtype(dtype) for _, mine in held)
    if not np.isfinite(difference) or (exact and difference > 0):
        raise InputError(f"{folder}: results differ by {difference} from those of what was held")
    return difference


def _results(config: LlamaConfig, params: Params) -> np.ndarray:
    tokens = (np.arange(_PROBE, dtype=np.int32)[None, :] * 7919 + 13) % config.vocab_size
    return np.asarray(_probe(params, dataclasses.replace(config, dtype="float32"), jnp.asarray(tokens, jnp.int32)))


@functools.partial(jax.jit, static_argnames="config")
def _probe(params: Params, config: LlamaConfig, tokens: Array) -> Array:
    """Log-probs [1, T, V], or a reward model's raw scores [1, T], in float32."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    if HEAD in wide:
        return token_scores(wide, config, tokens)
    return jax.nn.log_softmax(logits(wide, config, hidden_states(wide, config, tokens)), axis=-1)


def _card(model: Model, name: str, written: Export, facts: Mapping[str, str]) -> str:
    """The model card: what this is, how it is asked, and what it came from."""
    config = model.config
    rows = {
        "made by": f"almost-jax {almost_jax.__version__}",
        "from": model.name,
        "parameters": f"{written.parameters:,} in {written.dtype}",
        "shape": (
            f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads of {config.head_dim} "
            f"({config.num_kv_heads} of keys and values), {config.vocab_size:,} tokens"
        ),
        "checked": (
            "every tensor was read back; results differ by at most "
            f"{written.difference:.2g} from those before rounding to {written.dtype}"
        ),
        **facts,
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    head = "---\nlibrary_name: transformers\ntags: [almost-jax]\n---\n"
    if model.kind == "reward":
        ending = (
            "and the end-of-text token, at which its score is read."
            if model.score_at_end
            else "and its score is read at the last token."
        )
        about = (
            "A reward model: `LlamaForSequenceClassification` with one label. It reads\n"
            "`Human: {query}\\n\\nAssistant: {response}` (after the beginning-of-text token, if there is one)\n"
            f"{ending} Scores are raw; normalised ones are\n"
            f"`(score - {model.reward_mean!r}) / {model.reward_std!r}`, from `reward_mean` and `reward_std` in\n"
            "config.json: mean 0 and standard deviation 1 over the reference samples."
        )
    else:
        about = (
            "A language model: `LlamaForCausalLM`. The tokenizer's chat template says how it is asked; where the\n"
            "model brought none, it is the plain dialogue `Human: {query}\\n\\nAssistant:`."
        )
    return f"{head}\n# {name}\n\n{about}\n\n| | |\n|---|---|\n{table}\n"


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())
