"""A mesh of its own for sampling: PPO's rollouts and a run's models on it, equal to those of the training mesh."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from almost_jax.core.llama import LlamaConfig, init_params
from almost_jax.core.partitioning import make_mesh, to_host
from almost_jax.errors import InputError
from almost_jax.experiments import load_experiment
from almost_jax.io.models import Model, load_model, save_model
from almost_jax.io.run import Run
from almost_jax.sampling.rules import SamplingRules
from almost_jax.stages import rlsf
from almost_jax.stages.actors import Actors, Prompts
from almost_jax.stages.rollouts import Players


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    here = make_mesh(load_experiment(Path(__file__).parents[2] / "experiments/microworld.yaml", []).mesh)
    tokenizer = load_model("microworld:small", here, "float32").tokenizer
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size + (-tokenizer.vocab_size) % 8, hidden_size=16, intermediate_size=24,
        num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    save_model(tmp_path / "m", Model(config, init_params(config, jax.random.key(3)), tokenizer, "policy", "random"))
    return tmp_path / "m"


def run_with(experiments: Path, model: Path, *overrides: str) -> Run:
    config = load_experiment(experiments / "microworld.yaml", [f"models.small={model}", "mesh.fsdp=2", *overrides])
    return Run(model.parent, config, make_mesh(config.mesh), False, Console(quiet=True))


def drawn(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """What PPO draws for eight prompts from a state that is trained on `run.mesh`."""
    model = run.model_to_train("small")
    players = Players(
        policy=model.config, critic=model.config, reward=model.config, temperature=0.9, eos_id=2,
        reward_mean=0.0, reward_std=1.0, value_shift=0.0, value_scale=1.0,
    )  # fmt: skip
    rules = SamplingRules(temperature=0.9, top_p=1.0, top_k=0, max_new_tokens=7, stop_tokens=(2,))
    actors = Actors(model, model, players, rules, None)
    state = type("State", (), {"policy": type("Policy", (), {"params": model.params})})
    tokens = np.random.default_rng(1).integers(3, 40, (8, 5)).astype(np.int32)
    prompts = Prompts([""] * 8, tokens, np.full((8,), 5, np.int32))
    with jax.set_mesh(run.mesh):
        samples = rlsf.draw(run, state, actors, prompts, np.arange(8), 1)  # type: ignore[arg-type]
        assert set(samples.tokens.sharding.mesh.axis_names) == set(run.mesh.axis_names)
    return to_host(samples.tokens), to_host(samples.logprobs)


def test_05_rollouts_on_a_mesh_of_their_own_are_those_of_the_training_mesh(
    experiments_folder: Path, model_folder: Path
) -> None:
    tokens, logprobs = drawn(run_with(experiments_folder, model_folder))
    apart = run_with(experiments_folder, model_folder, "mesh.sampling={embed: 2, tensor: 4}")
    assert dict(apart.sampling_mesh.shape) == {"data": 1, "embed": 2, "tensor": 4}
    found, own = drawn(apart)
    assert (found == tokens).all() and len(np.unique(tokens)) > 8
    np.testing.assert_allclose(own, logprobs, atol=1e-4)


def test_models_are_loaded_onto_the_mesh_that_they_are_for(experiments_folder: Path, model_folder: Path) -> None:
    run = run_with(
        experiments_folder, model_folder, "mesh.sampling={embed: 4, tensor: 2}", "compute_dtype=bfloat16"
    )
    sampled, trained = run.model("small").params, run.model_to_train("small").params
    gate = sampled["layers_1"]["mlp"]["gate"]["kernel"]
    assert gate.dtype == jnp.bfloat16 and gate.sharding.shard_shape(gate.shape) == (4, 12)
    assert sampled["norm"]["scale"].dtype == jnp.float32
    assert trained["layers"]["mlp"]["gate"]["kernel"].dtype == jnp.float32
    plain = run_with(experiments_folder, model_folder)
    assert plain.sampling_mesh is plain.mesh and plain.model("small") is plain.model_to_train("small")
    with pytest.raises(InputError, match=r"mesh\.sampling \(data: 1, embed: 3, tensor: -1\): 8 devices"):
        _ = run_with(experiments_folder, model_folder, "mesh.sampling={embed: 3}").sampling_mesh
