import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from almost_jax.config import SamplingConfig
from almost_jax.core.llama import LlamaConfig, init_params
from almost_jax.errors import InputError
from almost_jax.io.models import Model
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.sampling.engine import Completion
from almost_jax.stages.prompting import (
    DialogueRequest,
    Reply,
    Responder,
    cut,
    reply,
    stop_strings,
    stop_tokens,
)
from almost_jax.stages.templates import SEPARATOR, own_words, whole_sentences

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=9, batch_size=3)
DEMONSTRATIONS = "Human: q\n\nAssistant: q\n\n"
REQUEST = DialogueRequest("one", [{"role": "human", "text": "q"}])
SPECIAL = ["<pad>", "<bos>", "<eos>"]


def make_tokenizer(pieces: list[str]) -> Tokenizer:
    """A text is cut into `pieces`, tried in order, and put together again without spaces."""
    names = [*SPECIAL, *pieces]
    backend = Backend(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<pad>"))
    pattern = "|".join(re.escape(piece).replace("\\\n", "\\n") for piece in pieces)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    )


def scripted(tokenizer: Tokenizer, script: dict[str, str]) -> Model:
    """A LLaMA whose greedy next token depends on the current one alone: one-hot embeddings, layers of zeros."""
    size = tokenizer.vocab_size
    config = LlamaConfig(size, size, 5, 1, 2, 1, 4, max_position_embeddings=64)
    params: dict[str, Any] = init_params(config, jax.random.key(0))
    params["layers"] = jax.tree.map(jnp.zeros_like, params["layers"])
    params["embedding"] = jnp.eye(size)
    follows = jnp.zeros((size, size))
    for current, following in script.items():
        ids = [
            tokenizer.single_token(name) if name not in SPECIAL else SPECIAL.index(name)
            for name in (current, following)
        ]
        assert None not in ids, (current, following)
        follows = follows.at[ids[0], ids[1]].set(9.0)
    params["lm_head"] = {"kernel": follows}
    return Model(config=config, params=params, tokenizer=tokenizer, kind="policy", name="scripted")


def respond(model: Model, demonstrations: str, requests: Any, **more: Any) -> Iterator[Reply]:
    return Responder(model, demonstrations, **more).respond(requests)


def answer(model: Model, demonstrations: str, sampling: SamplingConfig = GREEDY) -> Reply:
    (found,) = respond(model, demonstrations, [REQUEST], next_role="assistant", sampling=sampling, seed=3)
    return found


# The label's characters begin inside " sure\n" and end inside ": y".
PIECES = ["\nHum", "Human", "Assistant", "\n\n", ": y", ": ", ":", " ok", " sure\n", "an", "es", "q"]
SCRIPT = {":": " ok", " ok": " sure\n", " sure\n": "\nHum", "\nHum": "an", "an": ": y", ": y": "es", "es": "es"}


def test_08_a_stop_string_that_spans_several_tokens_is_cut_exactly():
    model = scripted(make_tokenizer(PIECES), SCRIPT)
    assert stop_tokens(model.tokenizer, stop_strings(DEMONSTRATIONS)) == (model.tokenizer.eos_id,)
    assert answer(model, DEMONSTRATIONS) == Reply("one", "ok sure", tokens=2, finish="stop")


def test_08_half_a_stop_string_is_not_one():
    model = scripted(make_tokenizer(PIECES), SCRIPT)
    four = GREEDY.model_copy(update={"max_new_tokens": 4})
    assert answer(model, DEMONSTRATIONS, four) == Reply("one", "ok sure\n\nHuman", tokens=4, finish="length")


def test_a_fine_tuned_model_ends_at_the_end_of_text_alone():
    tokenizer = make_tokenizer(PIECES)
    assert answer(scripted(tokenizer, SCRIPT), "") == Reply(
        "one", "ok sure\n\nHuman: yeseseses", tokens=9, finish="length"
    )
    ending = scripted(tokenizer, {**SCRIPT, " sure\n": "<eos>"})
    assert answer(ending, "") == Reply("one", "ok sure", tokens=2, finish="stop")
    assert answer(ending, DEMONSTRATIONS) == Reply("one", "ok sure", tokens=2, finish="stop")


def test_a_label_that_is_one_token_stops_the_sampler():
    # And whose line breaks are lost.
    pieces = ["Human:", "Assistant:", " ok", " ", "q"]
    tokenizer = make_tokenizer(pieces)
    human, assistant = tokenizer.single_token("Human:"), tokenizer.single_token("Assistant:")
    assert human is not None and assistant is not None
    assert stop_tokens(tokenizer, stop_strings(DEMONSTRATIONS)) == tuple(sorted((tokenizer.eos_id, human, assistant)))
    model = scripted(tokenizer, {"Assistant:": " ok", " ok": "Human:", "Human:": "q", "q": "q"})
    assert answer(model, DEMONSTRATIONS) == Reply("one", "ok", tokens=1, finish="stop")


def test_08_dashes_end_a_turn_at_the_beginning_of_a_line_alone():
    """Five dashes are one token of most vocabularies, and so are ten; a table's row holds them within a line."""
    tokenizer = make_tokenizer([*PIECES[:4], "\n", *PIECES[4:], "----------", "-----", "|", "+"])
    assert tokenizer.single_token("-----") is not None
    demonstrations = f"{DEMONSTRATIONS}-----\n\n"
    assert stop_tokens(tokenizer, stop_strings(demonstrations)) == (tokenizer.eos_id,)
    script = {":": "|", "|": "-----", "-----": "+", "+": "\n", "\n": "----------", "----------": "q", "q": "q"}
    assert answer(scripted(tokenizer, script), demonstrations) == Reply("one", "|-----+", tokens=3, finish="stop")


def test_a_turn_that_is_only_a_label_is_empty():
    tokenizer = make_tokenizer(PIECES)
    model = scripted(tokenizer, {":": "\n\n", "\n\n": "Human", "Human": ": y", ": y": "es", "es": "es"})
    assert answer(model, DEMONSTRATIONS) == Reply("one", "", tokens=0, finish="stop")


def test_replies_come_in_order_whatever_the_batches():
    model = scripted(make_tokenizer(PIECES), {})
    sampling = SamplingConfig(temperature=1.3, max_new_tokens=5, batch_size=2)
    requests = [DialogueRequest(f"r{i}", REQUEST.turns) for i in range(5)]
    together = list(respond(model, DEMONSTRATIONS, requests, next_role="assistant", sampling=sampling, seed=11))
    assert [found.id for found in together] == [request.id for request in requests]
    assert len({found.text for found in together}) > 1
    for request, found in zip(requests, together, strict=True):
        assert list(respond(model, DEMONSTRATIONS, [request], next_role="assistant", sampling=sampling, seed=11)) == [
            found
        ]


def test_the_user_is_asked_for_by_its_own_label():
    tokenizer = make_tokenizer(PIECES)
    turns = DialogueRequest("one", [{"role": "human", "text": "q"}, {"role": "assistant", "text": "q"}])
    script = {":": " ok", " ok": "\n\n", "\n\n": "Assistant", "Assistant": ": y", ": y": "es", "es": "es"}
    (found,) = respond(scripted(tokenizer, script), DEMONSTRATIONS, [turns], next_role="human", sampling=GREEDY, seed=0)
    assert found == Reply("one", "ok", tokens=1, finish="stop")


def test_prompts_that_do_not_fit_are_refused():
    model = scripted(make_tokenizer(PIECES), SCRIPT)
    with pytest.raises(InputError, match="64"):
        answer(model, DEMONSTRATIONS * 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fine.\n\nHuman: more", ("fine.", True)),
        ("fine.\nAssistant: more\n\nHuman: x", ("fine.", True)),
        ("Human: more", ("", True)),
        ("I say Human: is a label", ("I say Human: is a label", False)),
        ("a\n\nHumans are many", ("a\n\nHumans are many", False)),
        ("  \n a \n", ("a", False)),
        ("", ("", False)),
    ],
)
def test_08_cut_at_labels_that_begin_a_line(text: str, expected: tuple[str, bool]):
    assert cut(text, stop_strings(DEMONSTRATIONS)) == expected


def test_the_stop_token_counts_for_nothing():
    tokenizer = make_tokenizer(PIECES)
    ok = tokenizer.single_token(" ok")
    assert ok is not None
    stopped = Completion("one", (ok, ok, tokenizer.eos_id), (0.0, 0.0, 0.0), "stop_token")
    assert reply(tokenizer, stopped, (), False) == Reply("one", "ok ok", tokens=2, finish="stop")
    # The last token of a completion that did not stop is text, also if it is the one of id eos.
    alone = Completion("one", (tokenizer.eos_id,), (0.0,), "stop_token")
    assert reply(tokenizer, alone, (), False) == Reply("one", "", tokens=0, finish="stop")


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("Yes. Human: and then?", "Yes."),
        ("Yes.\nhelp\nUser: and then?", "Yes.\nhelp"),
        ("Yes.\n\n**AI:** more", "Yes."),
        ("Yes.\n### Assistant: more", "Yes."),
        ("AI Assistant: yes", ""),
        ("I say Human: is a label", "I say Human: is a label"),
        ("The user: a person", "The user: a person"),
        ("Systems: many", "Systems: many"),
    ],
)
def test_nobody_elses_words_stay_in_a_turn(text: str, own: str):
    assert own_words(text) == own
    tokenizer = make_tokenizer(sorted({*text, "q"}))
    completion = Completion("one", tuple(tokenizer.encode(text)), (0.0,) * len(text), "length")
    # Labels cut a vanilla model's turn alone, and count as its end.
    expected = Reply("one", own, len(own), "stop" if own != text else "length")
    assert reply(tokenizer, completion, stop_strings(DEMONSTRATIONS), False) == expected
    assert reply(tokenizer, completion, (), False).text == text


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One is here. Two is", "One is here."),
        ('He said "no!" and then', 'He said "no!"'),
        ("Ask Dr. Who about", "Ask Dr. Who about"),
        ("It costs 3.5 dollars and", "It costs 3.5 dollars and"),
        ("Do this:\n1. Wash it\n2. Dry", "Do this:\n1. Wash it"),
        ("Do this:\n1. Wash", "Do this:\n1. Wash"),
        ("Some fruits, e.g. apples. And", "Some fruits, e.g. apples."),
        ("All done.", "All done."),
        ("", ""),
    ],
)
def test_a_half_sentence_at_the_end_goes_by_rule(text: str, whole: str):
    assert whole_sentences(text) == whole
    tokenizer = make_tokenizer(sorted({*text, "q"}))
    completion = Completion("one", tuple(tokenizer.encode(text)), (0.0,) * len(text), "length")
    stops = stop_strings(DEMONSTRATIONS)
    assert reply(tokenizer, completion, stops, True) == Reply("one", whole, len(whole), "length")
    assert reply(tokenizer, completion, stops, False).text == text
    # What ended by itself is not cut, however it ends.
    ended = dataclasses.replace(completion, tokens=(*completion.tokens, tokenizer.eos_id), finish="stop_token")
    assert reply(tokenizer, ended, stops, True) == Reply("one", text, len(text), "stop")


def test_the_line_between_dialogues_is_a_stop_where_the_prompt_has_it():
    text = "fine.\n-----\nmore"
    assert cut(text, stop_strings(f"x\n{SEPARATOR}\n\n")) == ("fine.", True)
    assert cut(text, stop_strings(DEMONSTRATIONS)) == (text, False)


def test_a_dialogue_too_long_for_the_model_is_named_with_what_to_change():
    model = scripted(make_tokenizer(PIECES), SCRIPT)
    long = DialogueRequest("two", [{"role": "human", "text": "q" * 60}])
    responder = Responder(model, DEMONSTRATIONS, next_role="assistant", sampling=GREEDY, seed=3)
    assert responder.fits(REQUEST.turns) and not responder.fits(long.turns)
    said = r"request 'two': 'q{60}': few-shot prompt \d+ \+ max_new_tokens 9 \+ dialogue \d+ = .*lower max_new_tokens"
    with pytest.raises(InputError, match=said):
        responder.respond([REQUEST, long])
