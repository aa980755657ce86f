"""Sampling from SmolLM2-135M, a real vocabulary of 49,152 and a real tokenizer, by the programs that users run."""

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from almost_jax.commands import invariants
from almost_jax.core.llama import hidden_states, logits
from almost_jax.io.models import Model, load_model
from almost_jax.io.transfer import host_mesh, import_model
from almost_jax.sampling.engine import Engine, generate
from almost_jax.sampling.requests import Completion, Request, Settings
from almost_jax.sampling.rules import SamplingRules, nucleus
from almost_jax.sampling.scoring import completion_logprobs
from almost_jax.sampling.selection import best_of
from almost_jax.sampling.stops import StopStrings

_spec = importlib.util.spec_from_file_location("greedy_table", Path(__file__).parents[1] / "io" / "greedy_table.py")
assert _spec is not None and _spec.loader is not None
greedy_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(greedy_table)

pytestmark = pytest.mark.slow
PREFIX = (
    "Human: What is the capital of France?\n\nAssistant: Paris.\n\n"
    "Human: Who wrote Hamlet?\n\nAssistant: Shakespeare.\n\n"
)
QUESTIONS = (
    "Human: Name a river in Africa.\n\nAssistant:",
    "Human: How do I boil an egg? I have a pan, water and five minutes.\n\nAssistant:",
    "Human: Hi\n\nAssistant:",
    "Human: Tell me a story about a fox and a crow, and let it end well.\n\nAssistant:",
    "Human: What is 17 + 25?\n\nAssistant:",
)
USUAL = Settings(slots=4, steps_per_wake=8, refill=True, prefill_tokens=2048)


@pytest.fixture(scope="module", autouse=True)
def _compiled_as_for_users() -> Iterator[None]:
    """The suite turns most of the compiler off; rounding is that of programs that nobody runs then."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    file = greedy_table.find_file()
    if file is None:
        pytest.skip("make smollm2 fetches the model")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    import_model(str(file), folder, None)
    return load_model(str(folder), host_mesh(), "float32")


def rules(temperature: float = 1.0, tokens: int = 24, **more: Any) -> SamplingRules:
    return SamplingRules(temperature, more.get("top_p", 1.0), more.get("top_k", 0), tokens, (0, 2))


def requests(model: Model, samples: int = 1) -> list[Request]:
    encode = model.tokenizer.encode
    return [Request(f"{n}/{i}", tuple(encode(text))) for n, text in enumerate(QUESTIONS) for i in range(samples)]


def run(
    model: Model, asked: list[Request], drawn: SamplingRules, settings: Settings = USUAL, **more: Any
) -> list[Completion]:
    found = generate(
        model.params, model.config, asked, drawn, settings, seed=7, prefix_tokens=more.pop("prefix", ()), **more
    )
    return list(found)


def test_03_06_greedy_with_a_shared_prefix_is_greedy_without_and_uncached(model: Model) -> None:
    prefix, asked = tuple(model.tokenizer.encode(PREFIX)), requests(model)
    shared = run(model, asked, rules(0.0), prefix=prefix)
    alone = run(model, [dataclasses.replace(one, prompt=prefix + one.prompt) for one in asked], rules(0.0))
    assert [one.tokens for one in shared] == [one.tokens for one in alone]
    forward = jax.jit(lambda p, t: logits(p, model.config, hidden_states(p, model.config, t)))
    for one, request in zip(shared, asked, strict=True):
        row = [*prefix, *request.prompt, *one.tokens]
        padded = np.zeros((1, 192), np.int32)
        padded[0, : len(row)] = row
        scores = np.asarray(forward(model.params, padded))[0, len(row) - len(one.tokens) - 1 : len(row) - 1]
        assert tuple(scores.argmax(axis=1).tolist()) == one.tokens
        logprobs = scores.max(axis=1) - np.log(np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1))
        logprobs -= scores.max(axis=1)
        np.testing.assert_allclose(one.logprobs, logprobs, atol=1e-4)


def test_06_samples_depend_on_seed_and_id_alone(model: Model) -> None:
    prefix, asked = tuple(model.tokenizer.encode(PREFIX)), requests(model, samples=6)
    expected = run(model, asked, rules(), prefix=prefix)
    tokens = {one.id: one.tokens for one in expected}
    for settings in (
        Settings(slots=1, steps_per_wake=8, refill=True, prefill_tokens=2048),
        Settings(slots=13, steps_per_wake=3, refill=True, prefill_tokens=64),
        Settings(slots=32, steps_per_wake=8, refill=False, prefill_tokens=2048),
    ):
        for part in (asked[::-1], asked[1::3]):
            found = run(model, part, rules(), settings, prefix=prefix)
            assert [one.tokens for one in found] == [tokens[one.id] for one in part], settings


def test_04_07_logprobs_equal_rescoring_in_any_batch(model: Model) -> None:
    prefix, asked = tuple(model.tokenizer.encode(PREFIX)), requests(model, samples=2)
    done = run(model, asked, rules(0.7), prefix=prefix)
    prompts = [[*prefix, *one.prompt] for one in asked]
    rows = [one.tokens for one in done]
    together = completion_logprobs(
        model.params, model.config, prompts, rows, temperature=0.7, batch_size=8, multiple=16
    )
    for one, again in zip(done, together, strict=True):
        np.testing.assert_allclose(one.logprobs, again, atol=1e-4)
    for place in (0, 3):
        single = completion_logprobs(
            model.params, model.config, prompts[place : place + 1], rows[place : place + 1],
            temperature=0.7, batch_size=1, multiple=64,
        )  # fmt: skip
        # Logits of 20 to 30 over a temperature of 0.7 are told apart by 2e-6 to 4e-6 themselves: programs of other
        # shapes differ by 1.5e-5 here (1e-5 holds on the tiny models).
        np.testing.assert_allclose(single[0], together[place], atol=3e-5)


def test_08_stop_strings_of_a_real_tokenizer_are_cut_exactly(model: Model) -> None:
    decode, asked = model.tokenizer.decode_behind, requests(model, samples=3)
    free = run(model, asked, rules(tokens=40))
    texts = [decode(one.content) for one in free]
    # From the middle of one word to the middle of the next.
    stops = tuple({text[9:15] for text in texts if len(text) > 30})
    assert len(stops) > 5
    for k in (1, 8):
        settings = dataclasses.replace(USUAL, steps_per_wake=k)
        stopped = run(model, asked, rules(tokens=40), settings, stops=StopStrings(stops, decode))
        for one, other in zip(stopped, free, strict=True):
            grown = [decode(other.content[:count]) for count in range(len(other.content) + 1)]
            held = [count for count, text in enumerate(grown) if any(stop in text for stop in stops)]
            assert one.tokens == (other.tokens[: held[0]] if held else other.tokens)
            assert (one.finish == "stop_string") == bool(held)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.8), (40, 0.95)])
def test_09_first_tokens_pass_chi_square(model: Model, top_k: int, top_p: float) -> None:
    count, prompt = 1500, tuple(model.tokenizer.encode(QUESTIONS[0]))
    drawn = rules(1.3, 1, top_k=top_k, top_p=top_p)
    settings = Settings(slots=60, steps_per_wake=8, refill=True, prefill_tokens=2048)
    done = run(model, [Request(str(n), prompt) for n in range(count)], drawn, settings)
    seen = np.bincount([one.tokens[0] for one in done], minlength=model.config.vocab_size)
    row = np.asarray([prompt], np.int32)
    scores = np.asarray(logits(model.params, model.config, hidden_states(model.params, model.config, row)))[:, -1] / 1.3
    keep = np.asarray(nucleus(jax.numpy.asarray(scores), drawn))[0]
    assert seen[~keep].sum() == 0
    expected = np.where(keep, np.exp(scores[0].astype(np.float64) - scores.max()), 0.0)
    expected *= count / expected.sum()
    large = expected >= 5
    cells = [np.append(own[large], own[~large].sum()) for own in (seen, expected)]
    if cells[1][-1] < 5:
        cells = [own[:-1] for own in cells]
        cells[1] = cells[1] * cells[0].sum() / cells[1].sum()
    assert len(cells[0]) > 10 and stats.chisquare(*cells).pvalue > 1e-3


def test_10_11_samples_differ_and_the_best_is_the_same_in_any_order(model: Model) -> None:
    asked = requests(model, samples=8)
    done = run(model, asked, rules(tokens=16))
    for n in range(len(QUESTIONS)):
        texts = [model.tokenizer.decode(one.content) for one in done if one.id.startswith(f"{n}/")]
        assert len(set(texts)) >= 7
        scores = [float(len(text) % 5) for text in texts]
        best = texts[best_of(texts, scores)]
        for turn in range(1, 8):
            turned = texts[turn:] + texts[:turn]
            assert turned[best_of(turned, scores[turn:] + scores[:turn])] == best


def test_doctor_finds_nothing(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [invariants.check_tokenizer(model.tokenizer), invariants.check_stops(model.tokenizer)]
    with jax.default_matmul_precision("highest"):
        checks += [check(model) for check in invariants.CHECKS.values()]
    assert [json.dumps(dataclasses.asdict(check)) for check in checks if check.outcome != "pass"] == []


def test_a_refill_reads_the_prefix_once(model: Model) -> None:
    prefix, asked = tuple(model.tokenizer.encode(PREFIX)), requests(model, samples=4)
    engine = Engine(model.params, model.config, rules(tokens=8), USUAL, seed=1, prefix_tokens=prefix)
    assert len(list(engine.run(asked))) == len(asked)
    read = sum(len(one.prompt) for one in asked[::4])
    assert len(prefix) + read <= engine.stats.prefill_tokens <= len(prefix) + 3 * read
