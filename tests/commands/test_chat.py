"""chat: the sampler's tokens one by one, harmless text in pieces, and a dialogue over standard input."""

import importlib.util
import io
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from almost_jax.commands.chat import open_chat
from almost_jax.commands.places import parse_mesh
from almost_jax.commands.terminal import harmless, spoken
from almost_jax.errors import InputError
from almost_jax.io.models import save_model
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.sampling.engine import Request, Settings, generate
from almost_jax.sampling.keys import request_key
from almost_jax.sampling.layout import decode_layout
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.streaming import stream

_spec = importlib.util.spec_from_file_location("models_commands", Path(__file__).with_name("test_models_commands.py"))
assert _spec is not None and _spec.loader is not None
_other = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_other)
command, make_model, letters = _other.command, _other.make_model, _other.letters

SETTINGS = {"temperature": 0.9, "top-p": 0.9, "top-k": 0, "max-new-tokens": 7}
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\x1b]0;title\x07", "a␛[2Jb␛]0;title␇"),
        ("x\ry\bz\x7f\x00", "x␍y␈z␡␀"),
        ("\x9b31m\x85", "\ufffd31m\ufffd"),
        ("one\ttwo\nthree\u2028four", "one\ttwo\nthree\nfour"),
        ("abc\u202edef\u2066g\u200fh\ufeff", "abcdefgh"),
        ("[red]no markup[/red] :smile:", "[red]no markup[/red] :smile:"),
        ("é漢👩\u200d🚀", "é漢👩\u200d🚀"),
    ],
)
def test_what_drives_a_terminal_becomes_visible(text: str, shown: str):
    assert harmless(text) == shown


def test_no_character_that_a_terminal_obeys_is_left():
    everything = harmless("".join(map(chr, range(0x110000))))
    left = {
        letter for letter in everything if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    }
    assert left == {"\n", "\t", "\u200c", "\u200d"}


def test_text_comes_in_whole_letters_and_ends_before_a_stop():
    tokenizer = letters()
    text = " é漢🙂 ok\n\nHum ok\n\nHuman: no"
    pieces = list(spoken(tokenizer, tokenizer.encode(text), ["\n\nHuman:"]))
    assert "".join(pieces) == "é漢🙂 ok\n\nHum ok"
    assert pieces[:3] == ["é", "漢", "🙂"] and "\n\nHum" in pieces
    # The beginning counts as that of a line, and space before a stop belongs to it.
    for said, shown in (("\n\nHuman: no", ""), ("Human: no", ""), ("ok. \n\n\nHuman: no", "ok."), ("a Human: b", None)):
        found = "".join(spoken(tokenizer, tokenizer.encode(said), ["\nHuman:"]))
        assert found == (said if shown is None else shown)
    assert "".join(spoken(tokenizer, tokenizer.encode("end\n\nHu"), ["\n\nHuman:"])) == "end\n\nHu"
    # A letter that never becomes whole is shown as one that isn't.
    assert "".join(spoken(tokenizer, tokenizer.encode("a漢")[:-1], [])) == "a\ufffd"


@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_06_a_stream_is_what_the_batch_sampler_draws(temperature: float):
    model = make_model()
    prompt, key = [3, 9, 4, 11, 7], request_key(5, "one")
    for stops in ((), (5, 6, 7, 8, 9, 10)):
        rules = SamplingRules(temperature, 0.95, 0, 9, stops)
        request, settings = Request("one", tuple(prompt)), Settings(2, 4, True, 64)
        [drawn] = generate(model.params, model.config, [request], rules, settings, seed=5, prefix_tokens=())
        expected = list(drawn.tokens)
        for params, config in ((model.params, model.config), decode_layout(model.params, model.config, "cpu")):
            assert list(stream(params, config, prompt, rules, key, multiple=16)) == expected
    with pytest.raises(ValueError, match="need 1 to 2048 positions"):
        stream(model.params, model.config, [], rules, key, multiple=16)


def dialogue(capsys, monkeypatch, lines: str, *arguments: object) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, err = command(capsys, "chat", *arguments)
    assert (code, err) == (0, "")
    return out


def test_a_dialogue_over_standard_input(tmp_path: Path, capsys, monkeypatch):
    save_model(tmp_path / "model", make_model())
    given = ("--model", tmp_path / "model", "--max-new-tokens", 5)
    lines = "w3 w4\n/retry\n/set temperature 0\n/set top-p 7\n/set colour 1\n/new\n/retry\n/help\nw5\n/quit\nw6\n"
    out = dialogue(capsys, monkeypatch, lines, *given)
    said = out.splitlines()
    assert "plain dialogue" in out and "forgotten" in out and "nothing was asked yet" in out and "Ctrl-C" in out
    assert "temperature 0  top-p 0.95  top-k 0  max-new-tokens 5" in said
    assert "top_p 7.0 must be above 0" in out and "expected one of temperature, top-p" in out
    assert out == dialogue(capsys, monkeypatch, lines, *given)
    one = command(capsys, "chat", *given, "--ask", "w3 w4")
    assert one[0] == 0 and one[1].strip() == said[2].strip() != said[3].strip()
    seeds = [command(capsys, "chat", *given, "--ask", "w3", "--temperature", 30, "--seed", seed)[1] for seed in (1, 2)]
    assert seeds[0] != seeds[1]


def test_words_that_would_drive_the_terminal_do_not(tmp_path: Path, capsys):
    model = make_model()
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"\x1b[{i}m\x07[bold]": i for i in range(3, 24)}}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **special))
    save_model(tmp_path / "model", _other.dataclasses.replace(model, tokenizer=tokenizer))
    code, out, _ = command(capsys, "chat", "--model", tmp_path / "model", "--ask", "x", "--max-new-tokens", 9)
    assert code == 0 and "␛[" in out and "␇[bold]" in out
    assert not set(out) & {"\x1b", "\x07"}


def test_a_template_is_used_where_there_is_one(tmp_path: Path, monkeypatch):
    model = make_model()
    templated = _other.dataclasses.replace(model, tokenizer=model.tokenizer.with_chat_template(TEMPLATE))
    asked: list[list[int]] = []

    def watched(params, config, prompt, rules, key, *, multiple):
        asked.append(list(prompt))
        return iter([5, 1])

    monkeypatch.setattr("almost_jax.commands.chat.stream", watched)
    save_model(tmp_path / "with", templated)
    save_model(tmp_path / "without", model)
    (tmp_path / "with/generation_config.json").write_text('{"eos_token_id": [4, 99]}')
    chat = open_chat(str(tmp_path / "with"), None, "float32", SETTINGS, 0, "w8", False)
    assert chat.rules.stop_tokens == (1, 4) and not chat.plain
    assert ["".join(chat.answer(word)) for word in ("w3", "w4")] == ["w5", "w5"]
    # "system", "user" and "assistant" are unknown words.
    assert asked == [[2, 8, 2, 3, 9], [2, 8, 2, 3, 2, 5, 2, 4, 9]]
    asked.clear()
    for source, plain in (("with", True), ("without", False)):
        chat = open_chat(str(tmp_path / source), None, "float32", SETTINGS, 0, None, plain)
        assert chat.plain and "".join(chat.answer("w3")) == "w5" and "".join(chat.answer("w4")) == "w5"
    # Human: w3, Assistant: w5, end of text, Human: w4, Assistant:
    assert asked == [[2, 3, 2], [2, 3, 2, 5, 1, 2, 4, 2]] * 2


def test_a_long_dialogue_forgets_its_beginning_and_a_long_question_is_refused(tmp_path: Path):
    short = _other.dataclasses.replace(_other.CONFIG, max_position_embeddings=24)
    save_model(tmp_path / "model", _other.dataclasses.replace(make_model(), config=short))
    chat = open_chat(str(tmp_path / "model"), "data=-1", "float32", SETTINGS, 0, None, False)
    for _ in range(4):
        "".join(chat.answer("w3 w4 w5"))
    assert 2 <= len(chat.turns) < 8
    kept = list(chat.turns)
    with pytest.raises(InputError, match="the model reads 24"):
        "".join(chat.answer("w3 " * 30))
    assert chat.turns == kept


def test_a_model_of_few_positions_remembers_too(tmp_path: Path):
    short = _other.dataclasses.replace(_other.CONFIG, max_position_embeddings=64)
    save_model(tmp_path / "model", _other.dataclasses.replace(make_model(), config=short))
    settings = {**SETTINGS, "max-new-tokens": 64}
    chat = open_chat(str(tmp_path / "model"), "data=-1", "float32", settings, 0, None, False)
    chat.turns = [{"role": "human", "text": "w3"}, {"role": "assistant", "text": "w4"}]
    "".join(chat.answer("w5"))
    assert [turn["text"] for turn in chat.turns[:3]] == ["w3", "w4", "w5"]


def test_what_cannot_be_talked_to_is_one_line(tmp_path: Path, capsys):
    save_model(tmp_path / "reward", make_model("reward"))
    save_model(tmp_path / "model", make_model())
    for arguments, said in (
        (("--model", tmp_path / "reward"), "a reward model says nothing"),
        (("--model", tmp_path / "model", "--system", "w3"), "the plain dialogue has no place for it"),
        (("--model", tmp_path / "model", "--temperature", "-1"), "temperature -1.0 must be 0"),
        (("--model", tmp_path / "model", "--dtype", "int8"), "dtype 'int8' isn't known"),
        (("--model", tmp_path / "model", "--mesh", "colour=2"), "'colour=2' isn't data=N or fsdp=N or tensor=N"),
        (("--model", tmp_path / "model", "--mesh", "tensor=8"), "tensor 8 can't split layers/attention/key/kernel"),
        (("--model", tmp_path / "model", "--mesh", "data=3"), "needs 3 devices, but there are 8"),
    ):
        code, out, err = command(capsys, "chat", *arguments, "--ask", "w3")
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_mesh_is_read_from_text():
    assert dict(parse_mesh("fsdp=4,tensor=-1").shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    for text in ("", "data", "data=0", "data=x", "data=-1,fsdp=-1", "data=-2"):
        with pytest.raises(InputError, match="--mesh"):
            parse_mesh(text)
