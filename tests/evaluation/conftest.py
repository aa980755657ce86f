"""Tiny random models, and a folder with what the stages before the evaluation leave."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from almost_jax.config import ExperimentConfig, MeshConfig
from almost_jax.core.heads import add_head
from almost_jax.core.llama import LlamaConfig, init_params
from almost_jax.core.partitioning import make_mesh
from almost_jax.core.rotary import RopeConfig
from almost_jax.evaluation.stage import run_stage
from almost_jax.io.huggingface import save_llama
from almost_jax.io.models import Model, load_model, save_model
from almost_jax.io.records import write_records
from almost_jax.io.run import Run
from almost_jax.microworld.world import generate_queries

WORDS = "Human: Assistant: what is the color of please ? . i can not help with that red blue sure here it".split()


def tiny(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        intermediate_size=24,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rms_norm_eps=1e-3,
        rope=RopeConfig(theta=1234.0),
        max_position_embeddings=128,
        initializer_range=0.3,
    )


def write_tokenizer(folder: Path) -> None:
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
    backend = Backend(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="", cleanup=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def build_run(folder: Path, home: Path, **sections: Any) -> Run:
    prompted = {"model": "vanilla", "demonstrations": str(home / "demonstrations.yaml"), "shots": 2}
    sampling = {"max_new_tokens": 6, "batch_size": 4}
    config: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "models": {"vanilla": str(home / "vanilla")},
        "queries": {"source": "microworld", "count": 5},
        "as_is_reward": {"model": "vanilla", "votes": "microworld"},
        "comparisons": {
            "configurations": {"A": prompted, "B": {**prompted, "shots": 1}},
            "model_order": ["vanilla"],
            "demonstrations_order": [prompted["demonstrations"]],
            "sampling": sampling,
        },
        "reward": {"model": "vanilla"},
        "demonstrations": {"assistant": prompted, "user": prompted, "sampling": sampling},
        "sft": {"model": "vanilla"},
        "dpo": {},
        "over_optimisation": {"steps": 1},
        "ppo": {},
        "evaluation": {
            "gold": True,
            "queries": 18,
            "best_of": 3,
            "curve_queries": 7,
            "sampling": {**sampling, "temperature": 0.7},
            "bootstrap_samples": 50,
        },
    }
    for section, changes in sections.items():
        config[section] = {**config.get(section, {}), **changes}
    if config["queries"]["source"] != "microworld":
        config["as_is_reward"]["votes"] = "none"
        config["filters"] = {**config.get("filters", {}), "as_is": False}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Run(folder, ExperimentConfig.model_validate(config), mesh, False, Console(file=io.StringIO(), width=200))


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """Build a run over a folder; keyword arguments change keys of the config's sections."""
    return build_run


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vanilla model, demonstrations, and `run`: a folder with what the stages before the evaluation leave."""
    home = tmp_path_factory.mktemp("home")
    vanilla = home / "vanilla"
    vanilla.mkdir()
    config = tiny(2)
    save_llama(vanilla, config, init_params(config, jax.random.key(0)), "float32")
    write_tokenizer(vanilla)
    (home / "demonstrations.yaml").write_text(
        "dialogues:\n- turns: [{human: what is the color}, {assistant: sure here it is .}]\n"
        "- turns: [{human: color of it please}, {assistant: it is red .}]\n"
    )
    run = build_run(home / "run", home)
    source = load_model(str(vanilla), run.mesh, "float32")
    policies = ("sft/model", "sft_self_play/model", "rlsf/model", "rlsf/policies/2", "dpo/model")
    policies += ("over_optimisation/policies/1",)
    for seed, name in enumerate(policies, start=1):
        params = init_params(config, jax.random.key(seed))
        save_model(run.path(name), Model(config, params, source.tokenizer, "policy", name))
    shutil.copytree(run.path("sft/model"), run.path("rlsf/policies/0"))
    for seed, name in enumerate(("reward/model", "as_is_reward/model"), start=8):
        key = jax.random.key(seed)
        params = add_head(init_params(config, key), config, key, 0.5)
        save_model(run.path(name), Model(config, params, source.tokenizer, "reward", name, 0.25, 1.5))
    texts = generate_queries(1, 5, "training")
    write_records(run.path("queries.jsonl"), [{"id": f"q{i}", "text": text} for i, text in enumerate(texts)])
    sides = {"chosen": {"configuration": "A", "text": "sure ."}, "rejected": {"configuration": "B", "text": "red"}}
    verdict = {"rule": "size", "kept": True, "dropped_by": None, "as_is_margin": 1.0}
    write_records(run.path("comparisons.jsonl"), [{"query_id": f"q{i}", **sides, **verdict} for i in range(5)])
    turns = [{"role": "human", "text": texts[0]}, {"role": "assistant", "text": "sure ."}]
    for name in ("demonstrations.jsonl", "demonstrations_self_play.jsonl"):
        write_records(run.path(name), [{"query_id": "q0", "turns": turns}])
    return home


@pytest.fixture(scope="session")
def finished(home: Path) -> Path:
    """The same folder after the evaluation."""
    run_stage(build_run(home / "run", home))
    return home / "run"
