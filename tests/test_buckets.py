"""gs:// through the command line and through experiment files, on a folder that stands for the mounts of buckets."""

import dataclasses
import importlib.util
import inspect
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from almost_jax import cli, pipeline
from almost_jax.commands import runs
from almost_jax.commands.harness import _on_disk
from almost_jax.commands.places import on_disk
from almost_jax.errors import InputError
from almost_jax.evaluation.answers import prompted
from almost_jax.experiments import load_experiment
from almost_jax.inputs import _files, check_inputs, model_path
from almost_jax.io import paths
from almost_jax.io.huggingface import save_llama
from almost_jax.io.models import load_model
from almost_jax.io.transfer import host_mesh
from almost_jax.pipeline import STAGES
from almost_jax.plan.shapes import model_shape
from almost_jax.report import page
from almost_jax.stages.templates import demonstrations_text

_spec = importlib.util.spec_from_file_location(
    "models_commands", Path(__file__).parent / "commands" / "test_models_commands.py"
)
assert _spec is not None and _spec.loader is not None
_other = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_other)
command = _other.command

MODELS = ("small", "medium", "large")
DIALOGUES = "Human: one\n\nAssistant: two\n\n-----\n\nHuman: three\n\nAssistant: four\n"


@pytest.fixture
def bucket(tmp_path: Path, micro_experiment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bucket gs://shelf, with an experiment on models of its own."""
    folder = tmp_path / "gcs" / "shelf"
    folder.mkdir(parents=True)
    monkeypatch.setenv(paths.VARIABLE, str(folder.parent))
    monkeypatch.setattr(runs, "keep_compiled_programs", lambda: None)
    for name in MODELS:
        (tmp_path / name).rename(folder / name)
    base = folder / "base.yaml"
    base.write_text(micro_experiment.read_text(encoding="utf-8"), encoding="utf-8")
    models = "\n".join(f"  {name}: gs://shelf/{name}" for name in MODELS)
    (folder / "probe.yaml").write_text(f"base: gs://shelf/base.yaml\nmodels:\n{models}\n", encoding="utf-8")
    return folder


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that write a file each."""

    def stand_in(name: str) -> Callable[[Any], dict[str, Any]]:
        def run_stage(run: Any) -> dict[str, Any]:
            run.path(f"{name}.txt").write_text(name)
            return {}

        return run_stage

    monkeypatch.setattr(
        pipeline, "STAGES", tuple(dataclasses.replace(stage, run=stand_in(stage.name)) for stage in STAGES)
    )
    monkeypatch.setattr(page, "summary_table", lambda directory: "the table")


def commands() -> Iterator[Callable[..., Any]]:
    for found in map(cli.find_command, cli.COMMANDS):
        if not isinstance(found, typer.Typer):
            yield found
            continue
        for one in found.registered_commands:
            assert one.callback is not None
            yield one.callback


def test_every_path_that_a_command_takes_may_be_in_a_bucket() -> None:
    found = 0
    for callback in commands():
        hints = typing.get_type_hints(callback, include_extras=True)
        for name in inspect.signature(callback).parameters:
            kind, *said = typing.get_args(hints[name]) or (hints[name],)
            if Path in (kind, *typing.get_args(kind)):
                found += 1
                assert said[0].callback is on_disk, f"{callback.__name__}: {name}"
    assert found > 20


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "gs://other/probe.yaml"], "gs://other/probe.yaml: bucket other is not mounted: "),
        (["run", "{experiment}", "--out", "gs://other/run"], "gs://other/run: bucket other is not mounted: "),
        (["run", "{experiment}", "models.small=gs://other/m"], "models.small: gs://other/m: bucket other is not mount"),
        (["run", "{experiment}", "models.small=gs://shelf/m"], "models.small: 'gs://shelf/m': there is no folder"),
        (["run", "{experiment}", "models.small=s3://shelf/m"], "models.small: s3://shelf/m: s3:// is not supported"),
        (["run", "gs://shelf/prob.yaml"], "did you mean probe.yaml?"),
        (["run", "s3://shelf/probe.yaml"], "s3://shelf/probe.yaml: s3:// is not supported"),
        (["sweep", "{experiment}", "--out", "https://example.org/x"], "https:// is not supported"),
        (["status", "gs://"], "expected gs://BUCKET/..."),
        (["report", "gs://other/run"], "bucket other is not mounted"),
        (["import", "gs://other/m", "new"], "gs://other/m: bucket other is not mounted"),
        (["export", "microworld:small", "gs://other/new"], "gs://other/new: bucket other is not mounted"),
        (["generate", "--model", "m", "--prompts", "p", "--out", "gs://other/o"], "bucket other is not mounted"),
        (["chat", "--model", "http://example.org/m", "--ask", "x"], "http://example.org/m: http:// is not supported"),
        (["reviews", "gs://shelf/none.jsonl"], "none.jsonl: can't be read"),
    ],
)
def test_a_bad_path_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], bucket: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(capsys, *(argument.format(experiment="gs://shelf/probe.yaml") for argument in arguments))
    assert (code, out) == (2, "") and expected in err
    assert err.startswith("almost-jax: ") and err.count("\n") == 1 and err.endswith("\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_lives_in_a_bucket_and_goes_on_where_that_is_mounted_elsewhere(
    capsys: pytest.CaptureFixture[str], bucket: Path, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["run", "gs://shelf/probe.yaml", "--out", "gs://shelf/runs/x"]
    code, out, err = command(capsys, *line)
    assert (code, err) == (0, "") and f"{bucket / 'runs/x/report.html'}" in out
    assert (bucket / "runs/x/sft.txt").read_text() == "sft"
    config = yaml.safe_load((bucket / "runs/x/config.yaml").read_text())
    assert config["models"] == {name: f"gs://shelf/{name}" for name in MODELS}
    assert str(bucket.parent) not in (bucket / "runs/x/status.json").read_text()

    moved = bucket.parent.rename(bucket.parent.with_name("elsewhere"))
    monkeypatch.setenv(paths.VARIABLE, str(moved))
    code, out, _ = command(capsys, *line)
    assert code == 0 and out.count("done already") == len(STAGES)
    code, out, _ = command(capsys, "status", "gs://shelf/runs/x")
    assert code == 0 and out.count(" done ") == len(STAGES)


def keyed(folder: Path) -> list[str]:
    """Overrides by which every key that may name a file names one in gs://shelf."""
    (folder / "d.txt").write_text(DIALOGUES)
    for name in ("q", "s", "e", "h", "t", "v", "a", "c"):
        (folder / f"{name}.jsonl").write_text("{}\n")
    prompted = "{model: small, demonstrations: gs://shelf/d.txt, shots: 1}"
    better = "{model: small, demonstrations: gs://shelf/d.txt, shots: 2}"
    return [
        "evaluation.gold=false",
        "queries.source=file",
        "queries.file=gs://shelf/q.jsonl",
        f"comparisons.configurations={{A: {better}, B: {prompted}, C: null, D: null, E: null}}",
        "comparisons.demonstrations_order=['gs://shelf/d.txt']",
        f"demonstrations.assistant={prompted}",
        f"demonstrations.user={prompted}",
        f"evaluation.prompted={prompted}",
        "evaluation.questions=gs://shelf/e.jsonl",
        "evaluation.hhh.data=gs://shelf/h.jsonl",
        "evaluation.truthfulqa.data=gs://shelf/t.jsonl",
        "evaluation.vicuna={questions: gs://shelf/v.jsonl, against: gs://shelf/a.jsonl}",
        "as_is_reward.votes=gs://shelf/c.jsonl",
    ]


def test_every_key_that_names_a_file_may_name_one_in_a_bucket(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_experiment(bucket / "probe.yaml", keyed(bucket))
    check_inputs(config)
    seeds = load_experiment(
        bucket / "probe.yaml",
        [
            *("evaluation.gold=false", "as_is_reward.votes=none", "filters.as_is=false"),
            *("queries.source=self_instruct", "queries.self_instruct.seeds=gs://shelf/s.jsonl"),
        ],
    )
    found = {key: path for one in (config, seeds) for key, path in _files(one) if path.is_relative_to(bucket)}
    assert {path.name for path in found.values()} == {
        *("d.txt", "q.jsonl", "s.jsonl", "e.jsonl", "h.jsonl", "t.jsonl", "v.jsonl", "a.jsonl", "c.jsonl")
    }
    assert all(model_path(name, config.models[name]) == bucket / name for name in MODELS)
    monkeypatch.setenv(paths.VARIABLE, str(tmp_path / "nothing"))
    for one in (config, seeds):
        with pytest.raises(InputError, match="bucket shelf is not mounted"):
            check_inputs(one)


def test_a_model_comes_into_a_bucket_and_goes_out_of_it(capsys: pytest.CaptureFixture[str], bucket: Path) -> None:
    model = _other.make_model()
    save_llama(bucket / "theirs", _other.CONFIG, model.params, "float32", model.tokenizer)
    (bucket / "theirs/generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    code, out, err = command(capsys, "import", "gs://shelf/theirs", "gs://shelf/deep/ours")
    assert (code, err) == (0, "") and "from gs://shelf/theirs" in out
    assert json.loads((bucket / "deep/ours/model.json").read_text())["origin"] == "gs://shelf/theirs"
    found = load_model("gs://shelf/deep/ours", host_mesh(), "float32")
    _other.same_bytes(found.params, model.params)
    assert model_shape("models.small", "gs://shelf/theirs").hidden_size == _other.CONFIG.hidden_size
    assert command(capsys, "export", "gs://shelf/deep/ours", "gs://shelf/back")[0] == 0
    assert json.loads((bucket / "back/generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    code, _, err = command(capsys, "import", "gs://shelf/theirs", "gs://shelf/back")
    assert code == 2 and "exists already" in err


def test_other_places_of_paths(bucket: Path) -> None:
    (bucket / "d.txt").write_text(DIALOGUES)
    few_shot = prompted("gs://shelf/d.txt:1")
    assert few_shot is not None and "Human: one" in demonstrations_text(few_shot)
    place = str(bucket / "x")
    assert [_on_disk(one) for one in ("gs://shelf/x", "--output_path=gs://shelf/x", "--tasks", "a=gs://b")] == [
        *(place, f"--output_path={place}", "--tasks", "a=gs://b")
    ]
