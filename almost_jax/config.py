"""The experiment schema: every number of a run lives here, and nowhere below.

Loading, inheritance (`base:`), overrides (`a.b=v`) and sweeps (`sweep:`) are in `almost_jax.experiments`; this file is
the schema alone, so that it can be read as documentation.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen part of the experiment; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MeshConfig(Section):
    """Devices along each mesh axis; one axis may be -1 and takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class SamplingConfig(Section):
    """How completions are drawn. `top_p: 1` and `top_k: 0` mean off; `temperature: 0` is greedy."""

    temperature: NonNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64


class PromptedModel(Section):
    """A vanilla model behind a few-shot dialogue prompt.

    `model` is a key of the experiment's `models`; `demonstrations` is a file of dialogues (`microworld:NAME`,
    the name of a file in stages/prompts without its suffix, or a path), of which the first `shots` are shown.
    """

    model: str
    demonstrations: str
    shots: PositiveInt


class OptimizerConfig(Section):
    """AdamW behind global-norm clipping, with warm-up and decay of the learning rate."""

    learning_rate: Positive = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 0
    final_fraction: Fraction = 0.0
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0


class TrainingConfig(Section):
    """A supervised training run: SFT, the reward model, the as-is reward model.

    `max_length` (tokens) truncates nothing: longer examples are dropped and counted. `micro_batches` splits each batch
    for gradient accumulation.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 64
    micro_batches: PositiveInt = 1
    max_length: PositiveInt = 1024
    checkpoint_every: PositiveInt = 100
    log_every: PositiveInt = 10


class SelfInstructConfig(Section):
    """Self-Instruct query generation (paper stage 0)."""

    seeds: str = "seed_instructions"
    generator: str = "large"
    in_context: PositiveInt = 8
    in_context_generated: NonNegativeInt = 2
    max_similarity: Fraction = 0.7
    min_words: PositiveInt = 3
    max_words: PositiveInt = 150
    max_rounds: PositiveInt = 1000
    requests_per_round: PositiveInt = 64
    sampling: SamplingConfig = SamplingConfig()


class QueriesConfig(Section):
    """Where queries come from: the micro-world's generator, self-instruct, or a jsonl file with a `text` field."""

    source: Literal["microworld", "self_instruct", "file"] = "self_instruct"
    count: PositiveInt = 10000
    file: str | None = None
    self_instruct: SelfInstructConfig = SelfInstructConfig()


class ComparisonsConfig(Section):
    """The configurations whose responses are ranked, best first, and what the rule of thumb knows of them.

    `model_order` and `demonstrations_order` list names from best to worst; a pair is ranked by the first of size,
    demonstrations, shots that differs, and the order of `configurations` must agree with that.
    """

    configurations: dict[str, PromptedModel]
    model_order: tuple[str, ...]
    demonstrations_order: tuple[str, ...]
    pairs: Literal["adjacent", "all"] = "all"
    sampling: SamplingConfig = SamplingConfig()


class FiltersConfig(Section):
    """Post-validation. Keywords are matched case-insensitively on word boundaries, at the start or anywhere."""

    heuristic: bool = True
    keywords_start: tuple[str, ...] = ("well",)
    keywords_anywhere: tuple[str, ...] = ("i don't know", "i do not know", "i'm not sure")
    length_rule: bool = True
    as_is: bool = True


class AsIsRewardConfig(Section):
    """The reward model trained on community votes. `votes` is `microworld` or a jsonl file of chosen/rejected."""

    model: str = "small"
    votes: str = "microworld"
    pairs: PositiveInt = 20000
    held_out: NonNegativeInt = 500
    training: TrainingConfig = TrainingConfig()


class RewardConfig(Section):
    """The pairwise reward model (paper stage 1). `margin` and `centering` (0 is the paper's loss) are options."""

    model: str = "small"
    margin: NonNegative = 0.0
    centering: NonNegative = 0.0
    held_out: NonNegativeInt = 500
    reference_samples: PositiveInt = 512
    training: TrainingConfig = TrainingConfig()


class DemonstrationsConfig(Section):
    """Reward-model-guided self-play (paper stage 2); `n: 1` is plain self-play.

    `baseline` also plays without the reward model, for the ablation.
    """

    assistant: PromptedModel
    user: PromptedModel
    queries: PositiveInt = 10000
    n: PositiveInt = 4
    max_turns: PositiveInt = 2
    baseline: bool = True
    sampling: SamplingConfig = SamplingConfig()
    user_sampling: SamplingConfig = SamplingConfig()


class SftConfig(Section):
    """Supervised fine-tuning on the demonstrations, loss on assistant tokens only."""

    model: str = "small"
    training: TrainingConfig = TrainingConfig()


class PpoConfig(Section):
    """RLSF: PPO from the SFT policy against the reward model (paper stage 3)."""

    steps: PositiveInt = 100
    batch_size: PositiveInt = 64
    num_ppo_epochs: PositiveInt = 4
    num_mini_batches: PositiveInt = 1
    micro_batches: PositiveInt = 1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    critic: Literal["reward_model", "sft"] = "reward_model"
    value_learning_rate: Positive = 1e-5
    critic_warmup_steps: NonNegativeInt = 0
    max_prompt_length: PositiveInt = 512
    sampling: SamplingConfig = SamplingConfig()
    kl_coef: NonNegative = 0.05
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: Positive = 6.0
    kl_horizon: PositiveInt = 10000
    cliprange: Positive = 0.2
    cliprange_value: Positive = 0.2
    vf_coef: NonNegative = 0.1
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    normalize_reward: bool = True
    reward_clip: Positive = 10.0
    missing_eos_penalty: NonNegative = 1.0
    entropy_coef: NonNegative = 0.0
    checkpoint_every: PositiveInt = 20
    log_every: PositiveInt = 1
    sample_every: PositiveInt = 20

    @model_validator(mode="after")
    def _divides(self) -> "PpoConfig":
        if self.batch_size % (self.num_mini_batches * self.micro_batches):
            raise ValueError(
                f"ppo.batch_size {self.batch_size} must be divisible by num_mini_batches x micro_batches "
                f"= {self.num_mini_batches} x {self.micro_batches}"
            )
        return self


class EvaluationConfig(Section):
    """Evaluation against the gold score (micro-world only, elsewhere skipped) on held-out queries."""

    gold: bool = False
    queries: PositiveInt = 1000
    best_of: PositiveInt = 4
    curve_queries: PositiveInt = 400
    prompted: PromptedModel | None = None
    sampling: SamplingConfig = SamplingConfig()
    bootstrap_samples: PositiveInt = 2000


class ExperimentConfig(Section):
    """One experiment: the models, then one section per stage in the order in which they run.

    `models` maps names to sources: `microworld:small`, a checkpoint folder of ours or a Hugging Face folder.
    """

    name: str
    seed: NonNegativeInt = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = MeshConfig()
    models: dict[str, str]
    queries: QueriesConfig
    as_is_reward: AsIsRewardConfig
    comparisons: ComparisonsConfig
    filters: FiltersConfig = FiltersConfig()
    reward: RewardConfig
    demonstrations: DemonstrationsConfig
    sft: SftConfig
    ppo: PpoConfig
    evaluation: EvaluationConfig
