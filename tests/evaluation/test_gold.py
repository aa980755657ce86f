"""The evaluation stage on tiny random models: what it writes, where it stops, and how it goes on."""

import io
import json
import shutil
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
from almost_jax.core.llama import LlamaConfig, RopeConfig, init_params
from almost_jax.core.partitioning import make_mesh
from almost_jax.errors import InputError
from almost_jax.evaluation import gold
from almost_jax.io.huggingface import save_llama
from almost_jax.io.models import Model, load_model, save_model
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.microworld.gold import gold_score, kind
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


def make_run(folder: Path, home: Path, enabled: bool = True) -> Run:
    prompted = {"model": "vanilla", "demonstrations": str(home / "demonstrations.yaml"), "shots": 2}
    sampling = {"max_new_tokens": 6, "batch_size": 4}
    config: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "models": {"vanilla": str(home / "vanilla")},
        "queries": {"source": "microworld", "count": 5},
        "as_is_reward": {"model": "vanilla"},
        "comparisons": {
            "configurations": {"A": prompted, "B": {**prompted, "shots": 1}},
            "model_order": ["vanilla"],
            "demonstrations_order": [prompted["demonstrations"]],
            "sampling": sampling,
        },
        "reward": {"model": "vanilla"},
        "demonstrations": {"assistant": prompted, "user": prompted, "sampling": sampling},
        "sft": {"model": "vanilla"},
        "ppo": {},
        "evaluation": {
            "gold": enabled,
            "queries": 18,
            "best_of": 3,
            "curve_queries": 7,
            "sampling": {**sampling, "temperature": 0.7},
            "bootstrap_samples": 50,
        },
    }
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Run(folder, ExperimentConfig.model_validate(config), mesh, False, Console(file=io.StringIO(), width=200))


@pytest.fixture(scope="module")
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
    run = make_run(home / "run", home)
    source = load_model(str(vanilla), run.mesh, "float32")
    for seed, name in enumerate(("sft/model", "sft_self_play/model", "rlsf/model", "rlsf/policies/2"), start=1):
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


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """The same folder after the evaluation."""
    gold.run_stage(make_run(home / "run", home))
    return home / "run"


def test_gold_json_holds_every_figure_over_every_query(finished: Path) -> None:
    figures = json.loads((finished / "evaluation" / "gold.json").read_text())
    for name in ("A", "B"):
        assert figures["configurations"][name]["n"] == 18
    assert list(figures["policies"]) == ["prompted", "sft_self_play", "sft", "rlsf"]
    assert all(set(figure) == {"mean", "ci95", "n"} and figure["n"] == 18 for figure in figures["policies"].values())
    assert set(figures["pairs"]) == {"raw", "heuristic", "as_is"}
    assert set(figures["best_of_n"]) == {"1", "3", "oracle_3"}
    assert [point["step"] for point in figures["rlsf_curve"]] == [0, 2]
    assert all(point["n"] == 7 for point in figures["rlsf_curve"])
    assert figures["contamination"] == dict.fromkeys(figures["contamination"], 0)


def test_16_policy_that_is_the_reference_has_kl_0(finished: Path) -> None:
    curve = json.loads((finished / "evaluation" / "gold.json").read_text())["rlsf_curve"]
    assert curve[0]["kl"] == 0
    assert abs(curve[1]["kl"]) > 0.1


def test_items_keep_everything_and_carry_their_gold_score(finished: Path) -> None:
    items = read_records(finished / "evaluation" / "items.jsonl")
    systems = ["configuration/A", "configuration/B", "best_of_n"]
    systems += [f"policy/{name}" for name in ("prompted", "sft_self_play", "sft", "rlsf")]
    expected = {system: 18 for system in systems} | {"best_of_n": 18 * 3, "curve/0": 7, "curve/2": 7}
    assert {system: sum(item["system"] == system for item in items) for system in expected} == expected
    assert len(items) == sum(expected.values())
    for item in items:
        assert item["gold"] == gold_score(item["query"], item["text"])
        assert item["kind"] == kind(item["query"])
        assert (item["kl"] is None) == (not item["system"].startswith("curve/"))
        assert (item["as_is"] is None) == (not item["system"].startswith("configuration/"))
    held_out = read_records(finished / "evaluation_queries.jsonl")
    assert {item["query"] for item in items} == {query["text"] for query in held_out}


def test_10_samples_of_best_of_n_and_of_equal_systems_differ(finished: Path) -> None:
    items = read_records(finished / "evaluation" / "items.jsonl")
    by_sample = [
        [item["text"] for item in items if (item["system"], item["sample"]) == ("best_of_n", n)] for n in (0, 1, 2)
    ]
    assert by_sample[0] != by_sample[1] != by_sample[2] != by_sample[0]
    # The same model, prompt and rules, but another system: it draws for itself.
    assert by_sample[0] != [item["text"] for item in items if item["system"] == "configuration/A"]


@pytest.mark.parametrize("written", [5, 40, 127])
def test_28_an_interrupted_evaluation_ends_with_the_same_bytes(
    finished: Path, home: Path, tmp_path: Path, written: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    whole = (folder / "evaluation" / "items.jsonl").read_bytes()
    figures = (folder / "evaluation" / "gold.json").read_bytes()
    shutil.rmtree(folder / "evaluation")
    (folder / "evaluation").mkdir()
    lines = whole.splitlines(keepends=True)
    torn = b"".join(lines[:written]) + lines[written][:20]
    (folder / "evaluation" / "items.jsonl.partial").write_bytes(torn)
    gold.run_stage(make_run(folder, home))
    assert (folder / "evaluation" / "items.jsonl").read_bytes() == whole
    assert (folder / "evaluation" / "gold.json").read_bytes() == figures
    assert not (folder / "evaluation" / "items.jsonl.partial").exists()


def test_finished_items_are_not_sampled_again(finished: Path, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "reward")  # without which nothing could be scored
    (folder / "evaluation" / "gold.json").unlink()
    gold.run_stage(make_run(folder, home))
    name = Path("evaluation", "gold.json")
    assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_a_missing_model_is_named(finished: Path, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "evaluation")
    shutil.rmtree(folder / "sft_self_play")
    with pytest.raises(InputError, match="sft_self_play/model: no such model"):
        gold.run_stage(make_run(folder, home))


def test_held_out_queries_that_were_trained_on_are_counted_and_said(finished: Path, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    query = read_records(folder / "evaluation_queries.jsonl")[3]["text"]
    turns = [{"role": "human", "text": f" {query.replace(' ', '  ')}"}, {"role": "assistant", "text": "sure ."}]
    write_records(folder / "demonstrations.jsonl", [{"query_id": "q0", "turns": turns}])
    run = make_run(folder, home)
    gold.run_stage(run)
    found = json.loads((folder / "evaluation" / "gold.json").read_text())["contamination"]
    assert found == {"queries": 0, "demonstrations, self_play": 0, "demonstrations, reward_guided": 1}
    assert isinstance(run.console.file, io.StringIO)
    assert "1 held-out queries also stand in demonstrations, reward_guided" in run.console.file.getvalue()


def test_without_gold_it_writes_nothing_and_says_so(home: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", home, enabled=False)
    (tmp_path / "run").mkdir()
    assert gold.run_stage(run) == {"gold": "off"}
    assert list((tmp_path / "run").iterdir()) == []
    assert isinstance(run.console.file, io.StringIO)
    assert "evaluation.gold is off" in run.console.file.getvalue()
