"""A model with all that belongs to it: the micro-world's weights, a folder of ours or Hugging Face's, or a GGUF file.

A folder of ours holds `params/` (an Orbax tree, in float32 unless it was saved otherwise), `model.json` (the shape, the
kind, the normalisation of a reward model's scores) and the tokenizer's files. It appears whole or not at all.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import almost_jax
from almost_jax.core.heads import HEAD, head_axes
from almost_jax.core.llama import LlamaConfig, Params, abstract_params, logical_axes
from almost_jax.core.partitioning import shardings
from almost_jax.core.rotary import RopeConfig
from almost_jax.errors import InputError
from almost_jax.io.checkpoints import FILES, find_damage, restore_tree, save_tree, seal
from almost_jax.io.distributed import from_primary, is_primary, wait_for_all
from almost_jax.io.folders import check_room, whole_folder
from almost_jax.io.gguf import GGUF, load_gguf_tokenizer, open_gguf
from almost_jax.io.huggingface import open_llama
from almost_jax.io.paths import local_path
from almost_jax.io.tokenizer import CARD, Tokenizer, load_tokenizer
from almost_jax.io.weights import Source, check_source, common_dtype, read_params

MICROWORLD = "microworld:"
# Of a model's config: how a program runs it, which is no matter of the model's.
RUN_FIELDS = ("remat", "gather", "attention", "vocab_chunk", "out_in")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
        score_at_end: whether a reward model's score is read at an end-of-text token behind the text, as ours are; else
            at the text's last token.
    """

    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer
    kind: Literal["policy", "reward"]
    name: str
    reward_mean: float = 0.0
    reward_std: float = 1.0
    score_at_end: bool = True


def load_model(source: str, mesh: Mesh, dtype: str) -> Model:
    """Load a model onto a mesh, to compute with.

    Args:
        source: `microworld:NAME`, a folder: one of ours (with model.json) or Hugging Face's (with config.json), or a
            GGUF file.
        mesh: where the parameters go, split as `core.partitioning.RULES` say.
        dtype: compute dtype; parameters become float32 whatever they were stored as.

    Raises:
        InputError: the source is missing, damaged, or not a LLaMA that can be run, or its tokenizer doesn't fit it.
    """
    model = read_model(source, mesh, "float32")
    return dataclasses.replace(model, config=dataclasses.replace(model.config, dtype=dtype))


def read_model(source: str, mesh: Mesh, stored: str | None) -> Model:
    """Read a model onto a mesh; see `load_model`.

    Args:
        source: as there.
        mesh: as there.
        stored: dtype of the parameters; None keeps the one they are stored in (float32 where there are several).
    """
    # Process 0 looks first: what it finds isn't replaced before all have read it.
    path = from_primary(lambda: _find(source))
    if path.is_file():
        model = _load_gguf(path, source, mesh, stored)
    elif (path / CARD).is_file():
        model = _load_ours(path, source, mesh, stored)
    elif (path / "config.json").is_file():
        model = _load_theirs(path, source, mesh, stored)
    else:
        raise InputError(f"model {source!r}: {path} has neither {CARD} (ours) nor config.json (Hugging Face)")
    if model.tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"model {source!r}: its tokenizer has {model.tokenizer.vocab_size} tokens, "
            f"but its vocabulary has room for {model.config.vocab_size}"
        )
    return model


def save_model(directory: Path, model: Model, beside: Mapping[str, bytes] | None = None) -> None:
    """Write a model as a folder of ours; it appears under its name only when it is whole, and replaces what was there.

    Args:
        directory: of that name.
        model: in the dtype in which it is stored.
        beside: further files, by name.

    Raises:
        InputError: the normalisation isn't finite, its standard deviation isn't positive, or the disk is full.
    """
    if not (math.isfinite(model.reward_mean) and math.isfinite(model.reward_std) and model.reward_std > 0):
        raise InputError(
            f"{directory}: scores can't be normalised by mean {model.reward_mean} and std {model.reward_std}; "
            "expected finite numbers, std positive"
        )
    card = {
        "kind": model.kind,
        "reward_mean": float(model.reward_mean),
        "reward_std": float(model.reward_std),
        "score_at_end": model.score_at_end,
        "origin": model.name,
        "tokenizer": model.tokenizer.fingerprint,
        "dtype": str(jax.tree.leaves(model.params)[0].dtype),
        "config": {name: value for name, value in dataclasses.asdict(model.config).items() if name not in RUN_FIELDS},
    }
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    with whole_folder(directory, size) as temporary:

        def describe() -> None:
            model.tokenizer.save(temporary)
            for name, data in (beside or {}).items():
                (temporary / name).write_bytes(data)
            (temporary / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            check_room(Path(directory).absolute(), size)

        from_primary(describe)
        save_tree(temporary / "params", model.params)
        wait_for_all()
        if is_primary():
            seal(temporary / "params")


def _find(source: str) -> Path:
    if source.startswith(MICROWORLD):
        weights = Path(almost_jax.__file__).parent / "microworld" / "weights"
        known = sorted(path.name for path in weights.iterdir() if path.is_dir()) if weights.is_dir() else []
        name = source.removeprefix(MICROWORLD)
        if name not in known:
            raise InputError(f"model {source!r}: the micro-world ships {', '.join(known) or 'no weights'}")
        return weights / name
    path = local_path(source).expanduser()
    if path.is_file() and path.suffix in PICKLES:
        raise InputError(
            f"model {source!r}: a pickle can run any code when it is read and is refused; save safetensors"
        )
    if path.is_file() and path.suffix != GGUF:
        raise InputError(f"model {source!r}: a file that isn't {GGUF}; expected a folder with a model, or a GGUF file")
    if not path.exists():
        raise InputError(
            f"model {source!r}: no such folder; expected microworld:NAME, a folder with a model, or a GGUF file"
        )
    return path


def _load_gguf(path: Path, source: str, mesh: Mesh, stored: str | None) -> Model:
    config, tensors = open_gguf(path)
    params = _read(config, "policy", tensors, mesh, stored)
    return Model(config, params, load_gguf_tokenizer(path), "policy", source)


def _load_theirs(folder: Path, source: str, mesh: Mesh, stored: str | None) -> Model:
    found = open_llama(folder)
    kind: Literal["policy", "reward"] = "reward" if found.reward else "policy"
    # The tokenizer is the smaller part to fail on.
    tokenizer = load_tokenizer(folder)
    params = _read(found.config, kind, found.source, mesh, stored)
    normalisation = found.reward_mean, found.reward_std
    return Model(found.config, params, tokenizer, kind, source, *normalisation, found.score_at_end)


def _read(config: LlamaConfig, kind: str, source: Source, mesh: Mesh, stored: str | None) -> Params:
    reward = kind == "reward"
    placement = _placement(config, kind, mesh)
    check_source(config, reward, source)
    return read_params(config, reward, source, stored or common_dtype(config, reward, source), placement)


def _load_ours(folder: Path, source: str, mesh: Mesh, stored: str | None) -> Model:
    card = _read_card(folder / CARD)
    config, kind = card["config"], card["kind"]
    damage = from_primary(lambda: find_damage(folder / "params"))
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
    params = _cast(restore_tree(folder / "params", expected), stored or card["dtype"])
    normalisation = card["reward_mean"], card["reward_std"]
    return Model(config, params, tokenizer, kind, source, *normalisation, card["score_at_end"])


def is_complete(folder: Path) -> bool:
    """Whether a folder of `save_model` has all of its files, each of its size; `load_model` looks at their content."""
    try:
        listed = json.loads((folder / "params" / FILES).read_bytes())
        return (folder / CARD).is_file() and all(
            (folder / "params" / name).stat().st_size == size for name, (size, _) in listed.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def model_digest(model: Model) -> str:
    """What tells this model from others: its shape, its tokenizer, how it is scored, and a sum over each parameter."""
    sums = jax.device_get(_sums(model.params))
    numbers = [model.kind, model.reward_mean, model.reward_std, model.score_at_end, *map(int, sums)]
    content = json.dumps([dataclasses.asdict(model.config), model.tokenizer.fingerprint, numbers])
    return hashlib.sha256(content.encode()).hexdigest()


@jax.jit
def _sums(params: Any) -> list[jax.Array]:
    # Of the bits, each times an odd number of its place: whole numbers add up alike however devices share them.
    def total(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place, stride = jnp.ones(leaf.shape, jnp.uint32), 2
        for axis in reversed(range(leaf.ndim)):
            place = place + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        return jnp.sum(bits * place, dtype=jnp.uint32)

    return [total(leaf) for leaf in jax.tree.leaves(params)]


def saved_config(folder: Path) -> LlamaConfig:
    """The shape of a model that `save_model` wrote, from its model.json alone.

    Raises:
        InputError: it isn't one of ours.
    """
    config: LlamaConfig = _read_card(folder / CARD)["config"]
    return config


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_bytes())
        shape = {name: value for name, value in card["config"].items() if name not in RUN_FIELDS}
        config = LlamaConfig(**{**shape, "rope": RopeConfig(**shape["rope"])})
        if card["kind"] not in ("policy", "reward"):
            raise ValueError(f"kind {card['kind']!r}; expected policy or reward")
        numbers = {key: float(card[key]) for key in ("reward_mean", "reward_std")}
        return {
            "config": config,
            "kind": card["kind"],
            "tokenizer": card["tokenizer"],
            "dtype": str(jnp.dtype(card["dtype"])),
            "score_at_end": bool(card.get("score_at_end", True)),
            **numbers,
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a model of ours ({type(error).__name__}: {error})") from error


def _abstract(config: LlamaConfig, kind: str) -> Params:
    shaped: Any = jax.ShapeDtypeStruct
    tree = abstract_params(config)
    return {**tree, HEAD: {"kernel": shaped((config.hidden_size,), jnp.float32)}} if kind == "reward" else tree


def _placement(config: LlamaConfig, kind: str, mesh: Mesh) -> Any:
    axes = logical_axes(config)
    placement = shardings({**axes, **head_axes()} if kind == "reward" else axes, mesh)
    for (path, leaf), where in zip(
        jax.tree_util.tree_leaves_with_path(_abstract(config, kind)), jax.tree.leaves(placement), strict=True
    ):
        for size, axis in zip(leaf.shape, where.spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise InputError(
                    f"mesh: {axis} {mesh.shape[axis]} can't split {name} of shape {leaf.shape}; "
                    f"expected a divisor of {size}"
                )
    return placement


def _cast(params: Params, dtype: str) -> Params:
    """Cast a tree, leaf by leaf: the old one is given up on the way."""
    leaves, structure = jax.tree.flatten(params)
    del params
    for place, leaf in enumerate(leaves):
        leaves[place] = leaf.astype(dtype)
        del leaf
    cast: Params = jax.tree.unflatten(structure, leaves)
    return cast
