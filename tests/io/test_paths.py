"""gs:// paths on a folder that stands for the mounts of buckets: what is found, and what one line the others get."""

import os
from pathlib import Path

import pytest

from almost_jax.errors import InputError
from almost_jax.io import paths
from almost_jax.io.paths import local_path
from almost_jax.io.transfer import locate


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of mounts with a bucket called shelf."""
    folder = tmp_path / "the mounts"
    (folder / "shelf" / "a").mkdir(parents=True)
    monkeypatch.setenv(paths.VARIABLE, str(folder))
    return folder


def problem(written: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        local_path(written)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("gs://shelf/a/b.jsonl", "shelf/a/b.jsonl"),
        ("gs://shelf/a/", "shelf/a"),
        ("gs://shelf", "shelf"),
        ("gs://shelf/", "shelf"),
        ("gs:/shelf/x", "shelf/x"),
        ("gs://shelf/a:b//c", "shelf/a:b/c"),
    ],
)
def test_a_bucket_is_where_it_is_mounted(mounts: Path, written: str, expected: str, kind: type) -> None:
    assert local_path(kind(written)) == mounts / expected


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    "written", ["a/b", "/a/b", "a", "microworld:small", "hub:owner/name", "owner/name", "./s3:x", "x/gs://shelf", "~/a"]
)
def test_other_paths_are_given_back(mounts: Path, written: str, kind: type) -> None:
    assert local_path(kind(written)) == Path(written)


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("written", ["s3://shelf/a", "https://example.org/a", "file:///a", "GS://shelf/a", "hdfs://"])
def test_other_schemes_are_refused(mounts: Path, written: str, kind: type) -> None:
    scheme = written.partition(":")[0]
    assert problem(kind(written)).startswith(f"{scheme}://")
    assert f"{scheme}:// is not supported; expected a path, or gs://BUCKET/..." in problem(kind(written))


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("written", ["gs://", "gs://Shelf/a", "gs://../a", "gs://shelf/../other/a", "gs://-x/a"])
def test_what_is_no_place_in_a_bucket_is_refused(mounts: Path, written: str, kind: type) -> None:
    assert "expected gs://BUCKET/..., with a bucket's name and without '..'" in problem(kind(written))


@pytest.mark.parametrize("written", ["gs://other/a/b", Path("gs://other/a/b")])
def test_a_bucket_that_is_not_mounted_is_named_with_the_command_that_mounts_it(
    mounts: Path, written: str | Path
) -> None:
    place = f"'{mounts}/other'"
    assert problem(written) == (
        f"gs://other/a/b: bucket other is not mounted: {mounts}/other is not there "
        "(ALMOST_JAX_GCS may name another folder than /gcs); "
        f'mount it by: sudo install -d -o "$USER" {place} && gcsfuse --implicit-dirs --rename-dir-limit=200000 '
        f"--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 other {place}"
    )


def test_an_empty_folder_is_what_a_mount_left_behind(mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mounts / "gone").mkdir()
    assert f"{mounts}/gone is empty" in problem("gs://gone/a")
    for mount in (mounts / "gone", mounts):
        with monkeypatch.context() as patch:
            patch.setattr(os.path, "ismount", lambda path, mount=mount: Path(path) == mount)
            assert local_path("gs://gone/a") == mounts / "gone" / "a"


def test_mounts_lie_below_gcs_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv(paths.VARIABLE, raising=False) if value is None else monkeypatch.setenv(paths.VARIABLE, "")
        assert "/gcs/no-such-bucket is not there" in problem("gs://no-such-bucket/a")


def test_a_model_at_home_is_found_with_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As after `--model=~/m`, which a shell leaves as it is.
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert locate("~/m") == str(tmp_path / "m") and locate("~/n") == "~/n"
