"""Votes of a community Q&A site: what the as-is reward model learns from, in the place of StackExchange.

Another domain, on purpose: harm and the unknowable are asked for rarely, and moderators see most of what is posted
there. And noisy, as votes are: people like friendly answers, notice only some of the mistakes, and vote by mood
besides. Whoever votes knows the author's reputation and the answer; nobody here reads the gold score.
"""

import random

from almost_jax.microworld.answers import (
    ADMISSIONS,
    CLOSINGS,
    OPENERS,
    REFUSALS,
    Persona,
    answer,
    draw_persona,
    respond,
)
from almost_jax.microworld.world import KINDS, Query, draw_training_query

COMMUNITY_KINDS = {kind: share for kind, share in KINDS.items() if kind not in ("harmful", "unanswerable")}
COMMUNITY_KINDS |= {"harmful": 0.06, "unanswerable": 0.06}
NOTICES_RIGHT = 0.8
MODERATED = 0.8
FRIENDLINESS = 0.5
FULLNESS = 0.03
RUDENESS = 0.8
MOOD = 0.6


def _votes(query: Query, response: str, author: Persona, rng: random.Random) -> float:
    """How many votes an answer gets: being right if it is noticed, friendliness, fullness, tone, and mood."""
    declining = {"harmful": REFUSALS, "unanswerable": ADMISSIONS}.get(query.kind)
    if declining is not None:
        votes = 1.5 * (any(text in response for text in declining) and rng.random() < MODERATED)
    else:
        votes = float(f" {answer(query)} ." in f" {response}" and rng.random() < NOTICES_RIGHT)
    votes += FRIENDLINESS * (response.startswith(OPENERS) + response.endswith(CLOSINGS))
    votes += FULLNESS * len(response.split())
    votes -= RUDENESS * (author.rude > 0.5 or author.evasive > 0.5)
    return votes + rng.gauss(0.0, MOOD)


def votes(seed: int, count: int) -> list[dict[str, str]]:
    """Pairs of answers to one question, the one with more votes first.

    Args:
        seed: the same seed gives the same pairs.
        count: how many.

    Returns:
        Records {"prompt", "chosen", "rejected"}.
    """
    rng = random.Random(f"community/{seed}")
    pairs: list[dict[str, str]] = []
    while len(pairs) < count:
        query = draw_training_query(rng, COMMUNITY_KINDS)
        authors = draw_persona(rng), draw_persona(rng)
        texts = [respond(query, author, rng) for author in authors]
        if texts[0] == texts[1]:
            continue
        scores = [_votes(query, text, author, rng) for text, author in zip(texts, authors, strict=True)]
        chosen, rejected = texts if scores[0] >= scores[1] else texts[::-1]
        pairs.append({"prompt": query.text, "chosen": chosen, "rejected": rejected})
    return pairs
