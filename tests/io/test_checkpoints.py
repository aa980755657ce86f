"""Checkpoints: exact bytes, shardings, kills, damage, and trees of another shape."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from almost_jax.core.train import init_state
from almost_jax.errors import InputError
from almost_jax.io import checkpoints as checkpoints_module
from almost_jax.io.checkpoints import Checkpoints, find_damage, restore_tree, save_tree, seal


def make_tree(seed: int = 0):
    """A train state with everything that trees of ours have: bfloat16, scalars, empty optimizer states, NaN and -0."""
    rng = np.random.default_rng(seed)
    params = {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(3, 16, 24)), jnp.float32), "scale": jnp.ones((5,))},
        "half": jnp.asarray(rng.normal(size=(7,)), jnp.bfloat16),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
    }

    def decayed(tree):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    schedule = optax.linear_schedule(1e-3, 0.0, 10)
    return init_state(params, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, mask=decayed)))


def same_bytes(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def shaped(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_28_a_tree_comes_back_byte_for_byte(tmp_path: Path):
    tree, extra = make_tree(), {"kl_coef": 0.1, "漢": [1, None, {"a": 1e-300}]}
    with Checkpoints(tmp_path / "deep" / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.restore(tree) is None
        checkpoints.save(7, tree, extra)
    with Checkpoints(tmp_path / "deep" / "checkpoints", keep=2) as checkpoints:
        for expected in (tree, shaped(tree)):
            step, found, also = checkpoints.restore(expected)
            assert step == 7 and also == extra
            same_bytes(found, tree)


def test_a_tree_is_restored_onto_other_shardings(tmp_path: Path):
    devices = np.asarray(jax.devices())
    assert devices.size == 8

    def place(grid, spec):
        mesh = Mesh(devices.reshape(grid), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        return NamedSharding(mesh, PartitionSpec(*spec))

    values = np.random.default_rng(1).normal(size=(16, 24)).astype(np.float32)
    before, after = place((4, 2), ("a", "b")), place((2, 4), ("b", None))
    save_tree(tmp_path / "tree", {"w": jax.device_put(values, before)})
    for sharding in (before, after, place((8, 1), (None, ("a", "b")))):
        found = restore_tree(tmp_path / "tree", {"w": jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=sharding)})
        assert found["w"].sharding == sharding
        np.testing.assert_array_equal(np.asarray(found["w"]), values)


def test_only_the_newest_are_kept(tmp_path: Path):
    tree = {"w": jnp.arange(3)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (0, 9, 10, 200):
            checkpoints.save(step, tree, {"step": step})
        assert checkpoints.steps() == [10, 200]
        # A run that is repeated from 10: what comes after belongs to the run that is gone.
        checkpoints.save(15, tree, {"step": 15})
        assert checkpoints.steps() == [10, 15]
        checkpoints.save(15, {"w": jnp.arange(3) + 1}, {"step": 15})
        assert checkpoints.restore(tree)[1]["w"].tolist() == [1, 2, 3]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "15"]
    with pytest.raises(ValueError, match="At least 1"):
        Checkpoints(tmp_path, keep=0)


def cut(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path):
    os.truncate(path, 0)


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, empty, flip, Path.unlink])
def test_28_a_checkpoint_with_any_damaged_file_is_passed_over_aloud(tmp_path: Path, damage):
    said: list[str] = []
    trees = {step: make_tree(step) for step in (10, 20)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    for step, tree in trees.items():
        checkpoints.save(step, tree, {"step": step})
    checkpoints.wait()
    shutil.copytree(checkpoints.directory / "20", tmp_path / "whole")
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert len(names) > 8
    for name in names:
        damage(checkpoints.directory / "20" / name)
        step, found, extra = checkpoints.restore(trees[10])
        assert (step, extra) == (10, {"step": 10})
        same_bytes(found, trees[10])
        assert len(said) == 1 and "torn checkpoint passed over" in said[0]
        # A changed list of files blames one of those in it.
        assert str(name) in said[0] or str(name) == "files.json"
        assert "\n" not in said.pop()
        shutil.copyfile(tmp_path / "whole" / name, checkpoints.directory / "20" / name)
    step, found, _ = checkpoints.restore(trees[20])
    assert step == 20 and said == []
    same_bytes(found, trees[20])


def test_28_after_a_torn_checkpoint_the_run_goes_on_from_the_one_before(tmp_path: Path):
    tree = {"w": jnp.arange(5.0)}
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=1, say=said.append)
    checkpoints.save(10, tree, {})
    checkpoints.wait()
    shutil.copytree(tmp_path / "10", tmp_path / "20")
    cut(tmp_path / "20" / "extra.json")
    (tmp_path / ".saving-30").mkdir()
    assert checkpoints.restore(tree)[0] == 10 and len(said) == 1
    checkpoints.save(15, tree, {})
    checkpoints.close()
    assert os.listdir(tmp_path) == ["15"]
    assert checkpoints.restore(tree)[0] == 15 and len(said) == 1
    cut(tmp_path / "15" / "files.json")
    assert checkpoints.restore(tree) is None
    assert find_damage(tmp_path / "15") == "files.json can't be read"


def test_28_torn_checkpoints_count_no_longer_and_go_once_a_new_one_is_whole(tmp_path: Path):
    tree = {"w": jnp.arange(5.0)}
    with Checkpoints(tmp_path, keep=2) as before:
        for step in (10, 20):
            before.save(step, tree, {})
    shutil.copytree(tmp_path / "20", tmp_path / "30")
    for step in (20, 30):
        cut(tmp_path / str(step) / "extra.json")
    checkpoints = Checkpoints(tmp_path, keep=2, say=lambda line: None)
    assert checkpoints.steps() == [10, 20, 30]
    assert checkpoints.restore(tree)[0] == 10
    assert checkpoints.steps() == [10] and sorted(os.listdir(tmp_path)) == ["10", "20", "30"]
    checkpoints.save(25, tree, {})
    # One of the torn steps comes again, whole.
    assert checkpoints.steps() == [10, 25] and sorted(os.listdir(tmp_path)) == ["10", "25"]
    cut(tmp_path / "25" / "extra.json")
    assert checkpoints.restore(tree)[0] == 10
    checkpoints.save(25, tree, {})
    assert checkpoints.steps() == [10, 25] and checkpoints.restore(tree)[0] == 25


def test_28_whatever_goes_wrong_in_reading_is_a_torn_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree, said = {"w": jnp.arange(5.0)}, list[str]()
    checkpoints = Checkpoints(tmp_path, keep=2, say=said.append)
    for step in (1, 2):
        checkpoints.save(step, tree, {})

    def unreadable(folder: Path, expected):
        if folder.parent.name == "2":
            raise ValueError("zarr:\nno such array")
        return restore_tree(folder, expected)

    monkeypatch.setattr("almost_jax.io.checkpoints.restore_tree", unreadable)
    assert checkpoints.restore(tree)[0] == 1
    assert said == [
        f"{tmp_path / '2'}: torn checkpoint passed over (it can't be read: ValueError: zarr: no such array)"
    ]
    # Where none can be read though all are whole, it isn't their fault: nothing is begun anew, and nothing is lost.
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(ValueError, match="no such array"):
        Checkpoints(tmp_path, keep=2, say=said.append).restore(tree)
    assert os.listdir(tmp_path) == ["2"]


def test_28_an_interrupted_wait_leaves_the_checkpoint_to_its_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    goes_on = threading.Event()

    def slow(folder: Path) -> None:
        goes_on.wait(60)
        seal(folder)

    monkeypatch.setattr("almost_jax.io.checkpoints.seal", slow)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"w": jnp.arange(5.0)}, {})
    # What a shell starts in the background ignores this signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
        interrupt.join()
    finally:
        signal.signal(signal.SIGINT, before)
    threading.Timer(0.2, goes_on.set).start()
    checkpoints.close()
    assert os.listdir(tmp_path) == ["1"] and find_damage(tmp_path / "1") is None


def test_foreign_folders_are_left_alone(tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "12").write_text("a file")
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.steps() == []
    checkpoints.save(3, {"w": jnp.zeros(2)}, {})
    checkpoints.save(4, {"w": jnp.zeros(2)}, {})
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["12", "4", "notes"]


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"w": jnp.zeros((3, 2)), "p": Pair(jnp.zeros(2), jnp.zeros(3))},
            "w is float32 of shape (2, 3); expected",
        ),
        ({"w": jnp.zeros((2, 3)), "p": Pair(jnp.zeros(2), jnp.zeros(4))}, "leaf p/second is float32 of shape (3,)"),
        ({"w": jnp.zeros((2, 3), int), "p": Pair(jnp.zeros(2), jnp.zeros(3))}, "expected int32 of shape (2, 3)"),
        ({"w": jnp.zeros((2, 3))}, "leaf p/first, float32 of shape (2,), is left over"),
        ({"w": jnp.zeros((2, 3)), "p": Pair(jnp.zeros(2), jnp.zeros(3)), "x": jnp.zeros(())}, "leaf x is missing"),
    ],
)
def test_another_tree_is_an_error_that_names_the_leaf(tmp_path: Path, asked, said: str):
    checkpoints = Checkpoints(tmp_path, keep=3)
    tree = {"w": jnp.zeros((2, 3)), "p": Pair(jnp.zeros(2), jnp.zeros(3))}
    checkpoints.save(1, tree, {})
    checkpoints.save(2, tree, {})
    with pytest.raises(InputError) as caught:
        checkpoints.restore(asked)
    assert said in str(caught.value) and str(tmp_path / "2") in str(caught.value)
    assert checkpoints.steps() == [1, 2]


def test_28_a_foreign_checkpoint_is_passed_over_aloud(tmp_path: Path):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=2, say=said.append)
    tree = {"w": jnp.arange(6.0)}
    checkpoints.save(4, tree, {"kl": 1})
    checkpoints.save(9, {"w": jnp.arange(7.0)}, {})
    step, found, extra = checkpoints.restore(tree)
    assert (step, extra) == (4, {"kl": 1}) and found["w"].tolist() == tree["w"].tolist()
    assert len(said) == 1 and "9: foreign checkpoint passed over" in said[0] and "leaf w is float32" in said[0]


def test_28_training_may_go_on_while_a_checkpoint_is_written(tmp_path: Path):
    """What is saved is the state at the call, though a step donates and overwrites it at once."""
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1.0, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=3)
    tree = {"w": jnp.zeros((700, 900)), "v": jnp.zeros(3)}
    for step in (1, 2, 3):
        checkpoints.save(step, tree, {"step": step})
        for _ in range(5):
            tree = add(tree)
    # Saving the next one waits for the one before, and asking for the steps waits for the last.
    assert checkpoints.steps() == [1, 2, 3]
    for step in (3, 2, 1):
        found = restore_tree(tmp_path / str(step) / "tree", tree)
        for leaf in jax.tree.leaves(found):
            assert np.unique(np.asarray(leaf)).tolist() == [5.0 * (step - 1)]
    checkpoints.close()


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 3 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_28_a_full_disk_is_one_clear_line_and_damages_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    tree = {"w": jnp.arange(100_000.0)}
    checkpoints = Checkpoints(small_disk / "checkpoints", keep=2)
    checkpoints.save(1, tree, {})
    checkpoints.wait()
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 1_500_000)
    with pytest.raises(InputError, match="no space left on device .* bytes are needed"):
        checkpoints.save(2, tree, {})
    # The disk fills up on the way, after it was looked at.
    monkeypatch.setattr("almost_jax.io.checkpoints.check_room", lambda folder, size: None)
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free + 1_500_000 - 150_000))
    with pytest.raises(InputError, match="step 1 is the last whole one: make room") as caught:
        checkpoints.save(3, tree, {})
        checkpoints.wait()
    assert "No space left on device" in str(caught.value) and "\n" not in str(caught.value)
    filler.unlink()
    assert os.listdir(checkpoints.directory) == ["1"]
    checkpoints.save(4, tree, {})
    assert checkpoints.restore(tree)[0] == 4


def test_a_failed_write_is_told_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"w": jnp.zeros(3)}, {})
    checkpoints.wait()

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr("almost_jax.io.checkpoints.seal", full)
        checkpoints.save(2, {"w": jnp.ones(3)}, {})
        with pytest.raises(InputError, match=r"No space left on device\); step 1 is the last whole one"):
            checkpoints.save(3, {"w": jnp.ones(3)}, {})
    assert checkpoints.steps() == [1]
    checkpoints.save(3, {"w": jnp.ones(3)}, {})
    assert checkpoints.steps() == [1, 3]


def test_28_a_file_that_the_disk_refuses_to_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=2, say=said.append)
    trees = {step: make_tree(step) for step in (1, 2)}
    for step, tree in trees.items():
        checkpoints.save(step, tree, {})
    checkpoints.wait()
    real = checkpoints_module._digest

    def refused(path: Path) -> str:
        if "2" in path.relative_to(tmp_path).parts[:1]:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoints_module, "_digest", refused)
    assert checkpoints.restore(trees[1])[0] == 1
    assert len(said) == 1 and "can't be read: Input/output error" in said[0]


def test_what_a_killed_process_was_writing_goes_before_the_next_save_asks_for_room(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / ".saving-27").mkdir()
    checkpoints.save(30, make_tree(1), {})
    assert not (tmp_path / ".saving-27").exists()
    checkpoints.close()
    assert checkpoints.steps() == [30]


SAVE_FOR_EVER = """
import sys
import jax.numpy as jnp
from almost_jax.io.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in range(1, 1000):
    checkpoints.save(step, {"w": jnp.full((400, 500), step), "step": jnp.int32(step)}, {"step": step})
    print(step, flush=True)
"""


def test_28_a_killed_save_leaves_the_one_before(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(4):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = max([last, *map(int, process.stdout.read().split())])
    expected = {"w": jax.ShapeDtypeStruct((400, 500), jnp.int32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    step, found, extra = Checkpoints(tmp_path, keep=2).restore(expected)
    # What is reported is being written; what was reported before it is whole.
    assert step in (last - 1, last, last + 1)
    assert extra == {"step": step} and int(found["step"]) == step
    assert np.asarray(found["w"]).tolist() == np.full((400, 500), step).tolist()
