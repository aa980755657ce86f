"""A model with all that belongs to it: from the micro-world's weights, a folder of ours or a Hugging Face folder.

A folder of ours holds `params/` (an Orbax tree, in float32 unless it was saved otherwise), `model.json` (the shape, the
kind, the normalisation of a reward model's scores) and the tokenizer's files. It appears whole or not at all.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import almost_jax
from almost_jax.core.heads import HEAD, head_axes
from almost_jax.core.llama import LlamaConfig, Params, RopeConfig, abstract_params, logical_axes
from almost_jax.core.partitioning import shardings
from almost_jax.errors import InputError
from almost_jax.io.checkpoints import find_damage, restore_tree, save_tree, seal
from almost_jax.io.huggingface import load_llama
from almost_jax.io.tokenizer import Tokenizer, load_tokenizer

MICROWORLD = "microworld:"
CARD = "model.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model or reward model, its tokenizer, and how its scores are normalised.

    Attributes:
        config: the shape and the compute dtype.
        params: float32 on the mesh; a reward model's with its scalar head.
        tokenizer: whose ids the model reads.
        kind: "policy" or "reward".
        name: where it came from.
        reward_mean, reward_std: of the raw scores on reference samples; a normalised score is (raw - mean) / std.
    """

    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer
    kind: Literal["policy", "reward"]
    name: str
    reward_mean: float = 0.0
    reward_std: float = 1.0


def load_model(source: str, mesh: Mesh, dtype: str) -> Model:
    """Load a model onto a mesh.

    Args:
        source: `microworld:NAME`, or a folder: one of ours (with model.json) or Hugging Face's (with config.json).
        mesh: where the parameters go, split as `core.partitioning.RULES` say.
        dtype: compute dtype; parameters become float32 whatever they were stored as.

    Raises:
        InputError: the source is missing, damaged, or not a LLaMA that can be run, or its tokenizer doesn't fit it.
    """
    folder = _folder(source)
    if (folder / CARD).is_file():
        model = _load_ours(folder, source, mesh)
    elif (folder / "config.json").is_file():
        config, params = load_llama(folder)
        kind: Literal["policy", "reward"] = "reward" if HEAD in params else "policy"
        params = jax.device_put(_float32(params), _placement(config, kind, mesh))
        model = Model(config, params, load_tokenizer(folder), kind, source)
    else:
        raise InputError(f"model {source!r}: {folder} has neither {CARD} (ours) nor config.json (Hugging Face)")
    if model.tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"model {source!r}: its tokenizer has {model.tokenizer.vocab_size} tokens, "
            f"but its vocabulary has room for {model.config.vocab_size}"
        )
    return dataclasses.replace(model, config=dataclasses.replace(model.config, dtype=dtype))


def save_model(directory: Path, model: Model) -> None:
    """Write a model as a folder of ours; it appears under its name only when it is whole, and replaces what was there.

    Raises:
        InputError: the normalisation isn't finite, or its standard deviation isn't positive.
    """
    if not (math.isfinite(model.reward_mean) and math.isfinite(model.reward_std) and model.reward_std > 0):
        raise InputError(
            f"{directory}: scores can't be normalised by mean {model.reward_mean} and std {model.reward_std}; "
            "expected finite numbers, std positive"
        )
    directory = Path(directory).absolute()
    temporary = directory.with_name(f".{directory.name}.saving")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tree(temporary / "params", model.params)
    seal(temporary / "params")
    model.tokenizer.save(temporary)
    card = {
        "kind": model.kind,
        "reward_mean": float(model.reward_mean),
        "reward_std": float(model.reward_std),
        "origin": model.name,
        "tokenizer": model.tokenizer.fingerprint,
        "dtype": str(jax.tree.leaves(model.params)[0].dtype),
        "config": dataclasses.asdict(model.config),
    }
    (temporary / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def _folder(source: str) -> Path:
    if source.startswith(MICROWORLD):
        weights = Path(almost_jax.__file__).parent / "microworld" / "weights"
        known = sorted(path.name for path in weights.iterdir() if path.is_dir()) if weights.is_dir() else []
        name = source.removeprefix(MICROWORLD)
        if name not in known:
            raise InputError(f"model {source!r}: the micro-world ships {', '.join(known) or 'no weights'}")
        return weights / name
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(f"model {source!r}: no such folder; expected microworld:NAME or a folder with a model")
    return folder


def _load_ours(folder: Path, source: str, mesh: Mesh) -> Model:
    card = _read_card(folder / CARD)
    config, kind = card["config"], card["kind"]
    damage = find_damage(folder / "params")
    if damage is not None:
        raise InputError(f"model {source!r}: {folder / 'params'} is damaged ({damage})")
    placement = _placement(config, kind, mesh)
    shaped: Any = jax.ShapeDtypeStruct
    expected = jax.tree.map(
        lambda leaf, where: shaped(leaf.shape, jnp.dtype(card["dtype"]), sharding=where),
        _abstract(config, kind),
        placement,
    )
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != card["tokenizer"]:
        raise InputError(f"model {source!r}: the tokenizer in {folder} isn't the one that the model was saved with")
    params = _float32(restore_tree(folder / "params", expected))
    return Model(config, params, tokenizer, kind, source, card["reward_mean"], card["reward_std"])


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_bytes())
        config = LlamaConfig(**{**card["config"], "rope": RopeConfig(**card["config"]["rope"])})
        if card["kind"] not in ("policy", "reward"):
            raise ValueError(f"kind {card['kind']!r}; expected policy or reward")
        numbers = {key: float(card[key]) for key in ("reward_mean", "reward_std")}
        return {
            "config": config,
            "kind": card["kind"],
            "tokenizer": card["tokenizer"],
            "dtype": str(jnp.dtype(card["dtype"])),
            **numbers,
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a model of ours ({type(error).__name__}: {error})") from error


def _abstract(config: LlamaConfig, kind: str) -> Params:
    shaped: Any = jax.ShapeDtypeStruct
    tree = abstract_params(config)
    return {**tree, HEAD: {"kernel": shaped((config.hidden_size,), jnp.float32)}} if kind == "reward" else tree


def _placement(config: LlamaConfig, kind: str, mesh: Mesh) -> Any:
    axes = logical_axes(config)
    return shardings({**axes, **head_axes()} if kind == "reward" else axes, mesh)


def _float32(params: Params) -> Params:
    wide: Params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return wide
