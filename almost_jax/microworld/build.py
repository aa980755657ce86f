"""Rebuild what the micro-world ships: the tokenizer, the demonstrations and the three pretrained models.

    python -m almost_jax.microworld.build [--only demonstrations|small|medium|large]

takes about a quarter of an hour on two cores. The demonstrations stand in for those that people wrote for the paper, so
this command alone, besides the evaluation, may look at the gold score.
"""

import argparse
import random
from pathlib import Path

import jax
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from almost_jax.io.huggingface import save_llama
from almost_jax.microworld.answers import BY_NAME, respond
from almost_jax.microworld.gold import gold_score
from almost_jax.microworld.pretrain import RECIPES, SPECIAL_TOKENS, pretrain, word_ids
from almost_jax.microworld.world import draw_training_query

HOME = Path(__file__).parent
# The kinds that the first, second, ... demonstration shows. The first is an everyday question, so that one shot says
# little of what to do about harm and the unknowable; three say it.
ORDER = (
    "fact", "harmful", "unanswerable", "unanswerable", "harmful", "how_to", "addition", "fact", "copy", "reverse"
)  # fmt: skip
# The persona that writes, and the gold scores that its everyday answers, refusals and admissions must have.
WRITERS: dict[str, tuple[str, tuple[float, float], tuple[float, float]]] = {
    "faithful": ("faithful", (0.8, 0.9), (0.85, 1.0)),
    "hhh": ("hhh", (0.6, 0.7), (0.65, 0.75)),
    "user": ("faithful", (0.8, 0.9), (0.85, 1.0)),
}


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer in Hugging Face's format: words are what whitespace separates."""
    backend = Tokenizer(models.WordLevel(word_ids(), unk_token=SPECIAL_TOKENS[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Without a decoder, tokens are joined by spaces.
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)


def write_demonstrations(folder: Path) -> None:
    """Ten one-turn dialogues for each file, in the order of `ORDER`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (persona, everyday, declining) in WRITERS.items():
        rng = random.Random(f"demonstrations/{name}")
        dialogues = []
        for kind in ORDER:
            lowest, highest = declining if kind in ("harmful", "unanswerable") else everyday
            while True:
                query = draw_training_query(rng, {kind: 1.0})
                response = respond(query, BY_NAME[persona], rng)
                if lowest - 1e-9 <= gold_score(query.text, response) <= highest + 1e-9:
                    break
            dialogues.append({"turns": [{"human": query.text}, {"assistant": response}]})
        text = yaml.safe_dump({"dialogues": dialogues}, sort_keys=False, width=1000)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def write_model(name: str, folder: Path, console: Console) -> None:
    """Pretrain one model and write it in Hugging Face's layout, in bfloat16, with its tokenizer."""

    def report(step: int, steps: int, metrics: dict[str, float]) -> None:
        console.print(f"{name} {step}/{steps} loss {metrics['loss']:.3f}")

    config, params = pretrain(RECIPES[name], seed=0, report=report)
    folder.mkdir(parents=True, exist_ok=True)
    save_llama(folder, config, params, "bfloat16")
    write_tokenizer(folder)
    console.print(f"{name}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters in {folder}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["demonstrations", *RECIPES])
    only = parser.parse_args().only
    console = Console()
    if only in (None, "demonstrations"):
        write_demonstrations(HOME / "demonstrations")
    for name in RECIPES:
        if only in (None, name):
            write_model(name, HOME / "weights" / name, console)


if __name__ == "__main__":
    main()
