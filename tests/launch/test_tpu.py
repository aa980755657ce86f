"""launch/tpu.sh against a gcloud that plays a TPU of two hosts: what it calls, and that the calls do their work."""

import contextlib
import getpass
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from almost_jax.io import paths

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
PLACE = ["--zone", "us-west4-a", "--project", "lab"]
TYPE = ["--type", "v5litepod-16", "--spot"]
BUCKET = ["--bucket", "gs://shelf/pod"]
MOUNT = ["--mount", "gs://shelf"]
COUNT = "echo it says 'good day' by $(command -v python); echo $(($(cat runs/count 2>/dev/null) + 1)) > runs/count"
COMMAND = ["--", "bash", "-c", COUNT]


class Cloud:
    """The fake cloud, and tpu.sh run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        # Isolated (-I) and without site packages (-S) it starts fast.
        self.tool("gcloud", f'exec {sys.executable} -I -S {Path(__file__).parent / "fake_gcloud.py"} "$@"')
        # What set-up does with the real one takes minutes and the network.
        made = 'mkdir -p "${!#}/bin" && touch "${!#}/bin/python" && chmod +x "${!#}/bin/python"'
        self.tool("python3", f'echo "$@" >> {folder}/python3; [[ $3 != venv ]] || {{ {made}; }}')
        for name in ("sudo", "gcsfuse", "lsb_release"):
            self.tool(name, f'echo "$FAKE_HOST {name} $*" >> {folder}/host_calls')
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "FAKE_GCLOUD": str(folder),
            "ALMOST_POLL_SECONDS": "0",
            "ALMOST_SAVE_SECONDS": "1",
        }

    def tool(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        line = [str(argument) for argument in (self.folder / "repo/launch/tpu.sh", *arguments)]
        return subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=300)

    def done(self, *arguments: str | Path) -> str:
        finished = self.run(*arguments)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def calls(self) -> list[list[str]]:
        """The calls made from the user's machine since the last time."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [entry["call"] for entry in map(json.loads, lines) if entry["host"] is None]

    def host_calls(self) -> list[str]:
        """The calls of tools that hosts made, each behind the host's number."""
        path = self.folder / "host_calls"
        return path.read_text().splitlines() if path.exists() else []

    def host(self, number: int) -> Path:
        return self.folder / "hosts" / str(number) / "almost_jax"

    def bucket(self) -> Path:
        return self.folder / "buckets/shelf/pod"

    def kill(self) -> None:
        """Kill what runs on the hosts: the command and the saver alike have the fake host's environment."""
        here = f"FAKE_GCLOUD={self.folder}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                variables = path.read_bytes().split(b"\0")
                if here in variables and any(variable.startswith(b"FAKE_HOST=") for variable in variables):
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def preempt(self) -> None:
        """Take the hosts away, with all that runs there."""
        self.kill()
        shutil.rmtree(self.folder / "hosts")
        (self.folder / "state").write_text("SUSPENDED")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    found = Cloud(tmp_path)
    # A repository of its own: what is committed there is what is sent.
    shutil.copytree(LAUNCH, tmp_path / "repo/launch")
    git = ["git", "-C", str(tmp_path / "repo"), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "launch"]):
        subprocess.run([*git, *arguments], check=True)
    yield found
    found.kill()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def printed(output: str) -> list[list[str]]:
    """The gcloud commands that a dry run printed."""
    lines = [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]
    return [line for line in lines if line[0] == "gcloud"]


def test_shellcheck_is_content() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, *sorted(map(str, LAUNCH.glob("*.sh")))], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_create_asks_for_a_queued_resource(cloud: Cloud) -> None:
    cloud.done("create", "pod", *PLACE, *TYPE)
    assert cloud.calls() == [
        ["gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", "--zone=us-west4-a"]
        + ["--project=lab", "--quiet", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
        + ["--spot"]
    ]


def test_setup_waits_then_sends_and_installs_on_every_host(cloud: Cloud) -> None:
    cloud.done("create", "pod", *PLACE, *TYPE)
    (cloud.folder / "queue").write_text("WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING")
    finished = cloud.run("setup", "pod", *PLACE)
    assert finished.returncode == 0, finished.stderr
    said = [line for line in finished.stderr.splitlines() if line.startswith("tpu.sh")]
    assert said == [f"tpu.sh: pod is {state}" for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")]
    for number in (0, 1):
        assert (cloud.host(number) / "source/launch/host.sh").read_text() == (LAUNCH / "host.sh").read_text()
    installed = (cloud.folder / "python3").read_text()
    for number in (0, 1):
        home = cloud.host(number)
        assert f"-m uv pip install --quiet --python {home}/venv/bin/python -e {home}/source[tpu]" in installed


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", None])
def test_setup_does_not_wait_for_what_will_not_come(cloud: Cloud, state: str | None) -> None:
    if state:
        (cloud.folder / "state").write_text(state)
    finished = cloud.run("setup", "pod", *PLACE)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("tpu.sh: ")
    assert len(cloud.calls()) == 1


def test_a_run_survives_preemption(cloud: Cloud, tmp_path: Path) -> None:
    cloud.done("create", "pod", *PLACE, *TYPE)
    cloud.done("setup", "pod", *PLACE)
    cloud.done("run", "pod", *PLACE, *BUCKET, *COMMAND)
    output = cloud.done("logs", "pod", *PLACE, "--worker", "1")
    assert f"it says good day by {cloud.host(1)}/venv/bin/python" in output
    assert (cloud.host(1) / "runs/count").read_text() == "1\n"
    eventually((cloud.bucket() / "count").exists)

    cloud.preempt()
    cloud.calls()
    resume = ["resume", "pod", *PLACE, *TYPE, *BUCKET]
    planned = printed(cloud.done(*resume, "--dry-run", *COMMAND))
    assert [call[3:5] for call in cloud.calls()] == [["queued-resources", "describe"]], "a dry run only asks"
    cloud.done(*resume, *COMMAND)
    assert cloud.calls()[1:] == planned
    cloud.done("logs", "pod", *PLACE)
    assert (cloud.host(0) / "runs/count").read_text() == "2\n", "the second run had what the first one saved"
    eventually(lambda: (cloud.bucket() / "count").read_text() == "2\n")

    finished = cloud.run(*resume, *COMMAND)
    assert (finished.returncode, finished.stdout) == (0, "")
    assert "finished; nothing to do" in finished.stderr
    for source in ([], BUCKET):
        to = tmp_path / f"fetched{len(source)}"
        cloud.done("fetch", "pod", *PLACE, "--to", to, *source)
        assert (to / "runs/count").read_text() == "2\n"
    cloud.done("delete", "pod", *PLACE)
    assert not (cloud.folder / "state").exists()


def test_resume_leaves_a_healthy_run_and_restarts_a_broken_one(cloud: Cloud) -> None:
    command = ["--", "bash", "-c", "echo started >> runs/starts; sleep 300"]
    cloud.done("create", "pod", *PLACE, *TYPE)
    cloud.done("setup", "pod", *PLACE)
    cloud.done("run", "pod", *PLACE, *command)
    assert "running; nothing to do" in cloud.run("resume", "pod", *PLACE, *TYPE, *command).stderr
    refused = cloud.run("run", "pod", *PLACE, *command)
    assert refused.returncode == 2 and "a command runs here already" in refused.stderr

    eventually((cloud.host(1) / "runs/starts").exists)
    os.killpg(int((cloud.host(1) / "job/pid").read_text()), 9)
    # Host 0 still runs: it would refuse another start, were it not stopped.
    cloud.done("resume", "pod", *PLACE, *TYPE, *command)
    starts = [cloud.host(number) / "runs/starts" for number in (0, 1)]
    eventually(lambda: [path.read_text() for path in starts] == ["started\n" * 2] * 2)


def test_resume_sets_up_a_tpu_that_came_no_further(cloud: Cloud) -> None:
    cloud.done("create", "pod", *PLACE, *TYPE)
    cloud.done("resume", "pod", *PLACE, *TYPE, *COMMAND)
    assert "good day" in cloud.done("logs", "pod", *PLACE)


def test_logs_say_that_the_command_failed(cloud: Cloud) -> None:
    cloud.done("create", "pod", *PLACE, *TYPE)
    cloud.done("setup", "pod", *PLACE)
    cloud.done("run", "pod", *PLACE, "--", "bash", "-c", "echo oh no; exit 3")
    finished = cloud.run("logs", "pod", *PLACE)
    assert finished.returncode == 2
    assert "oh no" in finished.stdout and "exit code 3" in finished.stdout


def test_runs_of_another_bucket_are_not_mixed_in(cloud: Cloud) -> None:
    cloud.done("create", "pod", *PLACE, *TYPE)
    cloud.done("setup", "pod", *PLACE)
    cloud.done("run", "pod", *PLACE, *COMMAND)
    cloud.done("logs", "pod", *PLACE)
    (cloud.bucket()).mkdir(parents=True)
    (cloud.bucket() / "precious").write_text("kept")
    assert "no bucket has" in cloud.run("run", "pod", *PLACE, *BUCKET, *COMMAND).stderr
    assert (cloud.bucket() / "precious").read_text() == "kept"


# Each verb with everything it calls, in order; `state` is what the queued resource is in before.
VERBS = {
    "create": (None, ["create", "pod", *PLACE, *TYPE]),
    "setup": ("ready", ["setup", "pod", *PLACE]),
    "run": ("ready", ["run", "pod", *PLACE, *BUCKET, *COMMAND]),
    "setup with a bucket": ("ready", ["setup", "pod", *PLACE, *MOUNT]),
    "logs": ("ready", ["logs", "pod", *PLACE]),
    "fetch": ("ready", ["fetch", "pod", *PLACE]),
    "delete": ("ready", ["delete", "pod", *PLACE]),
    "resume": ("SUSPENDED", ["resume", "pod", *PLACE, *TYPE, *BUCKET, *MOUNT, *COMMAND]),
}


def prepare(cloud: Cloud, state: str | None) -> None:
    if state == "ready":
        cloud.done("create", "pod", *PLACE, *TYPE)
        cloud.done("setup", "pod", *PLACE)
    elif state:
        (cloud.folder / "state").write_text(state)
    cloud.calls()


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_the_calls_and_makes_none(cloud: Cloud, tmp_path: Path, verb: str) -> None:
    state, arguments = VERBS[verb]
    prepare(cloud, state)
    if verb == "logs":
        cloud.done("run", "pod", *PLACE, *COMMAND)
        eventually(lambda: all((cloud.host(number) / "job/exit").exists() for number in (0, 1)))
        cloud.calls()
    place = ["--to", str(tmp_path / "to")] if verb == "fetch" else []
    before = sorted(map(str, (cloud.folder / "hosts").rglob("*")))
    planned = printed(cloud.done(*arguments[:2], "--dry-run", *place, *arguments[2:]))
    asked = cloud.calls()
    assert all(call[3:5] == ["queued-resources", "describe"] for call in asked)
    assert len(asked) == (verb == "resume")
    assert sorted(map(str, (cloud.folder / "hosts").rglob("*"))) == before
    assert not (tmp_path / "to").exists()
    cloud.done(*arguments[:2], *place, *arguments[2:])
    assert asked + planned == cloud.calls()


@pytest.mark.parametrize("verb", VERBS)
def test_a_failing_call_is_the_last_one(cloud: Cloud, tmp_path: Path, verb: str) -> None:
    state, arguments = VERBS[verb]
    prepare(cloud, state)
    place = ["--to", str(tmp_path / "to")] if verb == "fetch" else []
    planned = printed(cloud.done(*arguments[:2], "--dry-run", *place, *arguments[2:]))
    cloud.calls()
    # From the last to the first: those before the chosen one change what later calls find only once.
    for number in reversed(range(len(planned))):
        (cloud.folder / "fail").write_text(" ".join(planned[number][1:]))
        if verb == "resume":
            shutil.rmtree(cloud.folder / "hosts", ignore_errors=True)
            (cloud.folder / "state").write_text("SUSPENDED")
        elif verb == "run":
            for path in cloud.folder.glob("hosts/*/almost_jax/job/lock"):
                eventually(lambda path=path: subprocess.run(["flock", "-n", path, "true"]).returncode == 0)
        finished = cloud.run(*arguments[:2], *place, *arguments[2:])
        assert finished.returncode == 2, (planned[number], finished.stderr)
        *above, last = finished.stderr.splitlines()
        assert "PERMISSION_DENIED: chosen to fail" in "\n".join(above)
        assert last.startswith("tpu.sh: ")
        assert cloud.calls()[-1] == planned[number]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "the verb is one of"),
        (["explode", "pod"], "not 'explode'"),
        (["create"], "needs a NAME"),
        (["create", "Pod_1", "--zone", "z"], "not 'Pod_1'"),
        (["create", "pod", "--type", "v4-32"], "create needs --zone"),
        (["create", "pod", "--zone", "z"], "create needs --type"),
        (["create", "pod", "--zone", "z", "--type", "v5e-8"], "--type 'v5e-8' is not known"),
        (["create", "pod", "--zone", "--spot"], "--zone needs a value"),
        (["create", "pod", "--sonne", "z"], "unknown option '--sonne'"),
        (["run", "pod", "--zone", "z"], "run needs a command"),
        (["run", "pod", "--zone", "z", "--bucket", "gs://all", "--", "true"], "--bucket 'gs://all'"),
        (["setup", "pod", "--zone", "z", "--", "true"], "setup takes no command"),
        (["setup", "pod", "--zone", "z", "--mount", "shelf"], "--mount 'shelf' should be gs://BUCKET"),
        (["setup", "pod", "--zone", "z", "--mount", "gs://shelf/pod"], "--mount 'gs://shelf/pod' should be gs://BUCK"),
        (["logs", "pod", "--zone", "z", "--worker", "all"], "--worker 'all'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(cloud: Cloud, arguments: list[str], why: str) -> None:
    finished = cloud.run(*arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("tpu.sh: ") and finished.stderr.count("\n") == 1
    assert why in finished.stderr
    assert cloud.calls() == []


def test_hosts_share_their_runs_by_a_mount(cloud: Cloud) -> None:
    cloud.done("create", "pod", *PLACE, *TYPE)
    cloud.tool("mount.nfs", "exit 1")
    cloud.done("setup", "pod", *PLACE, "--share", "10.0.0.2:/runs")
    calls = cloud.host_calls()
    for host in range(2):
        mounted = f"{host} sudo mount -t nfs -o hard,nofail 10.0.0.2:/runs {cloud.host(host)}/runs"
        assert mounted in calls, calls
    assert (cloud.host(1) / "ready").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "runs"], "--share 'runs' should be SERVER:/EXPORT"),
        (["--share", "10.0.0.2:/runs", *BUCKET], "give --share or --bucket"),
    ],
)
def test_a_share_that_cannot_be_is_refused(cloud: Cloud, options: list[str], message: str) -> None:
    finished = cloud.run("setup", "pod", *PLACE, *options)
    assert finished.returncode == 2 and message in finished.stderr and cloud.calls() == []


# What mounts a bucket where the paths gs://shelf/... are looked for.
GCSFUSE = f"gcsfuse {' '.join(paths.OPTIONS)} shelf {paths.DEFAULT}/shelf"


def test_hosts_mount_a_bucket_where_gs_paths_are_looked_for(cloud: Cloud) -> None:
    cloud.done("create", "pod", *PLACE, *TYPE)
    cloud.done("setup", "pod", *PLACE, *MOUNT)
    for host in ("0", "1"):
        mine = [call.split(maxsplit=1)[1] for call in cloud.host_calls() if call.startswith(host)]
        assert mine == [f"sudo install -d -o {getpass.getuser()} /gcs/shelf", GCSFUSE]
    assert GCSFUSE in paths.mount_command("shelf", Path("/gcs/shelf"))
    (cloud.folder / "host_calls").unlink()
    cloud.tool("mountpoint", "exit 0")
    cloud.done("setup", "pod", *PLACE, *MOUNT)
    assert cloud.host_calls() == []


def test_gcsfuse_comes_from_googles_repository_where_it_is_missing(cloud: Cloud) -> None:
    (cloud.bin / "gcsfuse").unlink()
    log = f"{cloud.folder}/host_calls"
    # Installing makes the tool; the source of packages is written to its file through tee.
    installed = f"printf '#!/bin/sh\\necho $FAKE_HOST gcsfuse \"$*\" >> {log}\\n' > {cloud.bin}/gcsfuse"
    cloud.tool(
        "sudo",
        f'echo "$FAKE_HOST sudo $*" >> {log}; [[ $1 != tee ]] || {{ read -r line; echo "$line" >> {log}; }}\n'
        f'[[ $* != *" gcsfuse" ]] || {{ {installed}; chmod +x {cloud.bin}/gcsfuse; }}',
    )
    cloud.tool("lsb_release", "echo jammy")
    cloud.done("create", "pod", *PLACE, *TYPE)
    cloud.done("setup", "pod", *PLACE, *MOUNT)
    key, source = "/usr/share/keyrings/cloud.google.asc", "https://packages.cloud.google.com/apt"
    assert cloud.host_calls()[:7] == [
        f"0 sudo curl --fail --silent --show-error --location --output {key} {source}/doc/apt-key.gpg",
        "0 sudo tee /etc/apt/sources.list.d/gcsfuse.list",
        f"deb [signed-by={key}] {source} gcsfuse-jammy main",
        "0 sudo apt-get update --quiet",
        "0 sudo apt-get install --yes --quiet -o DPkg::Lock::Timeout=300 gcsfuse",
        f"0 sudo install -d -o {getpass.getuser()} /gcs/shelf",
        f"0 {GCSFUSE}",
    ]


def test_a_dry_run_shows_the_call_of_gcsfuse_and_what_hosts_do_before_it(cloud: Cloud) -> None:
    output = cloud.done("setup", "pod", *PLACE, *MOUNT, "--dry-run")
    *_, sent, mounted = printed(output)
    assert f"--command=bash almost_jax/source/launch/host.sh mount_bucket {GCSFUSE}" in mounted and "setup" in sent[-1]
    shown = [line.removeprefix("#   ") for line in output.splitlines() if line.startswith("#   ")]
    assert "mount_bucket() {" in shown and any("apt-get install" in line for line in shown)
    assert set(shown) < set((LAUNCH / "host.sh").read_text().splitlines())
    assert cloud.calls() == [] and cloud.host_calls() == []


def test_resume_mounts_again_what_a_host_has_lost(cloud: Cloud) -> None:
    cloud.done("create", "pod", *PLACE, *TYPE)
    cloud.done("setup", "pod", *PLACE, *MOUNT)
    (cloud.folder / "host_calls").unlink()
    cloud.done("resume", "pod", *PLACE, *TYPE, *MOUNT, *COMMAND)
    assert [f"{host} {GCSFUSE}" for host in (0, 1)] == [call for call in cloud.host_calls() if "sudo" not in call]
    assert "good day" in cloud.done("logs", "pod", *PLACE)
