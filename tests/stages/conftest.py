"""A small world for the training stages: a word tokenizer, tiny random models on disk, and records to learn from."""

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from almost_jax.config import ExperimentConfig, MeshConfig
from almost_jax.core.llama import LlamaConfig, init_params
from almost_jax.core.partitioning import make_mesh
from almost_jax.core.rotary import RopeConfig
from almost_jax.io.huggingface import save_llama
from almost_jax.io.records import write_records
from almost_jax.io.run import Run
from almost_jax.stages import reward, sft

WORDS = "Human: Assistant: what is the of a red green blue stone river bird please thanks bye one two three".split()
TINY = LlamaConfig(
    vocab_size=len(WORDS) + 3,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-3,
    rope=RopeConfig(theta=1234.0),
    max_position_embeddings=128,
    initializer_range=0.3,
)


def write_tokenizer(folder: Path) -> None:
    """Whitespace-separated words, as in the micro-world: <pad> 0, <bos> 1, <eos> 2."""
    names = ["<pad>", "<bos>", "<eos>", *WORDS]
    backend = Backend(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Without a decoder, tokens are joined by spaces.
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two random models in Hugging Face's layout: `small`, and `large` with one more layer."""
    home = tmp_path_factory.mktemp("models")
    for name, config in (("small", TINY), ("large", dataclasses.replace(TINY, num_layers=3))):
        folder = home / name
        folder.mkdir()
        save_llama(folder, config, init_params(config, jax.random.key(config.num_layers)), "float32")
        write_tokenizer(folder)
    return {name: str(home / name) for name in ("small", "large")}


@pytest.fixture(scope="session")
def user_demonstrations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of two demonstrations for prompted models."""
    path = tmp_path_factory.mktemp("demonstrations") / "tiny.yaml"
    path.write_text(
        "dialogues:\n"
        "- turns: [{human: what is the red stone}, {assistant: a red bird thanks}]\n"
        "- turns: [{human: what is two}, {assistant: one of three bye}]\n"
    )
    return str(path)


@pytest.fixture
def make_run(tiny_models: dict[str, str], user_demonstrations: str) -> Callable[..., Run]:
    """Build a run in a folder, with records in it; keyword arguments replace whole sections of the config."""

    def build(folder: Path, mesh: MeshConfig | None = None, devices: int = 1, **sections: Any) -> Run:
        prompted = {"model": "large", "demonstrations": user_demonstrations, "shots": 2}
        optimizer = {"learning_rate": 3e-3, "warmup_steps": 1}
        training = {"optimizer": optimizer, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "max_length": 64}
        config: dict[str, Any] = {
            "name": "tiny",
            "seed": 7,
            "models": tiny_models,
            "queries": {"source": "microworld", "count": 24},
            "as_is_reward": {"votes": "microworld", "pairs": 40, "held_out": 8, "training": training},
            "comparisons": {
                "configurations": {"A": prompted, "B": {**prompted, "model": "small"}},
                "model_order": ["large", "small"],
                "demonstrations_order": [user_demonstrations],
            },
            "reward": {"held_out": 8, "reference_samples": 30, "training": training},
            "demonstrations": {
                "assistant": prompted,
                "user": prompted,
                "queries": 10,
                "n": 3,
                "sampling": {"max_new_tokens": 9, "batch_size": 6},
                "user_sampling": {"max_new_tokens": 7, "batch_size": 4},
            },
            "sft": {"training": training},
            "ppo": {
                "steps": 4,
                "batch_size": 8,
                "num_ppo_epochs": 2,
                "num_mini_batches": 2,
                "optimizer": {"learning_rate": 3e-3, "schedule": "linear"},
                "value_learning_rate": 1e-2,
                "sampling": {"temperature": 0.7, "max_new_tokens": 9},
                "checkpoint_every": 2,
                "sample_every": 2,
            },
            "evaluation": {},
        }
        config |= sections
        if config["queries"]["source"] != "microworld":
            config |= {"as_is_reward": {"votes": "none"}, "filters": {"as_is": False}}
        folder.mkdir(parents=True, exist_ok=True)
        write_world(folder)
        return Run(
            directory=folder,
            config=ExperimentConfig.model_validate(config),
            mesh=make_mesh(mesh or MeshConfig(), jax.devices()[:devices]),
            tensorboard=False,
            console=Console(file=io.StringIO(), width=200),
        )

    return build


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the SFT policy and the reward model lie that all PPO tests start from, once made."""
    return {"home": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def make_ppo(make_run: Callable[..., Run], trained: dict[str, Path]) -> Callable[..., Run]:
    """A run whose SFT policy and reward model are there; keyword arguments replace values of `ppo`."""

    def build(folder: Path, mesh: MeshConfig | None = None, devices: int = 1, **ppo: Any) -> Run:
        base = make_run(trained["home"])
        if not base.path("sft", "model").exists():
            reward.run_stage(base)
            sft.fine_tune(base, "sft", "demonstrations.jsonl")
        section = {**base.config.ppo.model_dump(), **ppo}
        run = make_run(folder, mesh=mesh, devices=devices, ppo=section)
        for name in ("reward", "sft"):
            if not run.path(name).exists():
                shutil.copytree(base.path(name), run.path(name))
        return run

    return build


def write_world(folder: Path) -> None:
    """24 queries, two kept comparisons for each and one dropped, and ragged demonstrations of one or two turns."""
    content = WORDS[2:]
    queries = [
        {"id": f"q{i}", "text": f"what is {content[i % 17]} {content[(3 * i + 1) % 17]} {'please ' * (i % 3)}".strip()}
        for i in range(24)
    ]
    comparisons, demonstrations = [], []
    for i, query in enumerate(queries):
        for j, kept in enumerate((True, True, False)):
            good = " ".join(content[(i + j + k) % 17] for k in range(2 + (i + j) % 5)) + " thanks"
            bad = " ".join(content[(5 * i + j + 2 * k) % 17] for k in range(1 + (2 * i + j) % 6)) + " bye"
            comparisons.append(
                {
                    "query_id": query["id"],
                    "chosen": {"configuration": "A", "text": good},
                    "rejected": {"configuration": "B", "text": bad},
                    "rule": "size",
                    "kept": kept,
                    "dropped_by": None if kept else "length",
                    "as_is_margin": 1.0,
                }
            )
        turns = [{"role": "human", "text": query["text"]}, {"role": "assistant", "text": good}]
        if i % 3 == 0:
            turns += [{"role": "human", "text": "please one"}, {"role": "assistant", "text": bad}]
        demonstrations.append({"query_id": query["id"], "turns": [{**turn, "candidates": []} for turn in turns]})
    write_records(folder / "queries.jsonl", queries)
    write_records(folder / "comparisons.jsonl", comparisons)
    write_records(folder / "demonstrations.jsonl", demonstrations)
    write_records(folder / "demonstrations_self_play.jsonl", demonstrations[::-1])


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
