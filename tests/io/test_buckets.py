"""gs:// paths are files in a mounted bucket; the mount is a folder here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from almost_jax.cli import main
from almost_jax.errors import InputError
from almost_jax.experiments import load_experiment
from almost_jax.io.buckets import MOUNTS, local_arguments, local_path


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(MOUNTS, str(tmp_path / "gcs"))
    folder = tmp_path / "gcs" / "things"
    folder.mkdir(parents=True)
    return folder


def test_paths_are_translated_and_everything_else_is_left(bucket: Path) -> None:
    assert local_path("gs://things/a/b.jsonl") == f"{bucket}/a/b.jsonl"
    assert local_path("gs://things") == str(bucket)
    for other in ("runs/x", "/gs/things", "hub:some/data", "https://things/a", "microworld:small", "a gs://things/a"):
        assert local_path(other) == other
    given = ["run", "gs://things/e.yaml", "models.large=gs://things/m", "--out=gs://things/o", "--model_args"]
    given += ["pretrained=gs://things/m,dtype=float32", "say gs://nothing"]
    assert local_arguments(given) == [
        "run", f"{bucket}/e.yaml", f"models.large={bucket}/m", f"--out={bucket}/o", "--model_args",
        f"pretrained={bucket}/m,dtype=float32", "say gs://nothing",
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["gs://", "gs:///x", "gs:/things/x"])
def test_what_names_no_bucket_is_refused(bucket: Path, path: str) -> None:
    with pytest.raises(InputError, match="should be gs://BUCKET/PATH"):
        local_path(path)


def test_an_experiment_names_files_in_a_bucket(bucket: Path, experiments_folder: Path) -> None:
    path = bucket / "e.yaml"
    base = experiments_folder / "microworld.yaml"
    path.write_text(f"base: {base}\nname: far\nmodels:\n  small: gs://things/models/small\n")
    assert load_experiment(path, []).models["small"] == f"{bucket}/models/small"
    path.write_text(f"base: {base}\nname: far\nmodels:\n  small: gs://others/models/small\n")
    with pytest.raises(InputError, match=r"e.yaml:4: models.small: gs://others/models/small: the bucket isn't mounted"):
        load_experiment(path, [])


def test_a_command_reads_and_writes_in_a_bucket(bucket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "microworld:small", "gs://things/small"])
    assert ended.value.code == 0 and (bucket / "small" / "config.json").exists()
    capsys.readouterr()
    reviews = [{"question_id": 1, "text": "8 3", "score": [8, 3]}]
    (bucket / "reviews.jsonl").write_text("".join(json.dumps(review) + "\n" for review in reviews))
    with pytest.raises(SystemExit) as ended:
        main(["reviews", "gs://things/reviews.jsonl"])
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["win"] == 1


def test_a_bucket_that_is_not_mounted_is_one_line() -> None:
    command = [sys.executable, "-m", "almost_jax", "run", "gs://nowhere/e.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "gcsfuse --implicit-dirs nowhere /gcs/nowhere" in done.stderr
