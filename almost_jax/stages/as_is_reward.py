"""The as-is reward model: trained on community votes, it must agree with a synthetic comparison for that to be kept.

Source: ALMoST (arXiv 2305.13735), section 2.2: 20k pairs of a question-and-answer site, the higher-voted answer being
preferred.
"""

import os
from pathlib import Path
from typing import Any

from almost_jax.errors import InputError
from almost_jax.io.paths import local_path
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.microworld import community
from almost_jax.stages.reward import Pair, make_pair, train_reward_model
from almost_jax.stages.votes import HUB, hub_votes


def run_stage(run: Run) -> dict[str, Any]:
    """Train on votes, the config's or the micro-world's -> as_is_reward/model; nothing with `votes: none`.

    Raises:
        InputError: the votes can't be read.
    """
    config = run.config.as_is_reward
    if config.votes == "none":
        run.say("as_is_reward: as_is_reward.votes is none, so there is no as-is reward model and no filter by it")
        return {"votes": "none"}
    if config.votes == "microworld":
        pairs = [vote_pair(vote, "votes") for vote in community.votes(run.seed("as_is_reward/votes"), config.pairs)]
    elif config.votes.startswith(HUB):
        records = hub_votes(config.votes, config.pairs, run.seed("as_is_reward/votes"))
        pairs = [vote_pair(record, f"{config.votes}: pair {place}") for place, record in enumerate(records, start=1)]
    else:
        pairs = load_votes(local_path(config.votes))[: config.pairs]
        if not pairs:
            raise InputError(f"as_is_reward.votes: {config.votes} holds no pair; it needs `chosen` and `rejected`")
    alike = sum(pair.chosen == pair.rejected for pair in pairs)
    if alike == len(pairs):
        raise InputError(f"as_is_reward.votes: both texts are the same in each of {alike} pairs of {config.votes}")
    if alike:
        run.say(f"as_is_reward: {alike} of {len(pairs)} pairs are left out, whose texts are the same")
        pairs = [pair for pair in pairs if pair.chosen != pair.rejected]
    return train_reward_model(
        run,
        "as_is_reward",
        config.model,
        pairs,
        held_out=config.held_out,
        reference_samples=run.config.reward.reference_samples,
        margin=0.0,
        centering=0.0,
        training=config.training,
        packed_length=config.packed_length,
    )


def load_votes(path: Path) -> list[Pair]:
    """Pairs from a jsonl file of {"chosen", "rejected"} and, if these are bare responses, "prompt".

    Raises:
        InputError: the file can't be read, or a line lacks a text.
    """
    return [vote_pair(record, f"{path}: record {number}") for number, record in enumerate(read_records(path), start=1)]


def vote_pair(record: dict[str, Any], where: str) -> Pair:
    """One vote as a pair; without a prompt its texts are whole dialogues, grouped by what these begin with.

    That is the first turn, since a dialogue may stand in several pairs, at several depths; where no label ends it, the
    first line if both texts have it. A prompt that is null is none.

    Raises:
        InputError: a text is missing, or something else than a text.
    """
    prompted = record.get("prompt") is not None
    for field in ("chosen", "rejected", *(["prompt"] if prompted else [])):
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise InputError(f"{where}: `{field}` must be a text that is not empty, not {record.get(field)!r}")
    chosen, rejected = record["chosen"].strip(), record["rejected"].strip()
    if prompted:
        prompt = record["prompt"].strip()
        return make_pair(prompt, prompt, chosen, rejected)
    common = os.path.commonprefix([chosen, rejected])
    label = "Assistant:"
    opening = [common.split(mark)[0].strip() for mark in (label, "\n") if mark in common]
    shared = common.rindex(label) + len(label) if label in common else 0
    group = next(filter(None, opening), chosen)
    return Pair(group, chosen, rejected, len(chosen) - shared, len(rejected) - shared)
