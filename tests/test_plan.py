"""The planner's parts that need no TPU compiler, and (slow) the compiler itself where libtpu is installed."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core.llama import LlamaConfig, abstract_params
from almost_jax.core.partitioning import make_mesh
from almost_jax.errors import InputError
from almost_jax.experiments import load_experiment
from almost_jax.io.models import load_model, save_model
from almost_jax.plan import programs
from almost_jax.plan.flops import count_flops
from almost_jax.plan.hlo import collectives
from almost_jax.plan.programs import build, program_names, samples
from almost_jax.plan.reads import read_bytes
from almost_jax.plan.shapes import HUB, model_shape
from almost_jax.plan.topologies import parse_topology, quiet_environment
from almost_jax.plan.worker import examine
from almost_jax.stages import dpo
from almost_jax.stages.pair_rows import PackedRows, PairTokens

NO_LIBTPU = importlib.util.find_spec("libtpu") is None

# As the TPU compiler writes it, shortened: a loop of 3 trips with a gather that runs beside computation and a
# reduce-scatter, and one all-reduce behind it.
TEXT = """
%fused_computation.1 (param_0: bf16[2,8]) -> bf16[16,8] {
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%param_0), channel_id=7, dimensions={0}
}

%fused_computation.2 (param_0: bf16[2,8]) -> bf16[16,8] {
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%param_0), channel_id=7, dimensions={0}
}

%all-reduce-scatter.1 (input: f32[16,8]) -> f32[2,8] {
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%input), channel_id=8, to_apply=%add
}

%condition (state: (s32[], f32[16,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
}

%body (state: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %a = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%fused_computation.1
  %b = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%fused_computation.2
  %c = f32[2,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %d = f32[2,8]{1,0} reduce-scatter(%z), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %e = f32[2,8]{1,0} reduce-scatter(%z), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %loop = (s32[], f32[16,8]) while(%start), condition=%condition, body=%body
  ROOT %total = f32[4]{0} all-reduce(%x), channel_id=9, to_apply=%add
}
"""


def test_collectives_are_counted_for_every_trip_and_once_when_asynchronous() -> None:
    found = collectives(TEXT)
    assert vars(found["all-gather"]) == {"count": 3, "bytes": 3 * 16 * 8 * 2, "async_bytes": 3 * 16 * 8 * 2}
    assert vars(found["reduce-scatter"]) == {"count": 9, "bytes": 3 * (16 * 8 + 2 * 4 * 2 * 8) * 4, "async_bytes": 0}
    assert vars(found["all-reduce"]) == {"count": 1, "bytes": 16, "async_bytes": 0}


# One step over three layers: weights are brought in beside computation, a cache is read whole and written in place.
READS = """
%fused_computation.1 (a: bf16[2,8], b: bf16[16,8]) -> bf16[2,8] {
  %inside = bf16[16,8]{1,0} copy(%b)
}

%fused_computation.2 (c: bf16[64,8], d: bf16[1,8]) -> bf16[64,8] {
  %c = bf16[64,8]{1,0} parameter(0)
  %d = bf16[1,8]{1,0} parameter(1)
  ROOT %update = bf16[64,8]{1,0} dynamic-update-slice(%c, %d, %place, %zero)
}

%condition (state: (s32[], bf16[16,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
}

%body (state: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %weights = bf16[16,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %start = (bf16[4,8]{1,0:S(1)}, bf16[16,8]{1,0}, u32[]{:S(2)}) slice-start(%weights), slice={[0:4], [0:8]}
  %part = bf16[4,8]{1,0:S(1)} slice-done(%start)
  %cache = bf16[64,8]{1,0} get-tuple-element(%state), index=2
  %new = bf16[1,8]{1,0:S(1)} fusion(%part), kind=kLoop, calls=%fused_computation.1
  %dynamic-update-slice_fusion.1 = bf16[64,8]{1,0} fusion(%cache, %new), kind=kLoop, calls=%fused_computation.2
  %mixed = bf16[1,8]{1,0:S(1)} fusion(%dynamic-update-slice_fusion.1, %new), kind=kLoop, calls=%fused_computation.1
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %table = f32[100,4]{1,0} parameter(0)
  %row = f32[1,4]{1,0:S(1)} dynamic-slice(%table, %index)
  %head = bf16[8,32]{1,0} parameter(1)
  %loop = (s32[], bf16[16,8]) while(%start), condition=%condition, body=%body
  ROOT %logits = f32[1,32]{1,0:S(1)} fusion(%row, %head), kind=kOutput, calls=%fused_computation.1
}
"""


def test_bytes_read_are_those_of_operands_in_memory_for_every_trip() -> None:
    layer = 4 * 8 * 2 + 64 * 8 * 2  # the slice brought in, and the cache where it is attended to
    assert read_bytes(READS) == 3 * layer + 4 * 4 + 8 * 32 * 2


def test_flops_count_products_scans_and_what_remat_computes_again() -> None:
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))

    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=5)[0].sum()

    product = 2 * 4 * 8 * 8
    assert count_flops(jax.make_jaxpr(layers)(x, w)) == 5 * product
    # Backward: two products a layer.
    assert count_flops(jax.make_jaxpr(jax.grad(layers, argnums=(0, 1)))(x, w)) == 3 * 5 * product

    def again(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w).sum())(x, w)

    assert count_flops(jax.make_jaxpr(jax.grad(again, argnums=(0, 1)))(x, w)) >= 7 * product


def test_topologies_that_cannot_be_are_refused_with_examples() -> None:
    assert parse_topology("v5e:8x8").chips == 64 and parse_topology("v4:2x2x4").chip.memory_bytes > 32e9
    for wrong in ("v5litepod:8x8", "v5e", "v5e:8", "v4:4x4", "v5e:0x8"):
        with pytest.raises(InputError, match="v5e:8x8"):
            parse_topology(wrong)


def test_shapes_of_models_are_known_without_their_weights(tmp_path: Path) -> None:
    assert HUB["huggyllama/llama-30b"].num_layers == 60
    assert model_shape("models.small", "microworld:small").hidden_size == 64
    with pytest.raises(InputError, match=r"models\.large: no shape is known for 'nobody/nothing'"):
        model_shape("models.large", "nobody/nothing")
    ours = tmp_path / "ours"
    model = load_model("microworld:small", make_mesh(MeshConfig(), jax.devices()[:1]), "float32")
    save_model(ours, dataclasses.replace(model, kind="policy"))
    assert not (ours / "config.json").exists()
    assert model_shape("models.small", str(ours)) == model.config
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json: not a config"):
        model_shape("models.large", str(tmp_path))


def test_every_program_of_an_experiment_has_a_name(experiments_folder: Path) -> None:
    names = program_names(load_experiment(experiments_folder / "almost_7b.yaml", []))
    assert {"sft_step", "reward_step", "ppo_update", "ppo_judge", "score_reward"} <= set(names)
    assert {"prefill_large", "decode_large"} <= set(names)


def test_programs_that_sample_run_on_the_mesh_for_sampling(experiments_folder: Path) -> None:
    names = program_names(load_experiment(experiments_folder / "almost_small.yaml", []))
    assert [name for name in names if not samples(name)] == [
        "sft_step", "reward_step", "ppo_update", "ppo_judge", "dpo_reference", "dpo_step"
    ]  # fmt: skip


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """libtpu ends a process in which it looks for a machine in vain, or finds a flag that it doesn't know."""
    for name, value in quiet_environment().items():
        monkeypatch.setenv(name, value)


def test_libtpu_is_spared_the_flags_of_another_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count=8")
    environment = quiet_environment()
    assert environment["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"
    assert environment["JAX_PLATFORMS"] == "cpu" and environment["PATH"] == os.environ["PATH"]


def splash_shape(config: LlamaConfig, *_: Any) -> LlamaConfig:
    """What `training_shape` gives on a TPU."""
    return dataclasses.replace(config, attention="splash")


def test_packed_pairs_are_planned_as_they_are_made(experiments_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["reward.packed_length=384", "reward.training.micro_batches=3", "reward.training.batch_size=63"]
    config = load_experiment(experiments_folder / "microworld.yaml", overrides)
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        program = build(config, mesh, "reward_step")
        planned = program.arguments[1]
        assert planned["tokens"].shape == (36, 384), "63 pairs of texts of up to 96 tokens, in 3 x 2 parts"
        assert "reward.packed_length" in program.knobs
        state, _ = jax.eval_shape(program.function, *program.arguments)
    assert state.params["score"]["kernel"].shape == (64,)
    made = PackedRows((36,), 2, 384, True).batch([PairTokens.scored([1] * 96, [2] * 96)] * 63, 0)
    assert {name: (array.shape, array.dtype) for name, array in made.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in planned.items()
    }
    monkeypatch.setattr(programs, "training_shape", splash_shape)
    assert set(build(config, mesh, "reward_step").arguments[1]) == set(planned) - {"seen_ids"}


@pytest.mark.parametrize("packed_length", [0, 384])
def test_pairs_of_dpo_are_planned_as_they_are_made(experiments_folder: Path, packed_length: int) -> None:
    overrides = [f"dpo.packed_length={packed_length}", "dpo.training.batch_size=6", "dpo.objective=ipo"]
    config = load_experiment(experiments_folder / "microworld.yaml", overrides)
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        step, reference = (build(config, mesh, name) for name in ("dpo_step", "dpo_reference"))
        state, figures = jax.eval_shape(step.function, *step.arguments)
        scored = reference.function.eval_shape(*reference.arguments)
    assert scored.shape == (6, 2) and scored.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, reference.arguments[0])
    assert {"loss", "margin"} <= set(figures) and "dpo.training.micro_batches" in step.knobs
    # Pairs of the longest texts, that begin with nothing alike.
    longest = config.dpo.training.max_length if config.dpo else 0
    side = ([1] * longest, [False] + [True] * (longest - 1))
    pairs, known = [(side, ([2] * longest, side[1]))] * 6, np.zeros((6, 2), np.float32)
    if packed_length:
        made = dpo.packed_batch(PackedRows((4,), 2, 384, True), pairs, known, 0)
    else:
        made = {**dpo.pair_batch(pairs, longest, 0), "reference": known}
    assert {name: (array.shape, array.dtype) for name, array in made.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in step.arguments[1].items()
    }


def test_what_lies_beside_ppos_programs_is_counted(experiments_folder: Path) -> None:
    def build_one(name: str, *overrides: str) -> programs.Program:
        config = load_experiment(experiments_folder / "microworld.yaml", list(overrides))
        return build(config, make_mesh(MeshConfig(), jax.devices()[:1]), name)

    def beside(name: str, *overrides: str) -> int:
        return build_one(name, *overrides).beside

    shape = model_shape("models.small", "microworld:small")
    parameters, head = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(shape))), shape.hidden_size
    assert beside("ppo_update") == 4 * (2 * parameters + head)
    assert beside("ppo_update", "ppo.kl_coef=0") == 4 * (2 * parameters + head), "over_optimisation measures the KL"
    assert beside("ppo_update", "ppo.kl_coef=0", "over_optimisation=null") == 4 * (parameters + head)
    # Policy and critic once more, that rollouts are made from meanwhile.
    assert beside("ppo_update", "ppo.overlap_rollouts=true") == 4 * (4 * parameters + 2 * head)
    # Two moments of policy and critic, and the optimizers' counters.
    assert 0 <= beside("ppo_judge") - 4 * 2 * (2 * parameters + head) <= 64
    assert beside("sft_step") == 0 == beside("decode_medium")
    # In self-play: the reward model, and four candidates' caches for every slot.
    keeps = "demonstrations.reuse_cache=true"
    kept = beside("decode_large", keeps) - beside("decode_large", "demonstrations.reuse_cache=false")
    assert beside("decode_large", "demonstrations.reuse_cache=false") == 4 * (parameters + head)
    assert kept == 4 * build_one("decode_large").cache > 0
    assert beside("score_reward", keeps) == build_one("decode_large").parameters + kept + kept // 4
    # A dialogue of self-play is scored whole: every turn of it.
    for turns, length in ((1, 64), (3, 40 + 3 * 30 + 2 * 20)):
        scoring = build_one(
            "score_reward", "reward.training.max_length=64", "ppo.max_prompt_length=40",
            f"demonstrations.max_turns={turns}",
            "demonstrations.sampling.max_new_tokens=30", "demonstrations.user_sampling.max_new_tokens=20",
        )  # fmt: skip
        assert scoring.arguments[2].shape[1] == max(length, 40 + 30)


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu: pip install almost-jax[tpu]")
def test_decoding_on_a_mesh_for_sampling_reads_weights_and_cache_once(quiet: None, experiments_folder: Path) -> None:
    overrides = [
        "mesh.preset=square", "mesh.sampling={embed: 2, tensor: 2}", "compute_dtype=bfloat16",
        "models.large=HuggingFaceTB/SmolLM2-1.7B",
    ]  # fmt: skip
    config = load_experiment(experiments_folder / "microworld.yaml", overrides)
    report = examine(config, parse_topology("v5e:2x2"), "decode_large")
    assert report["mesh"] == {"data": 1, "embed": 2, "tensor": 2}
    assert report["read_bytes"] <= 1.05 * report["read_bound_bytes"], report
    assert not any("gathered" in warning for warning in report["warnings"])


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu: pip install almost-jax[tpu]")
@pytest.mark.parametrize("name", ["sft_step", "reward_step", "ppo_update", "ppo_judge", "score_reward", "decode_small"]
                         + ["dpo_reference", "dpo_step"])  # fmt: skip
def test_the_smallest_programs_compile_for_a_tpu(quiet: None, name: str, experiments_folder: Path) -> None:
    config = load_experiment(experiments_folder / "microworld.yaml", ["mesh.data=4"])
    report = examine(config, parse_topology("v5e:2x2"), name)
    assert report["fits"] and 0 < report["peak_bytes"] < 4e9 and report["flops"] > 0
    json.dumps(report)
