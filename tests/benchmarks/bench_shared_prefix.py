"""A shared few-shot prefix against the same prefix as part of every prompt, on the micro-world's large model.

    make bench

Both sides answer the same queries greedily, for the same number of tokens, in turn, after one round that compiles; the
figures are medians, and the ratio is that of the two medians. Prints one JSON object.
"""

import json
import statistics
import time

from almost_jax.config import MeshConfig
from almost_jax.core.partitioning import make_mesh
from almost_jax.io.models import load_model
from almost_jax.microworld.world import generate_queries
from almost_jax.sampling.engine import Request, Settings, generate
from almost_jax.sampling.rules import SamplingRules
from almost_jax.stages.templates import few_shot_prefix, load_demonstrations, query_prompt

ROUNDS, QUERIES, NEW_TOKENS, SHOTS = 5, 128, 24, 3


def main() -> None:
    """Time both sides and print the rates."""
    model = load_model("microworld:large", make_mesh(MeshConfig()), "float32")
    prefix = model.tokenizer.encode(few_shot_prefix(load_demonstrations("microworld:faithful"), SHOTS))
    texts = generate_queries(0, QUERIES, "training")
    own = [model.tokenizer.encode(query_prompt([{"role": "human", "text": text}], "assistant")) for text in texts]
    # No stop tokens: both sides draw the same number of tokens.
    rules = SamplingRules(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=NEW_TOKENS, stop_tokens=())

    def seconds(shared: list[int], prompts: list[list[int]]) -> float:
        requests = [Request(str(index), tuple(prompt)) for index, prompt in enumerate(prompts)]
        start = time.perf_counter()
        count = sum(
            len(done.tokens)
            for done in generate(
                model.params, model.config, requests, rules, Settings(QUERIES, NEW_TOKENS, True, 4096),
                seed=0, prefix_tokens=shared,
            )
        )  # fmt: skip
        assert count == QUERIES * NEW_TOKENS
        return time.perf_counter() - start

    sides = {"shared": (prefix, own), "recomputed": ([], [prefix + prompt for prompt in own])}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, side in sides.items():
            elapsed = seconds(*side)
            if turn:
                times[name].append(elapsed)
    rates = {name: QUERIES * NEW_TOKENS / statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "benchmark": "shared_prefix",
                "prefix_tokens": len(prefix),
                "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
                "ratio": round(rates["shared"] / rates["recomputed"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
