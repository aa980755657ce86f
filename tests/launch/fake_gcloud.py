"""A gcloud for tests: records calls, fails at chosen ones, and plays a TPU whose hosts are folders.

The folder $FAKE_GCLOUD holds calls.jsonl (one list of arguments a line), `fail` (a call that contains this text fails),
`state` (of the queued resource), `queue` (states it goes through before, one a line), hosts/I (the hosts' homes) and
buckets/ (Cloud Storage). `ssh` runs the command on each host for real, with the host's folder as its home.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_GCLOUD"])
HOSTS = 2


def option(arguments: list[str], name: str) -> str:
    return next(a.split("=", 1)[1] for a in arguments if a.startswith(f"--{name}="))


def fail(message: str) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return 1


def queued_resources(verb: str, arguments: list[str]) -> int:
    state = ROOT / "state"
    if verb == "create":
        if state.exists():
            return fail("ALREADY_EXISTS: it is there")
        state.write_text("ACTIVE")
        for host in range(HOSTS):
            (ROOT / "hosts" / str(host)).mkdir(parents=True)
    elif verb == "delete":
        state.unlink()
        shutil.rmtree(ROOT / "hosts", ignore_errors=True)
    elif not state.exists():
        return fail("NOT_FOUND: Resource was not found")
    else:
        queue = ROOT / "queue"
        first, *rest = (queue.read_text() if queue.exists() else "").split() or [state.read_text()]
        queue.write_text("\n".join(rest))
        print("WARNING: something beside the point", file=sys.stderr)
        print(first)
    return 0


def ssh(arguments: list[str]) -> int:
    worker, codes = option(arguments, "worker"), []
    for host in sorted((ROOT / "hosts").iterdir()):
        if worker in ("all", host.name):
            environment = {**os.environ, "HOME": str(host), "FAKE_HOST": host.name}
            line = ["bash", "-c", option(arguments, "command")]
            codes.append(subprocess.run(line, env=environment, cwd=host).returncode)
    return next((code for code in codes if code), 0)


def scp(source: str, target: str, arguments: list[str]) -> int:
    if target.endswith(":"):
        for host in (ROOT / "hosts").iterdir():
            shutil.copy(source, host)
    else:
        copied = ROOT / "hosts" / option(arguments, "worker") / source.partition(":")[2]
        shutil.copytree(copied, Path(target) / copied.name, dirs_exist_ok=True)
    return 0


def put(source: str, target: str) -> None:
    """An object of Cloud Storage is there whole, the old one or the new one."""
    partial = f"{target}.partial"
    shutil.copy(source, partial)
    os.replace(partial, target)


def local(url: str) -> Path:
    return ROOT / "buckets" / url.removeprefix("gs://") if url.startswith("gs://") else Path(url)


def storage(verb: str, source: Path, target: Path, arguments: list[str]) -> int:
    if verb == "cp":
        target.parent.mkdir(parents=True, exist_ok=True)
        put(str(source), str(target))
        return 0
    if not source.is_dir():
        return fail(f"Did not find existing container at: {source}")
    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=put)
    if "--delete-unmatched-destination-objects" in arguments:
        for path in sorted(target.rglob("*"), reverse=True):
            if not (source / path.relative_to(target)).exists():
                path.rmdir() if path.is_dir() else path.unlink()
    return 0


def main(arguments: list[str]) -> int:
    with open(ROOT / "calls.jsonl", "a") as calls:
        calls.write(json.dumps({"host": os.environ.get("FAKE_HOST"), "call": ["gcloud", *arguments]}) + "\n")
    chosen = ROOT / "fail"
    if chosen.exists() and chosen.read_text() in " ".join(arguments):
        return fail("PERMISSION_DENIED: chosen to fail")
    match arguments:
        case ["compute", "tpus", "queued-resources", verb, _, *rest]:
            return queued_resources(verb, rest)
        case ["compute", "tpus", "tpu-vm", "ssh", _, *rest]:
            return ssh(rest)
        case ["compute", "tpus", "tpu-vm", "scp", source, target, *rest]:
            return scp(source, target, rest)
        case ["storage", verb, source, target, *rest]:
            return storage(verb, local(source), local(target), rest)
    return fail(f"no such command: {arguments}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
