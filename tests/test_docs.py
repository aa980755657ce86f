"""The documentation against the schema and the tests: keys, defaults and names of tests that it speaks of are there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from almost_jax.config import ExperimentConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *ROOT.glob("launch/*.md")])
TRAINING = ROOT / "docs/training.md"
# Of a row of docs/training.md, by its first cell: keys and their defaults, as the cell of defaults writes them.
DEFAULTS: dict[str, dict[str, tuple[Any, str]]] = {
    "Loss": {"reward.margin": (0.0, ""), "reward.centering": (0.0, "")},
    "z-loss of SFT": {"sft.z_loss": (0.0, "0")},
    "Optimizer": {"sft.training.optimizer.weight_decay": (0.0, "decay (0)")},
    "Gradient clipping": {"sft.training.optimizer.max_grad_norm": (1.0, "global norm 1")},
    "Learning rate": {
        "sft.training.optimizer.learning_rate": (1e-5, "1e-5"),
        "reward.training.optimizer.learning_rate": (1e-5, "1e-5"),
        "dpo.training.optimizer.learning_rate": (1e-6, "1e-6"),
        "ppo.optimizer.learning_rate": (1e-6, "1e-6"),
        "sft.training.optimizer.schedule": ("linear", "in a line"),
        "sft.training.optimizer.final_fraction": (0.0, "down to 0"),
        "ppo.optimizer.schedule": ("constant", "PPO: constant"),
        "ppo.optimizer.warmup_steps": (0, "no warm-up"),
    },
    "Critic's learning rate": {"ppo.value_learning_rate": (1e-5, "1e-5")},
    "Loss of DPO": {
        "dpo.beta": (0.1, "beta 0.1"),
        "dpo.objective": ("sigmoid", "sigmoid"),
        "dpo.label_smoothing": (0.0, ""),
        "dpo.length_normalized": (False, "sums over the response's tokens"),
    },
    "Reward normalisation": {"ppo.normalize_reward": (True, "by the reward model's moments")},
    "Reward clipping": {"ppo.reward_clip": (10.0, "+-10")},
    "Response without an end": {"ppo.missing_eos_penalty": (1.0, "1 is subtracted")},
    "KL penalty, where": {"ppo.kl_in": ("reward", "in the reward")},
    "KL estimator": {"ppo.kl_estimator": ("k1", "k1")},
    "KL coefficient": {"ppo.kl_coef": (0.05, "0.05")},
    "KL controller": {"ppo.kl_controller": ("fixed", "fixed")},
    "Whitening of rewards": {"ppo.whiten_rewards": (False, "no")},
    "Whitening of advantages": {"ppo.whiten_advantages": (True, "yes")},
    "Discount and trace": {"ppo.gamma": (1.0, "gamma 1"), "ppo.gae_lambda": (0.95, "lambda 0.95")},
    "Critic's start": {"ppo.critic": ("reward_model", "the reward model")},
    "Critic alone at first": {"ppo.critic_warmup_steps": (0, "no")},
    "Policy's clip": {"ppo.cliprange": (0.2, "0.2")},
    "Dual clip": {"ppo.dual_clip": (0.0, "none")},
    "Value clip": {"ppo.cliprange_value": (0.2, "0.2")},
    "Value loss's weight": {"ppo.vf_coef": (0.1, "0.1")},
    "Entropy bonus": {"ppo.entropy_coef": (0.0, "0")},
    "Average over ragged rows": {"ppo.loss_average": ("token_mean", "over tokens")},
    "Epochs, mini-batches": {"ppo.num_ppo_epochs": (4, "4"), "ppo.num_mini_batches": (1, "1")},
    "Early stop on KL": {"ppo.early_stop_kl": (0.0, "none")},
    "Head over the vocabulary": {"mesh.vocab_chunk": (8192, "8192"), "mesh.vocab_chunk_cpu": (0, "in one piece")},
    "Recomputing layers in the backward pass": {"mesh.remat": ("none", "nothing")},
    "Steps a call": {"sft.training.steps_per_call": (1, "one"), "dpo.training.steps_per_call": (1, "one")},
    "Frozen models' matrices": {"ppo.frozen_dtype": ("compute", "in the compute dtype")},
    "KL above 200 nats a response; only where there is a reference (`kl_coef` above 0, or `keep_reference`)": {
        "ppo.guards.kl": ("stop", "stop"), "ppo.guards.max_kl": (200.0, "")
    },
    "Entropy below 0.001 nats a token": {"ppo.guards.entropy": ("stop", "stop"), "ppo.guards.min_entropy": (1e-3, "")},
    "No response ended before `max_new_tokens`": {"ppo.guards.length": ("off", "off")},
    "A reward, KL, loss or gradient that is NaN or infinite (PPO)": {"ppo.guards.non_finite": ("stop", "stop")},
    "A loss or gradient that is NaN or infinite (SFT, DPO, reward models)": {
        "sft.training.guards.non_finite": ("stop", "stop")
    },
}  # fmt: skip


def default_of(key: str) -> Any:
    """The value that the schema gives a dotted key; KeyError where there is no such key."""
    found: Any = ExperimentConfig
    for part in key.split("."):
        kind = found if isinstance(found, type) else type(found)
        if not issubclass(kind, BaseModel) or part not in kind.model_fields:
            raise KeyError(key)
        field = kind.model_fields[part]
        value = field.get_default(call_default_factory=True) if found is kind else getattr(found, part)
        # A section that must be given, or is off unless it is: its schema.
        schemas = [one for one in (field.annotation, *get_args(field.annotation)) if isinstance(one, type)]
        sections = [one for one in schemas if issubclass(one, BaseModel)]
        found = sections[0] if sections and (value is None or value is PydanticUndefined) else value
    return found


def rows() -> Iterator[list[str]]:
    """The cells of every table row of docs/training.md."""
    for line in TRAINING.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("|---"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("row", DEFAULTS)
def test_defaults_in_the_tables_of_decisions_are_the_schemas(row: str) -> None:
    cells = [found for found in rows() if found[0] == row]
    assert len(cells) == 1, f"docs/training.md has {len(cells)} rows {row!r}"
    for key, (value, written) in DEFAULTS[row].items():
        assert default_of(key) == value, key
        assert written in cells[0][1], f"{key}: {written!r} isn't in {cells[0][1]!r}"


def test_every_row_about_ppo_with_a_key_is_looked_at() -> None:
    missing = {cells[0] for cells in rows() if re.search(r"`ppo\.\w+", cells[2])} - set(DEFAULTS)
    # These say in words what a default does, and are held by the tests that they name.
    assert missing == {
        "KL in the loss: its gradient", "Temperature in log-probs", "Micro-batches", "Reference", "Judging of rollouts"
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_keys_that_are_written_out_are_in_the_schema(page: Path) -> None:
    sections = "|".join(sorted(ExperimentConfig.model_fields))
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?::[^`]*|=[^`]*)?`", page.read_text()))
    named = {key for key in named if not key.endswith((".jsonl", ".json", ".yaml", ".md", ".html", ".py"))}
    for key in sorted(named):
        default_of(key)


def test_tests_that_the_tables_name_are_there() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    numbers = {number for name in defined for number in re.findall(r"(?<=_)(\d\d)(?=_)", name)}
    looked_at = 0
    for cells in rows():
        for name in re.findall(r"`(test_\w+)`", cells[-1]):
            assert name in defined, name
            looked_at += 1
        for number in re.findall(r"(?<![\w`])(\d\d)(?![\w`])", cells[-1]) if cells[0] != "Choice" else ():
            assert number in numbers, (cells[0], number)
    assert looked_at > 30
