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
