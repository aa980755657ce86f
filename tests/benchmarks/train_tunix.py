"""Worker: SFT and reward model steps by Tunix's trainer, and a whole PPO iteration by its PPO learner.

SFT is its trainer's own loss. It has no reward model trainer, so that step is its model and trainer with the pairwise
loss.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import serve
from training_tasks import B1, B2, EPS, LEARNING_RATE, MAX_GRAD_NORM, TIMED, WEIGHT_DECAY, rewarded, sizes, windows
from tunix.rl import rl_cluster
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout import base_rollout
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
from tunix_model import Identifiers, Scored, causal, load, make_mesh, scored, spare_token

# No token has this id: rollouts run to their limit.
NEVER = -1
# The first iteration compiles, and so, in part, does the second: only the later ones count.
WARMING = 2


def make_optimizer() -> optax.GradientTransformation:
    """AdamW behind clipping, as everyone's."""
    return optax.chain(
        optax.clip_by_global_norm(MAX_GRAD_NORM),
        optax.adamw(LEARNING_RATE, b1=B1, b2=B2, eps=EPS, weight_decay=WEIGHT_DECAY),
    )


def pairwise_loss(
    model: Scored, input_tokens: jax.Array, input_mask: jax.Array, positions: jax.Array, attention_mask: jax.Array
) -> jax.Array:
    """Mean pairwise ranking loss, scores at each row's last token; padding stands behind it."""
    scores, _ = model(input_tokens, positions, None, attention_mask)
    last = input_mask.sum(axis=1) - 1
    chosen, rejected = jnp.split(jnp.take_along_axis(scores[..., 0], last[:, None], axis=1)[:, 0], 2)
    return jax.nn.softplus(rejected - chosen).mean()


def masked(rows: np.ndarray, lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows widened to [B, width] on the right, and which of their places hold a token."""
    rows = np.pad(rows, ((0, 0), (0, width - rows.shape[1])))
    return rows, (np.arange(width)[None, :] < lengths[:, None]).astype(rows.dtype)


def supervised(spec: dict[str, Any]) -> dict[str, Any]:
    """Steps of the trainer's own loop."""
    size, task, text = sizes(spec["quick"]), spec["task"], np.load(spec["text"])
    model = load(spec) if task == "sft" else scored(load(spec), spec)
    with make_mesh():
        trainer = PeftTrainer(model, make_optimizer(), TrainingConfig(eval_every_n_steps=10**9))
        # Else each call of `train` would close its logs and checkpoints.
        trainer.is_managed_externally = True
        if task == "sft":
            given = [(windows(text, size.rows, size.tokens), np.full(size.rows, size.tokens))]
        else:
            given = [rewarded(task, text, size, step) for step in range(1 + TIMED if task == "pairs" else 1)]
            trainer.with_loss_fn(pairwise_loss)
        # Rows of one length, as it compiles a program for each.
        width = max(rows.shape[1] for rows, _ in given)
        first, *rest = (TrainingInput(*masked(rows, lengths, width)) for rows, lengths in given)
        timed = rest or [first] * size.steps
        positions, mask = causal(*first.input_tokens.shape)
        trainer.with_gen_model_input_fn(
            lambda x: {
                "input_tokens": x.input_tokens,
                "input_mask": x.input_mask,
                "positions": positions,
                "attention_mask": mask,
            }
        )
        losses: list[float] = []
        seconds: list[float] = []
        log = trainer._log_metrics
        trainer._log_metrics = lambda loss, *rest, **named: (losses.append(float(loss)), log(loss, *rest, **named))
        for batch in [first, first, *timed * spec["repeats"]]:
            start = time.perf_counter()
            trainer.train([batch])
            seconds.append(time.perf_counter() - start)
        trainer._write_train_metrics()
    return {"first_seconds": seconds[0], "second_seconds": seconds[1], "seconds": seconds[2:], "losses": losses}


def ppo(spec: dict[str, Any]) -> dict[str, Any]:
    """Iterations of the PPO learner, timed from when it asks for one batch of prompts to when it asks for the next."""
    size, shape = sizes(spec["quick"]), spec["shape"]
    text = np.load(spec["text"])
    prompts = [" ".join(map(str, row)) for row in windows(text, size.prompts, size.prompt_tokens).tolist()]
    mesh = make_mesh()
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.CRITIC, rl_cluster.Role.REFERENCE)
    roles += (rl_cluster.Role.REWARD, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=load(spec),
        reference=load(spec),
        critic=scored(load(spec), spec),
        reward=scored(load(spec), spec),
        tokenizer=Identifiers(spare_token(text, shape["vocab_size"]), NEVER),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=make_optimizer(),
                critic_optimizer=make_optimizer(),
                eval_every_n_steps=10**9,
                max_steps=10**9,
                mini_batch_size=size.prompts,
                train_micro_batch_size=size.prompts // size.micro_batches,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=size.new_tokens,
                max_prompt_length=size.prompt_tokens,
                kv_cache_size=size.prompt_tokens + size.new_tokens,
                temperature=1.0,
                top_p=1.0,
                eos_tokens=[NEVER],
            ),
        ),
    )
    learner = PPOLearner(cluster, PPOConfig(num_iterations=size.epochs, kl_method="kl"))
    asked: list[float] = []
    iterations = WARMING + spec["repeats"]

    def batches() -> Any:
        for _ in range(iterations):
            asked.append(time.perf_counter())
            yield {"prompts": np.array(prompts)}
        asked.append(time.perf_counter())

    with mesh:
        learner.train(batches())
    seconds = np.diff(asked).tolist()
    steps = cluster.actor_trainer.train_steps
    assert steps == iterations * size.epochs, f"{steps} updates of the policy in {iterations} iterations"
    return {"first_seconds": seconds[0], "second_seconds": seconds[1], "seconds": seconds[WARMING:]}


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the task."""
    return ppo(spec) if spec["task"] == "ppo" else supervised(spec)


if __name__ == "__main__":
    serve(main)
