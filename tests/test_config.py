"""Experiment files: what is inherited, overridden and swept, and what one line bad input gets."""

import inspect
from pathlib import Path

import pytest
import yaml

from almost_jax.commands.evaluate import vicuna_command
from almost_jax.config import ExperimentConfig, Section
from almost_jax.errors import InputError
from almost_jax.experiments import dump_experiment, load_experiment, load_sweep
from almost_jax.stages.instructions import load_instructions

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
MICROWORLD = EXPERIMENTS / "microworld.yaml"


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_experiment(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def child(folder: Path, text: str) -> Path:
    path = folder / "child.yaml"
    path.write_text(f"base: {MICROWORLD}\n{text}", encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_loads(path: Path) -> None:
    if "sweep" in yaml.safe_load(path.read_text(encoding="utf-8")):
        points = load_sweep(path, []).points
        assert len(points) > 1
        assert len({config.name for _, config in points}) == len(points)
    else:
        assert load_experiment(path, []).name == path.stem


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_has_the_queries_that_it_plays_and_is_evaluated(path: Path) -> None:
    swept = "sweep" in yaml.safe_load(path.read_text(encoding="utf-8"))
    for config in [point for _, point in load_sweep(path, []).points] if swept else [load_experiment(path, [])]:
        assert config.demonstrations.queries <= config.queries.count
        questions = config.evaluation.questions
        assert config.evaluation.gold or (questions and len(load_instructions(questions)) >= config.evaluation.queries)


def test_every_key_of_a_section_stands_in_its_place() -> None:
    # Unknown keys are refused in every section, also those that are added later.
    sections = [Section]
    for section in sections:
        sections += section.__subclasses__()
        assert section.model_config["extra"] == "forbid" and section.model_config["frozen"]
    assert ExperimentConfig in sections


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_experiment(MICROWORLD, ["ppo.kl_coef=0.07", "evaluation.prompted=null", "seed=3"])
    (tmp_path / "config.yaml").write_text(dump_experiment(config), encoding="utf-8")
    assert load_experiment(tmp_path / "config.yaml", []) == config


def test_base_is_merged_and_lists_are_replaced(tmp_path: Path) -> None:
    config = load_experiment(child(tmp_path, "ppo: {kl_coef: 0.3}\nfilters: {keywords_start: [hm]}\n"), [])
    base = load_experiment(MICROWORLD, [])
    assert config.ppo.kl_coef == 0.3 and config.filters.keywords_start == ("hm",)
    assert config.ppo.steps == base.ppo.steps and config.filters.keywords_anywhere == base.filters.keywords_anywhere


def test_defaults_of_a_fine_tuned_policy_stay_when_another_key_is_given(tmp_path: Path) -> None:
    path = child(tmp_path, "ppo: null\ndpo: null\n")
    config = load_experiment(path, ["ppo={optimizer: {warmup_steps: 5}}", "dpo={training: {optimizer: {eps: 1.0e-6}}}"])
    assert (config.ppo.optimizer.learning_rate, config.ppo.optimizer.schedule) == (1e-6, "constant")
    assert config.dpo is not None and config.dpo.training.optimizer.learning_rate == 1e-6
    assert config.dpo.training.optimizer.schedule == "linear" and config.dpo.training.batch_size == 64


def test_bases_chain_and_are_relative_to_their_own_file(tmp_path: Path) -> None:
    child(tmp_path, "seed: 5\n")
    (tmp_path / "inner").mkdir()
    grandchild = tmp_path / "inner" / "grandchild.yaml"
    grandchild.write_text("base: ../child.yaml\nname: third\n", encoding="utf-8")
    config = load_experiment(grandchild, [])
    assert (config.name, config.seed) == ("third", 5)


def test_a_base_that_names_itself_or_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n", encoding="utf-8")
    assert "inherits from itself" in problem(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("seed: 1\nbase: gone.yaml\n", encoding="utf-8")
    assert problem(tmp_path / "c.yaml").startswith(f"{tmp_path / 'c.yaml'}:2: base: there is no")


def test_null_takes_a_configuration_out(tmp_path: Path) -> None:
    config = load_experiment(child(tmp_path, "comparisons: {configurations: {E: null}}\n"), [])
    assert list(config.comparisons.configurations) == ["A", "B", "C", "D"]


def test_overrides_are_typed_and_the_last_one_wins() -> None:
    config = load_experiment(
        MICROWORLD,
        ["ppo.kl_coef=1e-3", "ppo.steps=7", "ppo.steps=9", "filters.as_is=false", "models.small=some/folder"],
    )
    assert config.ppo.kl_coef == 1e-3 and config.ppo.steps == 9
    assert config.filters.as_is is False and config.models["small"] == "some/folder"
    assert load_experiment(MICROWORLD, ["ppo.kl_coef=1"]).ppo.kl_coef == 1.0


@pytest.mark.parametrize("written", ["off", "'off'", "false"])
def test_a_guard_can_be_off_as_people_write_it(tmp_path: Path, written: str) -> None:
    assert load_experiment(MICROWORLD, [f"ppo.guards.kl={written}"]).ppo.guards.kl == "off"
    config = load_experiment(child(tmp_path, f"ppo: {{guards: {{kl: {written}}}}}\n"), [])
    assert config.ppo.guards.kl == "off"
    (tmp_path / "dumped.yaml").write_text(dump_experiment(config))
    assert load_experiment(tmp_path / "dumped.yaml", []) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.kl_coeff=1", "ppo.kl_coeff: unknown key; did you mean ppo.kl_coef?"),
        ("kl_coef=1", "kl_coef: unknown key; did you mean ppo.kl_coef?"),
        ("comparisons.configurations.A.shot=1", "did you mean comparisons.configurations.A.shots?"),
        ("zzz.y=2", "zzz: unknown key; known here: name, seed"),
        ("ppo.steps=ten", "ppo.steps: must be a valid integer, not 'ten'"),
        ("ppo.steps='10'", "ppo.steps: must be a valid integer, not '10'"),
        ("ppo.steps=2.0", "ppo.steps: must be a valid integer, not 2.0"),
        ("ppo.steps=0", "ppo.steps: must be greater than 0, not 0"),
        ("ppo.steps=true", "ppo.steps: must be a valid integer, not True"),
        ("seed='0'", "seed: must be a valid integer"),
        ("ppo.kl_coef='0.1'", "ppo.kl_coef: must be a valid number, not '0.1'"),
        ("ppo.kl_coef=.nan", "ppo.kl_coef: must be a finite number"),
        ("ppo.kl_coef=true", "ppo.kl_coef: must be a valid number"),
        ("ppo.whiten_rewards=1", "ppo.whiten_rewards: must be a valid boolean, not 1"),
        ("ppo.whiten_rewards='yes'", "ppo.whiten_rewards: must be a valid boolean"),
        ("ppo.optimizer.schedule=linaer", "must be 'constant', 'linear' or 'cosine', not 'linaer'"),
        ("ppo.gae_lambda=1.5", "ppo.gae_lambda: must be less than or equal to 1"),
        ("ppo=3", "ppo: must be a section of keys, not 3"),
        ("models.small=3", "models.small: must be a valid string, not 3"),
        ("mesh.data=0", "mesh.data: an axis has a positive number"),
        ("mesh.fsdp=-1", "mesh.fsdp: only one mesh axis may be -1"),
        ("ppo.sampling.temperature=1e-9", "ppo.sampling.temperature: a temperature is 0 (greedy), or 1e-06 or more"),
        ("mesh.gradient_dtype=bfloat16", "mesh.gradient_dtype: bfloat16 needs mesh.explicit"),
        ("name=a/b", "name: must match pattern"),
        ("nonsense", "must be a.b=v"),
        ("ppo..steps=1", "must be a.b=v"),
        ("ppo.steps=[1", "ppo.steps"),
    ],
)
def test_bad_overrides_are_named_with_what_would_be_right(override: str, expected: str) -> None:
    message = problem(MICROWORLD, override)
    assert message.startswith(f"override {override!r}: ") and expected in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.model=huge", "sft.model: 'huge' must be one of the models: small, medium, large"),
        ("demonstrations.user.model=huge", "demonstrations.user.model: 'huge' must be one of"),
        ("evaluation.prompted.model=huge", "evaluation.prompted.model: 'huge' must be one of"),
        ("comparisons.configurations.E.shots=9", "E: ranks above D by size, demonstrations and shots"),
        ("comparisons.configurations.E.shots=3", "E: is the same as D"),
        ("comparisons.model_order=[large,medium]", "D.model: 'small' must stand in comparisons.model_order"),
        ("comparisons.model_order=[large,large]", "comparisons.model_order: a name stands twice"),
        ("comparisons.model_order=[huge,large,medium,small]", "'huge' must be one of the models"),
        ("comparisons.model_order=[small,medium,large]", "C: ranks above B"),
        ("comparisons.configurations.E.demonstrations=other", "must stand in comparisons.demonstrations_order"),
        ("ppo.batch_size=7", "ppo.batch_size: 7 must be divisible by num_mini_batches x micro_batches"),
        ("reward.training.micro_batches=3", "must be divisible by micro_batches 3"),
        ("ppo={kl_controller: adaptive, kl_coef: 0.0}", "ppo.kl_coef: an adaptive coefficient is multiplied"),
        ("ppo.sampling.temperature=0", "ppo.sampling.temperature: rollouts must be sampled"),
        ("queries.source=file", "queries.file: needs the path"),
        ("ppo.sampling.top_p=0.9", "ppo.sampling.top_p: rollouts are drawn from the whole distribution"),
        ("ppo.sampling.top_k=20", "ppo.sampling.top_k: rollouts are drawn from the whole distribution"),
        ("ppo.critic_warmup_steps=60", "ppo.critic_warmup_steps: 60 of 60 steps leave none for the policy"),
        ("ppo={critic_warmup_steps: 60, steps: 70}", "over_optimisation.steps: ppo.critic_warmup_steps 60 leave none"),
        ("ppo={early_stop_kl: 0.1, overlap_rollouts: true}", "ppo.early_stop_kl: with overlap_rollouts"),
        ("queries.source=self_instruct", "evaluation.gold: only the micro-world has a gold score"),
        ("queries.self_instruct.min_words=200", "min_words: 200 is more than max_words 150"),
        ("as_is_reward.votes=none", "filters.as_is: there is no as-is reward model"),
        ("evaluation.questions=held_out_questions", "evaluation.questions: the gold score has its own questions"),
        ("ppo.sampling.trim_unfinished=true", "ppo.sampling.trim_unfinished: rollouts are learned from as they are"),
    ],
)
def test_keys_that_disagree_are_refused(override: str, expected: str) -> None:
    assert expected in problem(MICROWORLD, override)


def test_the_micro_worlds_votes_are_for_its_own_language() -> None:
    said = problem(MICROWORLD, "evaluation.gold=false", "queries.source=self_instruct")
    assert "as_is_reward.votes: the micro-world's votes are in its own language" in said
    without = ["as_is_reward.votes=none", "filters.as_is=false"]
    load_experiment(MICROWORLD, ["evaluation.gold=false", "queries.source=self_instruct", *without])


def test_answers_to_the_vicuna_questions_are_drawn_as_by_the_command() -> None:
    command = inspect.signature(vicuna_command).parameters
    for given in ("", ", sampling: {batch_size: 8}"):
        config = load_experiment(MICROWORLD, [f"evaluation.vicuna={{questions: q.jsonl{given}}}"])
        assert config.evaluation.vicuna is not None
        for key in ("temperature", "top_p", "max_new_tokens"):
            assert getattr(config.evaluation.vicuna.sampling, key) == command[key].default


def test_an_as_is_model_that_is_not_trained_needs_no_model() -> None:
    missing = "as_is_reward.model=huge"
    assert "huge" in problem(MICROWORLD, missing)
    assert load_experiment(MICROWORLD, [missing, "as_is_reward.votes=none", "filters.as_is=false"])


def test_a_generator_that_does_not_run_needs_no_model() -> None:
    config = load_experiment(MICROWORLD, ["queries.self_instruct.generator=huge"])
    assert config.queries.source == "microworld"
    assert "huge" in problem(MICROWORLD, "queries.self_instruct.generator=huge", "queries.source=self_instruct")


def test_a_bad_key_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = child(tmp_path, "seed: 1\nppo:\n  kl_coef: 0.1\n  cliprang: 0.2\n")
    assert problem(path) == f"{path}:5: ppo.cliprang: unknown key; did you mean ppo.cliprange?"
    path = child(tmp_path, "seed: one\n")
    assert problem(path).startswith(f"{path}:2: seed: ")


def test_several_mistakes_are_counted() -> None:
    assert problem(MICROWORLD, "ppo.steps=no", "ppo.kl_coeff=1", "seed=x").endswith("(and 2 more)")


def test_missing_keys_and_files_and_broken_yaml_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\n", encoding="utf-8")
    assert f"{path}: models: is missing" in problem(path)
    path.write_text("name: x\nmodels: {a: [\n", encoding="utf-8")
    assert problem(path).startswith(f"{path}:3: not valid yaml")
    path.write_text("- a\n", encoding="utf-8")
    assert "must hold a mapping" in problem(path)
    path.write_text("", encoding="utf-8")
    problem(path)
    path.write_text("name: x\nname: y\n", encoding="utf-8")
    assert "uplicate" in problem(path)
    assert problem(EXPERIMENTS / "microwrld.yaml").endswith("did you mean microworld.yaml?")


def test_a_grid_gives_every_combination(tmp_path: Path) -> None:
    points = load_sweep(
        child(tmp_path, "sweep:\n  grid: {ppo.kl_coef: [0.1, 0.2], seed: [0, 7]}\n"), ["ppo.steps=3"]
    ).points
    assert [name for name, _ in points] == [
        "kl_coef-0.1_seed-0",
        "kl_coef-0.1_seed-7",
        "kl_coef-0.2_seed-0",
        "kl_coef-0.2_seed-7",
    ]
    assert [(c.ppo.kl_coef, c.seed) for _, c in points] == [(0.1, 0), (0.1, 7), (0.2, 0), (0.2, 7)]
    assert all(config.ppo.steps == 3 for _, config in points)
    assert points[0][1].name == "microworld-kl_coef-0.1_seed-0"


def test_a_list_gives_its_points_under_their_names(tmp_path: Path) -> None:
    text = "sweep:\n  list:\n  - {name: plain, ppo.whiten_rewards: true}\n  - {seed: 2, reward.model: medium}\n"
    points = load_sweep(child(tmp_path, text), []).points
    assert [name for name, _ in points] == ["plain", "seed-2_model-medium"]
    assert points[0][1].ppo.whiten_rewards and points[1][1].reward.model == "medium"
    assert not points[1][1].ppo.whiten_rewards


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("{seed: 1}", "sweep: must be a grid of lists"),
        ("{grid: {seed: []}}", "sweep: must be a grid of lists"),
        ("{list: [{seed: 1}, {seed: 1}]}", "two points are called 'seed-1'"),
        ("{grid: {ppo.kl_coeff: [1]}}", "sweep point kl_coeff-1: ppo.kl_coeff: unknown key; did you mean ppo.kl_coef?"),
        ("{list: [{name: 'a/b', seed: 1}]}", "point 'a/b' needs a `name`"),
    ],
)
def test_bad_sweeps_are_refused(tmp_path: Path, sweep: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load_sweep(child(tmp_path, f"sweep: {sweep}\n"), [])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_run_and_sweep_refuse_each_others_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no `sweep:`"):
        load_sweep(MICROWORLD, [])
    assert "almost-jax sweep" in problem(child(tmp_path, "sweep: {grid: {seed: [0, 1]}}\n"))
