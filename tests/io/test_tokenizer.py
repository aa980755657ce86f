"""The tokenizer wrapper: special tokens, missing ones, and what decoding leaves out."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from almost_jax.errors import InputError
from almost_jax.io.tokenizer import Tokenizer, load_tokenizer

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "Human:", "Assistant:", "what", "is", ",", "."]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def words(**special) -> PreTrainedTokenizerFast:
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**SPECIAL, **special})


def letters(**special) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token per byte, and "</s>" as the only special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "</s>", **special})


def saved(backend: PreTrainedTokenizerFast, folder: Path) -> Path:
    backend.save_pretrained(str(folder))
    return folder


def test_words_round_trip_through_a_folder(tmp_path: Path):
    tokenizer = load_tokenizer(saved(words(), tmp_path / "a"))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 10)
    assert tokenizer.encode("Human: what is , .\n\nAssistant:") == [4, 6, 7, 8, 9, 5]
    assert tokenizer.encode("") == []
    # Nothing is cleaned up: the spaces before punctuation stay, or the text wouldn't encode to the same ids.
    assert tokenizer.decode([1, 6, 7, 8, 9, 2, 0]) == "what is , ."
    assert tokenizer.decode([]) == "" and tokenizer.decode([2]) == ""
    assert tokenizer.single_token("Human:") == 4
    assert tokenizer.single_token("what is") is None
    assert tokenizer.single_token("unheard") is None
    assert tokenizer.single_token("") is None
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("is what") == [7, 6]


def test_bytes_round_trip_any_text(tmp_path: Path):
    tokenizer = load_tokenizer(saved(letters(), tmp_path))
    text = "é漢🙂\n\nHuman:  x\u2028y\x00z"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(f" \n{text}\t ")) == text


def test_a_special_token_in_plain_text_is_only_letters(tmp_path: Path):
    tokenizer = load_tokenizer(saved(letters(), tmp_path))
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.eos_id not in ids and len(ids) == 6
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a</s>b"


def test_pad_falls_back_to_the_end_token(tmp_path: Path):
    for special in ({}, {"pad_token": "</s>"}):
        tokenizer = load_tokenizer(saved(letters(**special), tmp_path))
        assert tokenizer.pad_id == tokenizer.eos_id == 256
        assert tokenizer.bos_id is None
        assert tokenizer.vocab_size == 257


def test_fingerprints_tell_tokenizers_apart(tmp_path: Path):
    plain = Tokenizer(words()).fingerprint
    assert Tokenizer(words()).fingerprint == plain
    used = words()
    used(["what", "what is"], padding=True, truncation=True, max_length=2)
    assert Tokenizer(used).fingerprint == plain
    assert Tokenizer(words(eos_token="<pad>")).fingerprint != plain
    assert Tokenizer(letters()).fingerprint != plain


def test_bad_folders_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="no tokenizer found"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no eos_token"):
        load_tokenizer(saved(letters(eos_token=None), tmp_path / "endless"))
    folder = saved(words(), tmp_path / "torn")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:100])
    with pytest.raises(InputError, match="torn: the tokenizer can't be read") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_not_run(tmp_path: Path):
    folder = saved(words(), tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        load_tokenizer(folder)
    except InputError:
        pass
    assert not (tmp_path / "ran").exists()


def sentencepiece_like(folder: Path):
    """As LLaMA 1 and 2 store theirs: pieces with a mark for spaces, bytes for what has none, nothing for padding."""
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "he",
        "ll",
        "▁w",
        "or",
        "▁he",
        "▁hell",
        "▁hello",
        "▁wor",
        "ld",
        "▁world",
    ]
    merges = [("h", "e"), ("l", "l"), ("▁", "w"), ("o", "r"), ("▁", "he"), ("▁he", "ll"), ("▁hell", "o"), ("▁w", "or")]
    merges += [("l", "d"), ("▁wor", "ld")]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True).save_pretrained(str(folder))
    return "<s>", "</s>", vocabulary


def llama3_like(folder: Path):
    """As LLaMA 3 stores its own: bytes, special tokens behind the vocabulary, a beginning that a template adds."""
    from tokenizers import processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*alphabet, "he", "ll", "hell", "hello"])}
    backend = Backend(models.BPE(vocabulary, [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A $B",
        special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))],
    )
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(str(folder))
    return "<|begin_of_text|>", "<|eot_id|>", backend.get_vocab()


@pytest.mark.parametrize("make", [sentencepiece_like, llama3_like])
def test_llama_tokenizers_of_both_families_encode_as_transformers_does(tmp_path: Path, make):
    from transformers import AutoTokenizer

    begin, end, vocabulary = make(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (vocabulary[begin], vocabulary[end], vocabulary[end])
    for text in ("hello world", " hello", "hello  world\n", "é漢🙂", "", "a\tb"):
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == plain
        assert ours.encode_prompt(text) == theirs(text)["input_ids"] == [ours.bos_id, *plain]
        assert ours.decode(ours.encode(text)) == text.strip()
    assert ours.eos_id not in ours.encode(f"a{end}b")
    ours.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.fingerprint == ours.fingerprint and again.encode_prompt("hello w") == ours.encode_prompt("hello w")


@pytest.mark.parametrize("make", [sentencepiece_like, llama3_like])
@pytest.mark.parametrize(
    ("before", "text"),
    [("hello\n", "world"), ("hello\n", "hello w"), ("he", " hello"), ("a\n", "\nb"), ("a", ""), ("a\n", "<s>é")],
)
def test_a_text_behind_another_is_encoded_and_decoded_as_within_it(tmp_path: Path, make, before: str, text: str):
    make(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    whole, first = tokenizer.encode(before + text), tokenizer.encode(before)
    assert whole == first + tokenizer.encode_behind(text, plain=True)
    assert tokenizer.decode_behind(whole[len(first) :]) == text


def test_the_end_of_text_is_taken_from_the_model_where_the_tokenizer_names_none(tmp_path: Path):
    saved(words(eos_token=None), tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert load_tokenizer(tmp_path).eos_id == 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert load_tokenizer(tmp_path).eos_id == 9
    for wrong in ('{"eos_token_id": 99}', '{"eos_token_id": null}'):
        for name in ("config.json", "generation_config.json"):
            (tmp_path / name).write_text(wrong)
        with pytest.raises(InputError, match="no eos_token"):
            load_tokenizer(tmp_path)
