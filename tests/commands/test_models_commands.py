"""import and export: there and back, what is written beside the weights, and faults that leave nothing behind."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from almost_jax import cli
from almost_jax.core.llama import LlamaConfig, abstract_params
from almost_jax.core.rotary import RopeConfig
from almost_jax.folder import NEEDED, write_status
from almost_jax.io import folders, transfer
from almost_jax.io.huggingface import load_llama, save_llama
from almost_jax.io.models import Model, read_model, save_model
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.stages.dialogues import prompt_tokens

CONFIG = LlamaConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-3,
    rope=RopeConfig(1234.0, "llama3", 3.0, 1.5, 5.0, 61),
)


def make_model(kind: str = "policy", dtype: str = "float32", pad: bool = True) -> Model:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 20)}}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "unk_token": "<unk>", **({"pad_token": "<pad>"} if pad else {})}
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **special))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), dtype), abstract_params(CONFIG))
    if kind == "reward":
        params["score"] = {"kernel": jax.numpy.asarray(rng.normal(size=(16,)), dtype)}
        return Model(CONFIG, params, tokenizer, "reward", "here", -0.25, 2.75)
    return Model(CONFIG, params, tokenizer, "policy", "here")


def letters() -> Tokenizer:
    """One token per byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def same_bytes(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    written = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, written.out, written.err


def test_02_a_model_comes_in_and_goes_out_with_the_same_bytes(tmp_path: Path, capsys):
    model = make_model(dtype="bfloat16")
    save_llama(tmp_path / "theirs", CONFIG, model.params, "bfloat16", model.tokenizer)
    (tmp_path / "theirs/generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    code, out, err = command(capsys, "import", tmp_path / "theirs", tmp_path / "ours")
    assert (code, err) == (0, "") and "policy of" in out and "bfloat16" in out
    found = read_model(str(tmp_path / "ours"), transfer.host_mesh(), None)
    same_bytes(found.params, model.params)
    assert json.loads((tmp_path / "ours/model.json").read_text())["origin"] == str(tmp_path / "theirs")
    code, out, err = command(capsys, "export", tmp_path / "ours", tmp_path / "back", "--shard-bytes", 3000)
    assert (code, err) == (0, "") and "moved by at most 0\n" in out
    config, params = load_llama(tmp_path / "back")
    assert config == CONFIG
    same_bytes(params, model.params)
    assert (tmp_path / "back/model.safetensors.index.json").is_file()
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    fields = json.loads((tmp_path / "back/config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"] and fields["torch_dtype"] == "bfloat16"
    dialogue = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    backend = AutoTokenizer.from_pretrained(tmp_path / "back")
    asked = backend.apply_chat_template([*dialogue, dialogue[0]], tokenize=False, add_generation_prompt=True)
    assert asked == "Human: w3\n\nAssistant: w4<eos>\n\nHuman: w3\n\nAssistant:"
    turns = [{"role": role, "text": text} for role, text in (("human", "w3"), ("assistant", "w4"), ("human", "w3"))]
    ids = backend.apply_chat_template([*dialogue, dialogue[0]], add_generation_prompt=True, return_dict=False)
    assert ids == prompt_tokens(found.tokenizer, turns)
    card = (tmp_path / "back/README.md").read_text()
    assert "# back" in card and str(tmp_path / "theirs") not in card and str(tmp_path / "ours") in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "theirs"]


def test_14_a_reward_model_goes_out_with_its_normalisation(tmp_path: Path, capsys):
    model = make_model("reward", pad=False)
    save_model(tmp_path / "ours", model)
    assert command(capsys, "export", tmp_path / "ours", tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"] and fields["num_labels"] == 1
    assert (fields["reward_mean"], fields["reward_std"]) == (-0.25, 2.75)
    # transformers reads the score before the padding: the end of text, where ours is read, must not be that.
    assert (fields["pad_token_id"], fields["eos_token_id"]) == (2, 1)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<unk>"
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    card = (tmp_path / "out/README.md").read_text()
    assert "(score - -0.25) / 2.75" in card and "from those before rounding to bfloat16" in card
    assert command(capsys, "import", tmp_path / "out", tmp_path / "again")[0] == 0
    found = read_model(str(tmp_path / "again"), transfer.host_mesh(), None)
    assert (found.kind, found.reward_mean, found.reward_std) == ("reward", -0.25, 2.75)
    rounded = {name: tree for name, tree in model.params.items() if name != "lm_head"}
    same_bytes(found.params, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), rounded))


def test_the_card_tells_of_the_run(tmp_path: Path, capsys, micro_experiment: Path):
    (tmp_path / "run/sft").mkdir(parents=True)
    save_model(tmp_path / "run/sft/model", make_model())
    (tmp_path / "run/config.yaml").write_text(micro_experiment.read_text())
    entry = {**dict.fromkeys(NEEDED), "state": "done", "commit": "abc123", "steps": {"done": 7, "total": 9}}
    write_status(tmp_path / "run", {"sft": entry}, ["sft"])
    code, _, err = command(capsys, "export", tmp_path / "run/sft/model", tmp_path / "out")
    assert (code, err) == (0, "")
    card = (tmp_path / "out/README.md").read_text()
    facts = ("| experiment | probe, seed", "| stage | sft |", "abc123", "| 7 of 9 |")
    assert all(fact in card for fact in facts)


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "cut": (lambda at: os.truncate(at / "model.safetensors", 5000), "can't be read as safetensors"),
    "missing": (lambda at: edit_weights(at, lambda tensors: tensors.pop(UP)), f"tensor {UP} is missing"),
    "shape": (lambda at: edit_config(at, intermediate_size=44), "has shape (40, 16), but the config says (44, 16)"),
    "foreign": (lambda at: (at / "model.safetensors").write_bytes(b"GIF89a" * 9), "can't be read as safetensors"),
    "pickle": (lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"), "a pickle can run any code"),
    "architecture": (lambda at: edit_config(at, model_type="gpt2"), "model_type 'gpt2' isn't supported"),
    "window": (lambda at: edit_config(at, sliding_window=64), "sliding_window 64 isn't supported"),
    "no config": (lambda at: (at / "config.json").unlink(), "has neither model.json (ours) nor config.json"),
    "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), "no tokenizer found"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["import", "export"])
def test_a_fault_is_one_line_and_leaves_nothing(tmp_path: Path, capsys, name: str, fault: str):
    model = make_model()
    save_llama(tmp_path / "theirs", CONFIG, model.params, "float32", model.tokenizer)
    damage, said = FAULTS[fault]
    damage(tmp_path / "theirs")
    code, out, err = command(capsys, name, tmp_path / "theirs", tmp_path / "new")
    assert (code, out) == (2, "")
    assert said in err and str(tmp_path / "theirs") in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["theirs"]


@pytest.mark.parametrize("name", ["import", "export"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, capsys, monkeypatch, name: str):
    model = make_model()
    save_llama(tmp_path / "theirs", CONFIG, model.params, "float32", model.tokenizer)

    def full(self: Tokenizer, directory: Path) -> None:
        (directory / "half").write_text("written")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full)
    code, out, err = command(capsys, name, tmp_path / "theirs", tmp_path / "deep/in/new")
    assert (code, out) == (2, "")
    assert err == f"almost-jax: {tmp_path / 'deep/in/new'}: can't be written (No space left on device)\n"
    assert os.listdir(tmp_path) == ["theirs"]


@pytest.mark.parametrize("name", ["import", "export"])
def test_a_disk_without_room_is_known_beforehand(tmp_path: Path, capsys, monkeypatch, name: str):
    model = make_model()
    save_llama(tmp_path / "theirs", CONFIG, model.params, "float32", model.tokenizer)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    size += size // 1000 + folders.SPARE_BYTES
    for free, code in ((size - 1, 2), (size, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(free, 0, free))
        found, _, err = command(capsys, name, tmp_path / "theirs", tmp_path / "new")
        assert found == code and (tmp_path / "new").exists() == (code == 0)
        assert code == 0 or (f"{tmp_path / 'new'}: no space left on device ({size:,} bytes" in err and len(err) < 300)


def test_an_export_that_is_not_what_was_held_is_refused(tmp_path: Path, capsys, monkeypatch):
    save_model(tmp_path / "ours", make_model())

    def wrong(folder, config, params, *rest):
        layers = {**params["layers"], "mlp_norm": {"scale": params["layers"]["mlp_norm"]["scale"] * 1.0001}}
        save_llama(folder, config, {**params, "layers": layers}, *rest)

    monkeypatch.setattr(transfer, "save_llama", wrong)
    code, _, err = command(capsys, "export", tmp_path / "ours", tmp_path / "out")
    assert code == 2 and "mlp_norm" in err and "isn't what was held" in err
    other = dataclasses.replace(CONFIG, rms_norm_eps=1e-2)
    monkeypatch.setattr(transfer, "save_llama", lambda folder, config, *rest: save_llama(folder, other, *rest))
    code, _, err = command(capsys, "export", tmp_path / "ours", tmp_path / "out")
    assert code == 2 and "the config that was written isn't the model's" in err
    assert os.listdir(tmp_path) == ["ours"]


def test_what_stands_at_the_destination_stays(tmp_path: Path, capsys):
    model = make_model()
    save_llama(tmp_path / "theirs", CONFIG, model.params, "float32", model.tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter").write_text("dear")
    for name in ("import", "export"):
        code, _, err = command(capsys, name, tmp_path / "theirs", tmp_path / "full")
        assert code == 2 and "exists already" in err and (tmp_path / "full/letter").read_text() == "dear"
        code, _, err = command(capsys, name, tmp_path / "theirs", tmp_path / "new", "--dtype", "int4")
        assert code == 2 and "dtype 'int4'" in err and not (tmp_path / "new").exists()


def test_a_name_that_the_hub_cannot_give_is_one_line(tmp_path: Path, capsys, monkeypatch):
    import huggingface_hub

    def offline(name: str, **_: object) -> str:
        raise OSError(f"{name}\nis not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    code, _, err = command(capsys, "import", "someone/a-model", tmp_path / "new")
    assert code == 2 and "someone/a-model" in err and "can't be had from the hub" in err and err.count("\n") == 1
    theirs = tmp_path / "theirs"
    model = make_model()
    save_llama(theirs, CONFIG, model.params, "float32", model.tokenizer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(theirs))
    assert command(capsys, "import", "someone/a-model", tmp_path / "new")[0] == 0
    assert json.loads((tmp_path / "new/model.json").read_text())["origin"] == "someone/a-model"
