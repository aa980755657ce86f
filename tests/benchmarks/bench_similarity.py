"""Near-duplicates by ROUGE-L: our pool against the rouge-score package, pair by pair, with the same verdicts.

    make bench

Requests are made from our own seeds: halves of two of them, some words exchanged, so that a few in a hundred are near
duplicates as they are when a model writes them. Ours takes them one after another, as Self-Instruct does: each is
compared with all that are in the pool, then added. The package compares a sample of the same pairs, since all of them
would take it hours; its tokens are prepared once for either side's texts. Prints one JSON object.
"""

import json
import random
import time

from rouge_score import rouge_scorer, scoring, tokenizers

from almost_jax.config import SelfInstructConfig
from almost_jax.stages.instructions import load_instructions
from almost_jax.stages.similarity import SimilarityPool

SIZES, SAMPLE, WORDS_EXCHANGED = (1_000, 3_000, 10_000), 3_000, 3


def make_requests(count: int, seed: int) -> list[str]:
    """So many requests, mixed from the project's own."""
    rng = random.Random(seed)
    known = [text.split() for name in ("seed_instructions", "held_out_questions") for text in load_instructions(name)]
    found = []
    for _ in range(count):
        first, second = rng.choice(known), rng.choice(known)
        words = first[: len(first) // 2 + 1] + second[len(second) // 2 :]
        for _ in range(WORDS_EXCHANGED):
            words[rng.randrange(len(words))] = rng.choice(rng.choice(known))
        found.append(" ".join(words))
    return found


def main() -> None:
    """Time both sides, check that they agree on the sample, and print the rates."""
    threshold = SelfInstructConfig().max_similarity
    requests = make_requests(max(SIZES), seed=0)
    ours, found = [], []
    for size in SIZES:
        pool = SimilarityPool()
        found = []
        start = time.perf_counter()
        for text in requests[:size]:
            found.append(pool.most_similar(text, threshold))
            pool.add(text)
        seconds = time.perf_counter() - start
        pairs = size * (size - 1) // 2
        ours.append({"requests": size, "seconds": round(seconds, 3), "pairs_per_second": round(pairs / seconds)})

    # The package's own tokens and score, without tokenizing a text anew for each of its pairs.
    tokenizer = tokenizers.DefaultTokenizer(use_stemmer=False)
    tokens = [tokenizer.tokenize(text) for text in requests]
    rng = random.Random(1)
    # Half of the sample are pairs that our side calls similar, so that agreement is tested where it can fail.
    similar = [(place, match) for place, match in enumerate(found) if match is not None]
    sample = [(place, match[0]) for place, match in rng.sample(similar, min(len(similar), SAMPLE // 2))]
    while len(sample) < SAMPLE:
        place = rng.randrange(1, len(requests))
        sample.append((place, rng.randrange(place)))
    start = time.perf_counter()
    scores = [package_rouge_l(tokens[earlier], tokens[place]) for place, earlier in sample]
    seconds = time.perf_counter() - start
    for (place, earlier), score in zip(sample, scores, strict=True):
        match = found[place]
        if match is not None and match[0] == earlier:
            assert score == match[1], (requests[place], requests[earlier], score, match)
        else:
            # Nothing that the package finds more similar may have been passed over.
            assert score <= (threshold if match is None else match[1]), (requests[place], requests[earlier], score)
    theirs = SAMPLE / seconds
    result = {
        "ours": ours,
        "rouge_score_pairs_per_second": round(theirs),
        "times_as_fast": round(ours[-1]["pairs_per_second"] / theirs),
        "near_duplicates": sum(match is not None for match in found),
        "pairs_checked_against_rouge_score": SAMPLE,
    }
    print(json.dumps(result, indent=1))


def package_rouge_l(target: list[str], prediction: list[str]) -> float:
    """ROUGE-L F-measure by the package."""
    score: scoring.Score = rouge_scorer._score_lcs(target, prediction)
    return float(score.fmeasure)


if __name__ == "__main__":
    main()
