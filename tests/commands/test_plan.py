"""`almost-jax plan`: what it prints and how it ends, the compiler replaced by reports of its kind."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from almost_jax.cli import main
from almost_jax.commands import plan


def report(name: str, peak: float) -> dict[str, Any]:
    return {
        "name": name, "fits": peak + 1e9 < 16.9e9, "peak_bytes": int(peak), "beside_bytes": int(1e9),
        "argument_bytes": 1, "temp_bytes": 1,
        "memory": {"parameters": 4e8, "optimizer": 8e8, "cache": 0, "rest": 1}, "flops": 1e15, "floor_seconds": 1.09,
        "collectives": {
            "all-gather": {"count": 3, "bytes": 29e9, "async_bytes": 22e9},
            "all-reduce": {"count": 1, "bytes": 1e9, "async_bytes": 0},
            "reduce-scatter": {"count": 2, "bytes": 3e9, "async_bytes": 0},
        },
        "knobs": ["mesh.remat", "sft.training.micro_batches"], "warnings": ["something is odd"],
    }  # fmt: skip


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that were compiled; sft_step doesn't fit on v5e:2x2."""
    names: list[str] = []

    def compile_one(config: Any, topology: Any, name: str) -> dict[str, Any]:
        names.append(name)
        return report(name, 4e9 if topology.name != "v5e:2x2" or name != "sft_step" else 40e9)

    monkeypatch.setattr(plan, "_compile", compile_one)
    monkeypatch.setattr(plan, "_check_libtpu", lambda: None)
    return names


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    return int(ended.value.code or 0)


def test_json_names_every_program_with_its_figures(
    compiled: list[str], experiments_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(experiments_folder / "almost_7b.yaml"), "--topology", "v5e:8x8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["topology"] == "v5e:8x8"
    assert [program["name"] for program in found["programs"]][:5] == [
        "sft_step", "reward_step", "ppo_update", "ppo_judge", "score_reward"
    ]  # fmt: skip
    figures = {"fits", "peak_bytes", "argument_bytes", "temp_bytes", "flops", "floor_seconds", "warnings"}
    assert figures | {"collectives"} <= set(found["programs"][0])
    assert sorted(compiled) == sorted(program["name"] for program in found["programs"])


def test_what_does_not_fit_says_by_how_much_and_which_keys_help(
    compiled: list[str], experiments_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = str(experiments_folder / "almost_7b.yaml")
    assert run(experiment, "--topology", "v5e:2x2", "--only", "sft_step,score_reward") == 1
    out = capsys.readouterr().out
    assert "sft_step needs 24.1 GB more than a chip has; try mesh.remat, sft.training.micro_batches" in out
    assert "75%" in out and "no" not in out.split("score_reward")[1].split("yes")[0]
    assert compiled == ["sft_step", "score_reward"] or compiled == ["score_reward", "sft_step"]


def test_a_sweep_tries_meshes_and_names_the_best_that_fits(
    compiled: list[str], experiments_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def compile_one(config: Any, topology: Any, name: str) -> dict[str, Any]:
        tried.append((config.mesh, config.sft.training.micro_batches))
        return report(name, 20e9 / config.sft.training.micro_batches)

    monkeypatch.setattr(plan, "_compile", compile_one)
    assert run(str(experiments_folder / "almost_7b.yaml"), "--topology", "v5e:4x4", "--sweep") == 0
    out = capsys.readouterr()
    assert "best that fits: data=1 fsdp=16 tensor=1 explicit=False micro_batches=2: sft_step (10.00 GB a chip)" in (
        " ".join(out.err.split())
    )
    # The file's gradients in bfloat16 are for explicit sums alone.
    assert {(mesh.explicit, mesh.gradient_dtype) for mesh, _ in tried} == {(False, "float32"), (True, "bfloat16")}
    assert {(mesh.data, mesh.fsdp, mesh.tensor) for mesh, _ in tried} == {(1, 16, 1), (4, 4, 1), (1, 4, 4)}


def test_a_report_is_compiled_once_and_again_for_another_model_in_the_folder(
    experiments_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def worker(line: list[str], **_: Any) -> Any:
        started.append(line[-1])
        return subprocess.CompletedProcess(line, 0, json.dumps(report(line[-1], 4e9)), "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan.subprocess, "run", worker)
    monkeypatch.setattr(plan, "_check_libtpu", lambda: None)
    monkeypatch.setattr(plan.importlib.metadata, "version", lambda package: "1")
    card = tmp_path / "model/config.json"
    card.parent.mkdir()

    def planned(layers: int, only: str = "sft_step") -> int:
        fields = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4}
        card.write_text(json.dumps({"model_type": "llama", "vocab_size": 100, "rms_norm_eps": 1e-5, **fields}))
        model = f"models.small={card.parent}"
        assert run(str(experiments_folder / "almost_7b.yaml"), model, "--only", only) == 0
        return len(started)

    assert [planned(2), planned(2), planned(3), planned(2), planned(2, "reward_step")] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5litepod:8x8"], "topology 'v5litepod:8x8': expected KIND:SHAPE"),
        (["--only", "sft"], "--only 'sft': this experiment's programs are sft_step"),
        (["mesh.explicit=perhaps"], "mesh.explicit"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, compiled: list[str], experiments_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(str(experiments_folder / "almost_7b.yaml"), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and compiled == []
