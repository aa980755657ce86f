r"""The pairwise reward model: a language model with a scalar head, trained on comparisons for one epoch.

Its input is beginning of text, `"Human: {q}\n\nAssistant: {r}"`, end of text; its score is read at the end of text. A
pair's two texts go through the model in one forward pass. The as-is reward model (`as_is_reward.py`) is trained by the
same function on other pairs. Source: ALMoST (arXiv 2305.13735), section 2.2; the loss is Ouyang et al. 2022, eq. 1.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np

from almost_jax.config import TrainingConfig
from almost_jax.core.heads import add_head
from almost_jax.core.llama import Params
from almost_jax.core.partitioning import platform, replicated, row_parts
from almost_jax.errors import InputError
from almost_jax.io.batches import batch_indices, epoch_order
from almost_jax.io.models import Model, load_model, save_model
from almost_jax.io.records import iter_records, read_records, write_bytes
from almost_jax.io.run import Run
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.sampling.layout import decode_layout
from almost_jax.sampling.scoring import score_sequences
from almost_jax.stages.dialogues import dialogue_tokens, text_tokens
from almost_jax.stages.execution import judging_shape, training_shape
from almost_jax.stages.filters import count_verdicts
from almost_jax.stages.pair_figures import logged_figures, pair_figures
from almost_jax.stages.pair_rows import PairTokens, TwoTexts, packed_rows, pair_batch, pair_loss_sums, say_of_packing
from almost_jax.stages.templates import Turn, render
from almost_jax.stages.training import (
    LENGTH_MULTIPLE,
    count_steps,
    fit,
    fixed_length,
    row_limit,
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two texts of which the first is preferred.

    `group` is what the pair is about: pairs of one group are all trained on or all held out. `chosen` and `rejected`
    are whole dialogues as text; `chosen_length` and `rejected_length` count the characters of the responses alone.
    """

    group: str
    chosen: str
    rejected: str
    chosen_length: int
    rejected_length: int


class RewardScorer:
    """Normalised scores of dialogues under a reward model.

    A row that is longer than the model's positions is scored by its end, as many tokens as there are positions.

    Args:
        model: the reward model.
        batch_size: rows per forward pass.
        say: told of the first row that is too long, in one line.

    Raises:
        InputError: the model is a policy.
    """

    def __init__(self, model: Model, batch_size: int, say: Callable[[str], None]) -> None:
        if model.kind != "reward":
            raise InputError(f"model {model.name!r} is a {model.kind}, but scoring needs a reward model")
        self.model = model
        self.batch_size = batch_size
        self._say, self._said = say, False
        platform = next(iter(jax.tree.leaves(model.params)[0].devices())).platform
        self._params, self._config = decode_layout(model.params, model.config, platform)

    def score(self, dialogues: Sequence[Sequence[Turn]]) -> np.ndarray:
        """Score each dialogue's last turn in the light of what came before.

        Args:
            dialogues: n dialogues that end with an assistant turn. An empty response has a score too, that of ending at
                once; a dialogue without turns has none.

        Returns:
            [n] float32: mean 0 and standard deviation 1 over the model's reference samples.

        Raises:
            ValueError: a dialogue doesn't end with an assistant turn.
        """
        for dialogue in dialogues:
            if not dialogue or dialogue[-1]["role"] != "assistant":
                raise ValueError("only dialogues that end with an assistant turn have a score")
        return self.score_tokens([dialogue_tokens(self.model.tokenizer, dialogue) for dialogue in dialogues])

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Score rows of token ids that end with the end of text: [n] float32, normalised."""
        if not sequences:
            return np.zeros((0,), np.float32)
        positions, longest = self.model.config.max_position_embeddings, max(map(len, sequences))
        if longest > positions and not self._said:
            self._said = True
            self._say(
                f"a dialogue of {longest} tokens is longer than the {positions} positions of the reward model "
                f"{self.model.name}: it, and others like it, are scored by their last {positions}"
            )
        rows = [row[-positions:] for row in sequences]
        raw = score_sequences(
            self._params, self._config, rows, batch_size=self.batch_size, multiple=LENGTH_MULTIPLE
        )
        return normalize(raw, self.model.reward_mean, self.model.reward_std)


def normalize(raw: np.ndarray, mean: float, std: float) -> np.ndarray:
    """(raw - mean) / std in float32."""
    return ((raw.astype(np.float64) - mean) / std).astype(np.float32)


def reward_moments(raw: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation of raw scores [n].

    Raises:
        InputError: the scores are all the same, so that nothing can be normalised by them.
    """
    mean, std = float(raw.astype(np.float64).mean()), float(raw.astype(np.float64).std())
    if not std > 0:
        raise InputError(f"all {raw.size} reference samples have the score {mean}: the reward model learned nothing")
    return mean, std


def run_stage(run: Run) -> dict[str, Any]:
    """Train on the kept pairs: queries.jsonl and comparisons.jsonl -> reward/model.

    Raises:
        InputError: no pair was kept, or none fits into `reward.training.max_length`.
    """
    config = run.config.reward
    queries = {record["id"]: record["text"] for record in read_records(run.path("queries.jsonl"))}
    kept = [record for record in iter_records(run.path("comparisons.jsonl")) if record["kept"]]
    pairs = [comparison_pair(queries, record) for record in kept]
    check_any_kept(run, "reward", len(pairs))
    return train_reward_model(
        run,
        "reward",
        config.model,
        pairs,
        held_out=config.held_out,
        reference_samples=config.reference_samples,
        margin=config.margin,
        centering=config.centering,
        training=config.training,
        packed_length=config.packed_length,
    )


def check_any_kept(run: Run, stage: str, kept: int) -> None:
    """Refuse to train on comparisons none of which was kept.

    Raises:
        InputError: says how many pairs each filter dropped.
    """
    if not kept:
        counts = count_verdicts(iter_records(run.path("comparisons.jsonl")))
        pairs, _ = counts.pop("pairs"), counts.pop("kept")
        dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "there were none"
        raise InputError(
            f"{stage}: no comparison to train on, the filters kept none of {pairs} pairs ({dropped}); look at "
            "responses.jsonl, and loosen `filters`"
        )


def comparison_pair(queries: dict[str, str], record: dict[str, Any]) -> Pair:
    """A record of comparisons.jsonl as a pair, grouped by its query.

    Raises:
        InputError: the query isn't among the given ones.
    """
    query_id = record["query_id"]
    if query_id not in queries:
        raise InputError(f"comparisons.jsonl: query_id {query_id!r} is not in queries.jsonl; run both stages again")
    return make_pair(query_id, queries[query_id], record["chosen"]["text"], record["rejected"]["text"])


def make_pair(group: str, query: str, chosen: str, rejected: str) -> Pair:
    """A pair of responses to one query."""

    def dialogue(response: str) -> str:
        return render([{"role": "human", "text": query}, {"role": "assistant", "text": response}])

    return Pair(group, dialogue(chosen), dialogue(rejected), len(chosen), len(rejected))


def split_pairs(pairs: Sequence[Pair], held_out: int, seed: int, section: str) -> tuple[list[Pair], list[Pair]]:
    """Split into training and held-out pairs, group by group.

    Args:
        pairs: any pairs; a group's pairs stay together.
        held_out: at least so many pairs are held out, the last group with all of its pairs.
        seed: orders the groups, together with their names alone: another pair more or less doesn't reorder the rest.
        section: the config's that has `held_out`, for messages.

    Raises:
        InputError: nothing is left to train on.
    """
    sizes = Counter(pair.group for pair in pairs)
    kept_out: set[str] = set()
    taken = 0
    for group in sorted(sizes, key=lambda group: place_of_group(group, seed)):
        if taken >= held_out:
            break
        kept_out.add(group)
        taken += sizes[group]
    train, test = parted(pairs, kept_out)
    if not train:
        raise InputError(f"{section}.held_out: {held_out} leaves none of {len(pairs)} pairs; hold out fewer")
    return train, test


def place_of_group(group: str, seed: int) -> bytes:
    """What groups are ordered by to hold some out: of the seed and the name alone."""
    return hashlib.sha256(f"{seed}/{group}".encode()).digest()


def parted(pairs: Sequence[Pair], held_out: Set[str]) -> tuple[list[Pair], list[Pair]]:
    """The pairs of all other groups, and those of the groups that are held out."""
    return (
        [pair for pair in pairs if pair.group not in held_out],
        [pair for pair in pairs if pair.group in held_out],
    )


def train_reward_model(
    run: Run,
    name: str,
    model_name: str,
    pairs: Sequence[Pair],
    *,
    held_out: int | frozenset[str],
    reference_samples: int,
    margin: float,
    centering: float,
    training: TrainingConfig,
    packed_length: int,
    steps: int | None = None,
    seeds: str | None = None,
    section: str | None = None,
) -> dict[str, Any]:
    """Train a reward model on pairs and save it with the moments of its scores.

    Args:
        run: the run.
        name: the stage: its folder gets model/, checkpoints/, metrics.jsonl and evaluation.json.
        model_name: the config's name of the vanilla model to start from.
        pairs: all pairs, held-out ones included.
        held_out: how many pairs to hold out for accuracy, or the groups whose pairs are.
        reference_samples: how many texts of the training pairs the scores are normalised on.
        margin, centering: options of the loss, see `core.losses.pairwise_sums`; 0 is the paper's.
        training: epochs, batch size, optimizer.
        packed_length: of the rows that a batch's pairs are packed into; 0 gives each text a row of its own.
        steps: of training, instead of `training.epochs`.
        seeds: the name whose seeds split, head, batches and reference are drawn from, instead of the stage's.
        section: where the config has all this, for messages, if not in a section that is called like the stage.

    Returns:
        The summary, which evaluation.json holds too: numbers of pairs, and `pair_figures` on the held-out ones.

    Raises:
        InputError: no pair is left to train on; names the key.
    """
    source = run.model_to_train(model_name)
    tokenizer = source.tokenizer
    seeds, section = seeds or name, section or name
    fitting, rows, longest = _tokenized(tokenizer, pairs, row_limit(training, source.config), section)
    if isinstance(held_out, int):
        train, test = split_pairs(fitting, held_out, run.seed(f"{seeds}/split"), section)
    else:
        train, test = parted(fitting, held_out)
    run.say(f"{name}: {len(train)} pairs to train on, {len(test)} held out, {len(pairs) - len(fitting)} too long")
    length = fixed_length(longest)
    batches_seed, batch_size = run.seed(f"{seeds}/batches"), training.batch_size
    settings, mesh = run.config.mesh, run.mesh
    total_steps = steps or count_steps(training, len(train))
    shape = training_shape(source.config, settings, mesh)

    def texts_at(step: int) -> list[TwoTexts]:
        chosen = [train[index] for index in batch_indices(step, batch_size, len(train), batches_seed)]
        return [(rows[pair.chosen], rows[pair.rejected]) for pair in chosen]

    def pairs_at(step: int) -> list[PairTokens]:
        return list(itertools.starmap(PairTokens.scored, texts_at(step)))

    if packed_length:
        # A number of rows that every device and every micro-batch can have its share of.
        split = training.micro_batches * row_parts(mesh)
        packed, spent = packed_rows(pairs_at, total_steps, packed_length, split, shape.attention != "splash")
        say_of_packing(run, name, packed, spent, batch_size, length)

    def batch_at(step: int) -> dict[str, np.ndarray]:
        if packed_length:
            return packed.batch(pairs_at(step), tokenizer.pad_id)
        return pair_batch(texts_at(step), length, tokenizer.pad_id)

    def scores(params: Params, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0,), np.float32)
        flat, config = decode_layout(params, judging_shape(source.config, settings, mesh), platform())
        # A text stands in several pairs of its query.
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        found = score_sequences(
            flat, config, [rows[text] for text in places], batch_size=2 * batch_size, multiple=length
        )
        return found[[places[text] for text in texts]]

    def held_out_scores(params: Params) -> tuple[np.ndarray, np.ndarray]:
        found = scores(params, [text for pair in test for text in (pair.chosen, pair.rejected)])
        return found[::2], found[1::2]

    warned = False

    def evaluate(params: Params) -> dict[str, float]:
        nonlocal warned
        if not test:
            return {}
        chosen, rejected = held_out_scores(params)
        # The moments on reference samples are taken at the end alone.
        found = _held_out_figures(test, chosen - rejected, float(np.std([*chosen, *rejected])) or 1.0)
        if found.get("length_only") and not warned:
            warned = True
            key = f"{section if isinstance(held_out, int) else seeds}.held_out"
            run.say(f"{name}: warning: {length_warning(found, key)}")
        return logged_figures(found)

    loss_sums = functools.partial(pair_loss_sums, config=shape, margin=margin, centering=centering)
    with jax.set_mesh(mesh):
        params = start_params(source, run.seed(f"{seeds}/head"), mesh)
        state = fit(run, name, params, source.config, loss_sums, batch_at, total_steps, training, evaluate)
        reference = reference_texts(train, reference_samples, run.seed(f"{seeds}/reference"))
        mean, std = reward_moments(scores(state.params, reference))
        chosen, rejected = held_out_scores(state.params)
    model = dataclasses.replace(
        source,
        params=state.params,
        kind="reward",
        reward_mean=mean,
        reward_std=std,
        name=f"{run.config.name}/{name}",
        # Whatever the source says of itself: `text_tokens` put the end of text there.
        score_at_end=True,
    )
    save_model(run.path(name, "model"), model)
    summary = {
        "pairs": len(train),
        "too_long": len(pairs) - len(fitting),
        "steps": total_steps,
        "reward_mean": mean,
        "reward_std": std,
        **_held_out_figures(test, chosen - rejected, std),
    }
    if packed_length:
        # The share of what the packed steps compute on that is no padding.
        summary["fill"] = spent.tokens / spent.places
    write_bytes(run.path(name, "evaluation.json"), (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def start_params(source: Model, seed: int, mesh: jax.sharding.Mesh) -> Params:
    """The vanilla model's tree with a fresh head, normal(1 / sqrt(D + 1)) as in Stiennon et al. 2020.

    A zero head would hold back the gradient of everything below it for as long as small steps need to move it.
    """
    stddev = (source.config.hidden_size + 1) ** -0.5
    params = add_head(source.params, source.config, jax.random.key(seed), stddev)
    return {**params, "score": jax.device_put(params["score"], replicated(mesh))}


def reference_texts(train: Sequence[Pair], count: int, seed: int) -> list[str]:
    """The texts whose scores the model is normalised on: `count` of those in the training pairs, chosen by `seed`."""
    texts = list(dict.fromkeys(text for pair in train for text in (pair.chosen, pair.rejected)))
    return [texts[index] for index in epoch_order(seed, 0, len(texts))[:count]]


def load_reward_model(run: Run, name: str, alone: bool = False) -> Model:
    """The model that a reward stage has saved: on the mesh for sampling where it scores `alone`, else on `run.mesh`.

    Raises:
        InputError: it is missing, damaged or not a reward model.
    """
    if alone:
        model = run.load(name, "model")
    else:
        model = load_model(str(run.path(name, "model")), run.mesh, run.config.compute_dtype)
    if model.kind != "reward":
        raise InputError(f"{run.path(name, 'model')} is a {model.kind}; expected a reward model")
    return model


def _tokenized(
    tokenizer: Tokenizer, pairs: Sequence[Pair], max_length: int, section: str
) -> tuple[list[Pair], dict[str, list[int]], int]:
    """The pairs whose texts both fit, the tokens of every text, and the longest fitting text's length."""
    rows = {text: text_tokens(tokenizer, text) for pair in pairs for text in (pair.chosen, pair.rejected)}
    fitting = [pair for pair in pairs if max(len(rows[pair.chosen]), len(rows[pair.rejected])) <= max_length]
    if not fitting:
        raise InputError(f"{section}.training.max_length: none of {len(pairs)} pairs fits into {max_length} tokens")
    longest = max(len(rows[text]) for pair in fitting for text in (pair.chosen, pair.rejected))
    return fitting, rows, longest


def length_warning(figures: Mapping[str, Any], key: str) -> str:
    """What to say of a reward model that seems to have learned length alone.

    Args:
        figures: its `pair_figures`.
        key: the config's that says how many pairs are held out.
    """
    bounds = figures["length_matched_ci95"]
    matched = "no pair can be matched by length"
    if bounds is not None:
        matched = (
            f"with length taken out it is right in {figures['length_matched_accuracy']:.3f} of the pairs "
            f"(95% interval {bounds[0]:.3f} to {bounds[1]:.3f}), "
            f"which {'is worse than' if bounds[1] < 0.5 else 'may be'} chance"
        )
    lengths = "lengths of the votes' texts" if key.startswith("as_is") else "length rule of the filters"
    return (
        f"scores follow length (rank correlation {figures['length_correlation']:.2f}) and nothing else is shown: "
        f"{matched}; look at the {lengths}, or at {key} for more pairs to judge by"
    )


def _held_out_figures(test: Sequence[Pair], margins: np.ndarray, std: float) -> dict[str, Any]:
    if not test:
        return {"held_out": 0}
    gaps = np.array([pair.chosen_length - pair.rejected_length for pair in test])
    return pair_figures(margins / np.float32(std), gaps, [pair.group for pair in test])
