"""The experiment schema: every number of a run lives here, and nowhere below.

Loading, inheritance (`base:`), overrides (`a.b=v`) and sweeps (`sweep:`) are in `almost_jax.experiments`; this file is
the schema alone, so that it can be read as documentation.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Scalars are strict: "4" is no integer, 1 is no boolean, 2.0 is no count, NaN and inf are no numbers. 1 is a float.
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1, strict=True)]


def _axis_size(size: int) -> int:
    if size == 0 or size < -1:
        raise ValueError("an axis has a positive number of devices, or -1 for what the others leave")
    return size


AxisSize = Annotated[int, Field(strict=True), AfterValidator(_axis_size)]


# Logits over lower temperatures may be infinite in float32.
COLDEST = 1e-6


def _temperature(value: float) -> float:
    if value != 0 and value < COLDEST:
        raise ValueError(f"a temperature is 0 (greedy), or {COLDEST:g} or more")
    return value


Temperature = Annotated[float, Field(strict=True, allow_inf_nan=False), AfterValidator(_temperature)]


def _off(action: object) -> object:
    return "off" if action is False else action


# yaml reads a bare `off` as false.
GuardAction = Annotated[Literal["stop", "skip", "off"], BeforeValidator(_off)]
# It names a folder, so it can't hold a slash.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", strict=True)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def wrong(key: str, message: str) -> PydanticCustomError:
    """An error about `key` (dotted, from the section that raises), for checks across keys."""
    return PydanticCustomError("experiment", "{message}", {"key": key, "message": message})


class Section(BaseModel):
    """A frozen part of the experiment; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# What a preset says of the axes that a file leaves out.
MESH_PRESETS: dict[str, dict[str, int]] = {
    "fsdp": {"data": 1, "fsdp": -1, "tensor": 1},
    "fsdp+tensor": {"data": 1, "fsdp": -1, "tensor": 4},
    # Both -1: as near to each other as their product allows, each an axis of the torus.
    "square": {"data": -1, "fsdp": -1, "tensor": 1},
}


class SamplingMeshConfig(Section):
    """A mesh for sampling alone, by the preset `inference`: weights are split over embed (their model dimension) and
    tensor (the other one) and stay where they are. One axis may be -1 and takes what is left.
    """

    preset: Literal["inference"] = "inference"
    data: AxisSize = 1
    embed: AxisSize = 1
    tensor: AxisSize = -1

    @model_validator(mode="after")
    def _one_free_axis(self) -> "SamplingMeshConfig":
        if [self.data, self.embed, self.tensor].count(-1) > 1:
            raise wrong("embed" if self.embed == -1 else "data", "only one mesh axis may be -1")
        return self


class MeshConfig(Section):
    """Devices of a slice along each mesh axis, and how training programs run on them.

    One axis may be -1 and takes what is left. `preset` fills axes that are left out: `fsdp` splits all over fsdp,
    `fsdp+tensor` over four devices of a tensor axis too, `square` has data and fsdp of like size. `dcn_data` is the
    number of slices: rows are split over them, parameters are not. `sampling` is a mesh of its own for sampling;
    without it the training mesh samples too.

    With `explicit`, every matrix is split over data and over fsdp, gathered one axis at a time where it is used, and
    its gradient reduce-scattered in `gradient_dtype`; the compiler decides otherwise. `remat` says what the
    backward pass recomputes: nothing (`none`), all but products with weights (`dots`), whole layers (`full`).
    `attention: splash` uses that kernel on a TPU where a program sees its own rows alone
    (`explicit`, or one device), and on a CPU takes queries in blocks over the keys that they may see. Training and
    scoring apply the head to at most `vocab_chunk` entries of the vocabulary at a time, so that no array of batch x
    length x vocabulary stands in memory; 0 for all at once, as smaller vocabularies are. On a CPU `vocab_chunk_cpu`
    says so instead: there the second pass over the head costs more than the memory is worth.
    """

    preset: Literal["fsdp", "fsdp+tensor", "square"] | None = None
    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1
    dcn_data: PositiveInt = 1
    sampling: SamplingMeshConfig | None = None
    explicit: Flag = False
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["plain", "splash"] = "splash"
    vocab_chunk: NonNegativeInt = 8192
    vocab_chunk_cpu: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        return {**MESH_PRESETS[preset], **values} if preset in MESH_PRESETS else values

    @model_validator(mode="after")
    def _one_free_axis(self) -> "MeshConfig":
        free = [self.data, self.fsdp, self.tensor].count(-1)
        if free > 1 and not (self.preset == "square" and self.tensor != -1):
            raise wrong("fsdp" if self.fsdp == -1 else "tensor", "only one mesh axis may be -1")
        return self

    @model_validator(mode="after")
    def _sums_of_explicit(self) -> "MeshConfig":
        if self.gradient_dtype != "float32" and not self.explicit:
            raise wrong(
                "gradient_dtype",
                f"{self.gradient_dtype} needs mesh.explicit: true; else the compiler sums gradients in float32",
            )
        return self


class SamplingConfig(Section):
    """How completions are drawn. `top_p: 1` and `top_k: 0` mean off; `temperature: 0` is greedy.

    With `trim_unfinished` a prompted model's turn that ran out of tokens ends with its last whole sentence.

    How fast, but not what: `batch_size` requests run at once, each in a slot; every `steps_per_wake` tokens the host
    looks for what has ended and, with `refill`, gives free slots to the next requests; prompts are read
    `prefill_tokens` at a time. Responses and evaluation are sampled in groups of `group_batches` batches: slots are
    refilled within a group, and a stopped stage samples the group at work again.
    """

    temperature: Temperature = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0
    top_k: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64
    trim_unfinished: Flag = False
    steps_per_wake: PositiveInt = 8
    refill: Flag = True
    prefill_tokens: PositiveInt = 2048
    group_batches: PositiveInt = 4


class AnswersConfig(SamplingConfig):
    """`SamplingConfig` for answers to the Vicuna questions: drawn as FastChat drew its own, unless said otherwise."""

    temperature: Temperature = 0.7
    max_new_tokens: PositiveInt = 1024


class PromptedModel(Section):
    """A vanilla model behind a few-shot dialogue prompt.

    `model` is a key of the experiment's `models`; `demonstrations` is a file of dialogues (`microworld:NAME`,
    the name of a file in stages/prompts without its suffix, or a path to a yaml or text file), of which the first
    `shots` are shown.
    """

    model: Text
    demonstrations: Text
    shots: PositiveInt


class OptimizerConfig(Section):
    """AdamW behind global-norm clipping, with warm-up and decay of the learning rate."""

    learning_rate: Positive = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 0
    final_fraction: Fraction = 0.0
    b1: Momentum = 0.9
    b2: Momentum = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0


class PolicyOptimizerConfig(OptimizerConfig):
    """`OptimizerConfig` for a policy that has been fine-tuned before."""

    learning_rate: Positive = 1e-6


class PpoOptimizerConfig(PolicyOptimizerConfig):
    """`PolicyOptimizerConfig` at a constant rate."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"


class GuardsConfig(Section):
    """What supervised training does about a loss or gradient that is NaN or infinite.

    `stop` ends the stage, `skip` leaves that update out (`max_skips` in a row stop), `off` nothing.
    """

    non_finite: GuardAction = "stop"
    max_skips: PositiveInt = 10


class TrainingConfig(Section):
    """A supervised training run: SFT, the reward model, the as-is reward model.

    `max_length` (tokens) truncates nothing: longer examples are dropped and counted. `micro_batches` splits each batch
    for gradient accumulation, `steps_per_call` makes so many steps by one call of a program. The last `max_to_keep`
    checkpoints stay.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 64
    micro_batches: PositiveInt = 1
    max_length: PositiveInt = 1024
    guards: GuardsConfig = GuardsConfig()
    steps_per_call: PositiveInt = 1
    checkpoint_every: PositiveInt = 100
    max_to_keep: PositiveInt = 2
    log_every: PositiveInt = 10

    @model_validator(mode="after")
    def _divides(self) -> "TrainingConfig":
        if self.batch_size % self.micro_batches:
            raise wrong("batch_size", f"{self.batch_size} must be divisible by micro_batches {self.micro_batches}")
        if self.checkpoint_every % self.steps_per_call:
            raise wrong(
                "checkpoint_every",
                f"{self.checkpoint_every} must be divisible by steps_per_call {self.steps_per_call}: a state is saved "
                "between two calls",
            )
        return self


class DpoTrainingConfig(TrainingConfig):
    """`TrainingConfig` from a fine-tuned policy on."""

    optimizer: PolicyOptimizerConfig = PolicyOptimizerConfig()


class SelfInstructConfig(Section):
    """Self-Instruct query generation (paper stage 0)."""

    seeds: Text = "seed_instructions"
    generator: Text = "large"
    in_context: PositiveInt = 8
    in_context_generated: NonNegativeInt = 2
    max_similarity: Fraction = 0.7
    min_words: PositiveInt = 3
    max_words: PositiveInt = 150
    max_rounds: PositiveInt = 1000
    requests_per_round: PositiveInt = 64
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _bounds(self) -> "SelfInstructConfig":
        if self.min_words > self.max_words:
            raise wrong("min_words", f"{self.min_words} is more than max_words {self.max_words}")
        if self.in_context_generated > self.in_context:
            raise wrong(
                "in_context_generated",
                f"{self.in_context_generated} of the in-context instructions is more than in_context {self.in_context}",
            )
        return self


class QueriesConfig(Section):
    """Where queries come from: the micro-world's generator, self-instruct, or a jsonl file with a `text` field."""

    source: Literal["microworld", "self_instruct", "file"] = "self_instruct"
    count: PositiveInt = 10000
    file: Text | None = None
    self_instruct: SelfInstructConfig = SelfInstructConfig()

    @model_validator(mode="after")
    def _file_given(self) -> "QueriesConfig":
        if self.source == "file" and self.file is None:
            raise wrong("file", "needs the path of a jsonl file when source is file")
        return self


class ComparisonsConfig(Section):
    """The configurations whose responses are ranked, best first, and what the rule of thumb knows of them.

    `model_order` and `demonstrations_order` list names from best to worst; a pair is ranked by the first of size,
    demonstrations, shots that differs, and the order of `configurations` must agree with that.
    """

    configurations: dict[Name, PromptedModel]
    model_order: tuple[Text, ...]
    demonstrations_order: tuple[Text, ...]
    pairs: Literal["adjacent", "all"] = "all"
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _follows_the_rule_of_thumb(self) -> "ComparisonsConfig":
        if len(self.configurations) < 2:
            raise wrong(
                "configurations", f"{len(self.configurations)} configuration can't be compared; give two or more"
            )
        for order in ("model_order", "demonstrations_order"):
            names = getattr(self, order)
            if len(set(names)) < len(names):
                raise wrong(order, f"a name stands twice in {list(names)}")
        standings = {}
        for name, prompted in self.configurations.items():
            for key, value, order in (
                ("model", prompted.model, "model_order"),
                ("demonstrations", prompted.demonstrations, "demonstrations_order"),
            ):
                if value not in getattr(self, order):
                    raise wrong(
                        f"configurations.{name}.{key}",
                        f"{value!r} must stand in comparisons.{order}, which has {_listed(getattr(self, order))}",
                    )
            # Smaller is better: size first, then demonstrations, then shots.
            standings[name] = (
                self.model_order.index(prompted.model),
                self.demonstrations_order.index(prompted.demonstrations),
                -prompted.shots,
            )
        names = list(standings)
        for better, worse in zip(names, names[1:], strict=False):
            if standings[better] == standings[worse]:
                raise wrong(f"configurations.{worse}", f"is the same as {better}: no rule can rank the two")
            if standings[better] > standings[worse]:
                raise wrong(
                    f"configurations.{worse}",
                    f"ranks above {better} by size, demonstrations and shots, so it must stand before {better}",
                )
        return self


class FiltersConfig(Section):
    """Post-validation. Keywords are matched case-insensitively on word boundaries, at the start or anywhere."""

    heuristic: Flag = True
    keywords_start: tuple[Text, ...] = ("well",)
    keywords_anywhere: tuple[Text, ...] = ("i don't know", "i do not know", "i'm not sure")
    length_rule: Flag = True
    as_is: Flag = True


class AsIsRewardConfig(Section):
    """The reward model trained on community votes.

    `votes` is `microworld`, a jsonl file of chosen/rejected, `hub:NAME` for a data set of questions with voted answers
    (or of chosen/rejected) that the `datasets` library finds, or `none` for no such model. `packed_length`: see
    `RewardConfig`.
    """

    model: Text = "small"
    votes: Text = "none"
    pairs: PositiveInt = 20000
    held_out: NonNegativeInt = 500
    packed_length: NonNegativeInt = 0
    training: TrainingConfig = TrainingConfig()


class JudgeConfig(Section):
    """A judge behind an OpenAI-compatible endpoint: `url` is its base, `key_variable` the variable that holds the key.

    `timeout` and `pause` are seconds; `pause` doubles from try to try. `max_requests` and `max_tokens` cap what a run
    may spend.
    """

    url: Text = "https://api.openai.com/v1"
    model: Text
    key_variable: Text = "OPENAI_API_KEY"
    timeout: Positive = 120.0
    attempts: PositiveInt = 6
    pause: NonNegative = 1.0
    concurrency: PositiveInt = 4
    reply_tokens: PositiveInt = 1024
    max_requests: PositiveInt = 2000
    max_tokens: PositiveInt = 4_000_000


class AuditConfig(Section):
    """The assumption audit: how often the rule of thumb agrees with the as-is reward model, and with a judge if given.

    `queries` is the size of the sample; 0 turns the audit off.
    """

    queries: NonNegativeInt = 0
    judge: JudgeConfig | None = None
    bootstrap_samples: PositiveInt = 2000


class RewardConfig(Section):
    """The pairwise reward model (paper stage 1). `margin` and `centering` (0 is the paper's loss) are options.

    `packed_length` packs each batch's pairs into rows of so many tokens, or as many as the longest pair takes, in which
    none sees another and what both texts of a pair begin with stands once: a step learns from the same pairs with less
    padding and fewer tokens. 0 gives each text a row of its own.
    """

    model: Text = "small"
    margin: NonNegative = 0.0
    centering: NonNegative = 0.0
    held_out: NonNegativeInt = 500
    reference_samples: Annotated[int, Field(ge=2, strict=True)] = 512
    packed_length: NonNegativeInt = 0
    training: TrainingConfig = TrainingConfig()


class RewardAblationConfig(Section):
    """The reward model on all pairs, on those after the heuristic filter, and on the kept ones, for as many steps.

    Off without a `reward_ablation:` section. Settings are those of `reward`. At least `held_out` of the kept pairs are
    held out, with all pairs of their queries. `max_steps` is a bound on the steps of training; 0 for none.
    """

    held_out: PositiveInt = 500
    max_steps: NonNegativeInt = 0


class DemonstrationsConfig(Section):
    """Reward-model-guided self-play (paper stage 2); `n: 1` is plain self-play.

    `baseline` also plays without the reward model, for the ablation. A user's turn that begins or ends with one of
    `farewells` ends the dialogue before it. With `reuse_cache` a dialogue's next turn goes on from what was read of it,
    where both sides are one model: less to read, for the memory of every candidate's keys and values. A batch of
    dialogues is played at once, a group of batches where no keys and values are kept; a stopped stage plays them again.
    """

    assistant: PromptedModel
    user: PromptedModel
    queries: PositiveInt = 10000
    n: PositiveInt = 4
    max_turns: PositiveInt = 2
    baseline: Flag = True
    reuse_cache: Flag = True
    farewells: tuple[Text, ...] = ("bye", "goodbye", "bye-bye", "see you", "have a nice day", "have a good day")
    sampling: SamplingConfig = SamplingConfig()
    user_sampling: SamplingConfig = SamplingConfig()


class SftConfig(Section):
    """Supervised fine-tuning on the demonstrations, loss on assistant tokens only.

    `packed_length` packs each batch's demonstrations into rows of so many tokens, in which none sees another: a step
    learns from the same demonstrations with less padding. 0 gives each a row of its own. `z_loss` weighs the squared
    log of the softmax's denominator at every target; 0 is the plain loss. `held_out` demonstrations are not learned
    from: their loss is logged with every checkpoint.
    """

    model: Text = "small"
    held_out: NonNegativeInt = 0
    packed_length: NonNegativeInt = 0
    z_loss: NonNegative = 0.0
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _holds_the_longest(self) -> "SftConfig":
        if 0 < self.packed_length < self.training.max_length:
            raise wrong(
                "packed_length",
                f"rows of {self.packed_length} can't hold demonstrations of training.max_length "
                f"{self.training.max_length}; give as many tokens or more, or 0 for rows of their own",
            )
        return self


class PpoGuardsConfig(Section):
    """What PPO does about a step that goes wrong: `stop` ends the stage, `skip` leaves its updates out, `off` nothing.

    `non_finite`: a reward, KL, loss or gradient that is NaN or infinite (of one mini-batch: that update alone is
    skipped). `kl`: the mean KL from the reference, where there is one, is above `max_kl` nats a response. `entropy`:
    the policy's mean entropy is below `min_entropy` nats a token. `length`: no response of the batch ended before
    `max_new_tokens`; off, since a fixed length may be meant. After `max_skips` steps skipped in a row the next stops.
    """

    non_finite: GuardAction = "stop"
    kl: GuardAction = "stop"
    max_kl: Positive = 200.0
    entropy: GuardAction = "stop"
    min_entropy: Positive = 1e-3
    length: GuardAction = "off"
    max_skips: PositiveInt = 10


class DpoConfig(Section):
    """Direct preference optimisation from the kept pairs, a baseline beside RLSF; off without a `dpo:` section.

    `length_normalized` divides log-probs by the number of the response's tokens; `label_smoothing` belongs to the
    sigmoid objective. `packed_length` packs each batch's pairs as the reward model's are, a query once for both
    responses.
    """

    beta: Positive = 0.1
    objective: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, strict=True)] = 0.0
    length_normalized: Flag = False
    held_out: NonNegativeInt = 500
    packed_length: NonNegativeInt = 0
    training: DpoTrainingConfig = DpoTrainingConfig()

    @model_validator(mode="after")
    def _smoothing_fits(self) -> "DpoConfig":
        if self.objective == "ipo" and self.label_smoothing:
            raise wrong("label_smoothing", "belongs to objective sigmoid; leave it at 0 with ipo")
        return self


class PpoConfig(Section):
    """RLSF: PPO from the SFT policy against the reward model (paper stage 3).

    `kl_in` puts the KL penalty into the reward or into the loss. `early_stop_kl` ends a step's updates at the first
    one that finds the policy further than so many nats a token from the one that sampled (0: never). `dual_clip` 0 and
    `cliprange_value` 0 mean none. `judge_micro_batches` splits the pass of all models over the rollouts; as the updates
    are split when 0. The frozen models' matrices are stored in `frozen_dtype`, `compute` being `compute_dtype`, which
    changes no bit. With a fixed `kl_coef` of 0 there is no reference in memory, and no KL is measured, unless
    `keep_reference`. `overlap_rollouts` samples for step k + 1 by the policy from before the updates of step k, on one
    device while they run: off-policy by one step.
    """

    steps: PositiveInt = 100
    batch_size: PositiveInt = 64
    num_ppo_epochs: PositiveInt = 4
    num_mini_batches: PositiveInt = 1
    micro_batches: PositiveInt = 1
    optimizer: PpoOptimizerConfig = PpoOptimizerConfig()
    critic: Literal["reward_model", "sft"] = "reward_model"
    value_learning_rate: Positive = 1e-5
    critic_warmup_steps: NonNegativeInt = 0
    max_prompt_length: PositiveInt = 512
    sampling: SamplingConfig = SamplingConfig()
    kl_coef: NonNegative = 0.05
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: Positive = 6.0
    kl_horizon: PositiveInt = 10000
    early_stop_kl: NonNegative = 0.0
    cliprange: Positive = 0.2
    dual_clip: NonNegative = 0.0
    cliprange_value: NonNegative = 0.2
    vf_coef: NonNegative = 0.1
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    whiten_rewards: Flag = False
    whiten_advantages: Flag = True
    normalize_reward: Flag = True
    reward_clip: Positive = 10.0
    missing_eos_penalty: NonNegative = 1.0
    entropy_coef: NonNegative = 0.0
    loss_average: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    judge_micro_batches: NonNegativeInt = 0
    frozen_dtype: Literal["compute", "float32", "bfloat16"] = "compute"
    keep_reference: Flag = False
    overlap_rollouts: Flag = False
    guards: PpoGuardsConfig = PpoGuardsConfig()
    checkpoint_every: PositiveInt = 20
    max_to_keep: PositiveInt = 2
    log_every: PositiveInt = 1
    sample_every: PositiveInt = 20

    @model_validator(mode="after")
    def _fits(self) -> "PpoConfig":
        if self.batch_size % (self.num_mini_batches * self.micro_batches):
            raise wrong(
                "batch_size",
                f"{self.batch_size} must be divisible by num_mini_batches x micro_batches "
                f"= {self.num_mini_batches} x {self.micro_batches}",
            )
        if self.judge_micro_batches and self.batch_size % self.judge_micro_batches:
            raise wrong(
                "judge_micro_batches", f"{self.judge_micro_batches} must divide batch_size {self.batch_size}"
            )
        if self.sampling.temperature == 0:
            raise wrong("sampling.temperature", "rollouts must be sampled; a temperature of 0 is greedy")
        if self.sampling.trim_unfinished:
            raise wrong("sampling.trim_unfinished", "rollouts are learned from as they are; only prompts may trim")
        if self.sampling.top_p < 1 or self.sampling.top_k:
            raise wrong(
                "sampling.top_p" if self.sampling.top_p < 1 else "sampling.top_k",
                "rollouts are drawn from the whole distribution, whose log-probs PPO learns from; leave both off",
            )
        if self.critic_warmup_steps >= self.steps:
            raise wrong(
                "critic_warmup_steps", f"{self.critic_warmup_steps} of {self.steps} steps leave none for the policy"
            )
        if self.early_stop_kl and self.overlap_rollouts:
            raise wrong(
                "early_stop_kl",
                "with overlap_rollouts a step begins where the last one's updates ended, beyond the limit already; "
                "use one of the two",
            )
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise wrong("kl_coef", "an adaptive coefficient is multiplied step by step, so 0 stays 0; start above it")
        if self.kl_controller == "adaptive" and self.batch_size >= 5 * self.kl_horizon:
            raise wrong(
                "kl_horizon",
                f"{self.kl_horizon} responses: the coefficient changes by up to a fifth of batch_size / kl_horizon, "
                f"here by all of it, with steps of {self.batch_size} responses; use more than batch_size / 5",
            )
        if self.early_stop_kl and self.num_ppo_epochs * self.num_mini_batches == 1:
            raise wrong(
                "early_stop_kl", "a step of one update has none to stop: the policy is where it sampled until then"
            )
        if 0 < self.dual_clip <= 1:
            raise wrong("dual_clip", f"{self.dual_clip} would clip the old policy itself; use more than 1, or 0")
        return self

    @property
    def uses_reference(self) -> bool:
        """Whether the reference policy is in memory: something is computed from it, or it was asked for."""
        return self.kl_coef > 0 or self.keep_reference


class OverOptimisationConfig(Section):
    """PPO once more with too weak a KL penalty, so that the report shows what the penalty is there for."""

    kl_coef: NonNegative = 0.0
    steps: PositiveInt = 60
    sample_every: PositiveInt = 10


class StaticConfig(Section):
    """A static benchmark, HHH or TruthfulQA: its questions from a file, or from the hub when `data` is not given."""

    data: Text | None = None
    batch_size: PositiveInt = 16


class VicunaConfig(Section):
    """Answers to open questions before a judge, each policy against one other.

    `questions` is a jsonl file of question_id and text or turns; `against` one of the run's policies (vanilla,
    sft_self_play, sft, dpo, rlsf) or a jsonl file of answers. `judge` is `reward_model`, the run's own, or a model's
    name at an OpenAI-compatible endpoint: then the keys from `url` on say how it is asked and what a run may spend.
    `prompt` is how the vanilla model is asked: `NAME:K`, K demonstrations of NAME, or `plain`.
    """

    questions: Text
    against: Text = "vanilla"
    judge: Text = "reward_model"
    prompt: Text = "plain"
    sampling: AnswersConfig = AnswersConfig()
    url: Text = "https://api.openai.com/v1"
    key_variable: Text = "OPENAI_API_KEY"
    concurrency: PositiveInt = 4
    timeout: Positive = 120.0
    attempts: PositiveInt = 6
    pause: NonNegative = 1.0
    reply_tokens: PositiveInt = 1024
    max_requests: NonNegativeInt = 1000
    max_tokens: NonNegativeInt = 2_000_000


class EvaluationConfig(Section):
    """Evaluation on held-out queries: by the gold score in the micro-world, elsewhere by the reward models.

    Elsewhere the queries are the first `queries` of `questions`: the name of a yaml file in stages/prompts, or a path
    to a yaml or jsonl file. In the micro-world choose settings on the `development` queries; `test` is for the figures
    that are reported.

    Benchmarks are off unless given, if only as `{}`.
    """

    gold: Flag = False
    split: Literal["development", "test"] = "test"
    queries: PositiveInt = 1000
    questions: Text | None = None
    best_of: PositiveInt = 4
    curve_queries: PositiveInt = 400
    prompted: PromptedModel | None = None
    sampling: SamplingConfig = SamplingConfig()
    bootstrap_samples: PositiveInt = 2000
    hhh: StaticConfig | None = None
    truthfulqa: StaticConfig | None = None
    vicuna: VicunaConfig | None = None


class ExperimentConfig(Section):
    """One experiment: the models, then one section per stage in the order in which they run.

    `models` maps names to sources: `microworld:small`, a checkpoint folder of ours or a Hugging Face folder. Wherever a
    path may stand it may be `gs://BUCKET/...`, of a bucket that is mounted (io/paths.py); config.yaml keeps it so.
    """

    name: Name
    seed: NonNegativeInt = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = MeshConfig()
    models: dict[Text, Text]
    queries: QueriesConfig
    as_is_reward: AsIsRewardConfig
    audit: AuditConfig = AuditConfig()
    comparisons: ComparisonsConfig
    filters: FiltersConfig = FiltersConfig()
    reward: RewardConfig
    reward_ablation: RewardAblationConfig | None = None
    demonstrations: DemonstrationsConfig
    sft: SftConfig
    dpo: DpoConfig | None = None
    ppo: PpoConfig
    over_optimisation: OverOptimisationConfig | None = None
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _agrees(self) -> "ExperimentConfig":
        for key, name in self.model_references():
            if name not in self.models:
                raise wrong(key, f"{name!r} must be one of the models: {_listed(self.models)}")
        for number, name in enumerate(self.comparisons.model_order):
            if name not in self.models:
                raise wrong(
                    f"comparisons.model_order.{number}", f"{name!r} must be one of the models: {_listed(self.models)}"
                )
        if self.evaluation.gold and self.queries.source != "microworld":
            raise wrong("evaluation.gold", "only the micro-world has a gold score; set queries.source to microworld")
        if self.as_is_reward.votes == "microworld" and self.queries.source != "microworld":
            raise wrong("as_is_reward.votes", "the micro-world's votes are in its own language; give others, or none")
        if self.over_optimisation is not None and self.ppo.critic_warmup_steps >= self.over_optimisation.steps:
            raise wrong(
                "over_optimisation.steps", f"ppo.critic_warmup_steps {self.ppo.critic_warmup_steps} leave none of them"
            )
        if self.evaluation.gold and self.evaluation.questions is not None:
            raise wrong("evaluation.questions", "the gold score has its own questions; give these or evaluation.gold")
        if self.filters.as_is and self.as_is_reward.votes == "none":
            raise wrong("filters.as_is", "there is no as-is reward model with as_is_reward.votes none; turn it off")
        return self

    def model_references(self) -> Iterator[tuple[str, str]]:
        """Every (dotted key, model name) of the stages that will run."""
        if self.queries.source == "self_instruct":
            yield "queries.self_instruct.generator", self.queries.self_instruct.generator
        for name, prompted in self.comparisons.configurations.items():
            yield f"comparisons.configurations.{name}.model", prompted.model
        if self.as_is_reward.votes != "none":
            yield "as_is_reward.model", self.as_is_reward.model
        yield "reward.model", self.reward.model
        yield "demonstrations.assistant.model", self.demonstrations.assistant.model
        yield "demonstrations.user.model", self.demonstrations.user.model
        yield "sft.model", self.sft.model
        if self.evaluation.prompted is not None:
            yield "evaluation.prompted.model", self.evaluation.prompted.model
