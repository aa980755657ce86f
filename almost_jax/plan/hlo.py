"""What a compiled TPU program moves between chips, read from its text."""

import dataclasses
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


@dataclasses.dataclass
class Traffic:
    """One kind of collective: how many a step and the bytes of their whole arrays on one chip.

    `async_bytes` are those that the compiler runs beside computation.
    """

    count: int = 0
    bytes: int = 0
    async_bytes: int = 0


def collectives(text: str) -> dict[str, Traffic]:
    """Count the collectives of a program, times the trips of the loops around them.

    A reduce-scatter stands in the text as a fusion named all-reduce-scatter around an all-reduce of the padded array,
    and an asynchronous collective as several fusions around copies of one operation, of which each channel counts once.

    Args:
        text: of the compiled program (`compiled.as_text()`).

    Returns:
        {"all-gather": ..., "all-reduce": ..., "reduce-scatter": ...} and others that occur. The bytes of a gather are
        its result's; of a reduction its operand's.
    """
    bodies = computations(text)
    trips = trips_of(bodies)
    found = {name: Traffic() for name in ("all-gather", "all-reduce", "reduce-scatter")}
    seen: set[tuple[str, str]] = set()
    for computation, lines in bodies.items():
        for line in lines:
            match = _OPERATION.match(line)
            if match is None:
                continue
            kind = "reduce-scatter" if "all-reduce-scatter" in computation else match[2]
            # Named fused_computation.N or async_collective_fusion.N.
            fused = "fused_" in computation or "_fusion" in computation
            asynchronous = match[3] is not None or fused
            channel = re.search(r"channel_id=(\d+)", line)
            if fused and channel:
                if (kind, channel[1]) in seen:
                    continue
                seen.add((kind, channel[1]))
            times = trips.get(computation, 1)
            size = _size(match[1], match[3] is not None)
            if match[2] == "reduce-scatter":
                size *= _group(line)
            traffic = found.setdefault(kind, Traffic())
            traffic.count += times
            traffic.bytes += size * times
            traffic.async_bytes += size * times * asynchronous
    return found


def computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation of a program, by name; the first one's is ENTRY."""
    bodies: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = bodies.setdefault("ENTRY" if line.startswith("ENTRY") else header[1], [])
        elif line.rstrip() == "}":  # a kernel's text has lines that begin with one
            current = None
        elif current is not None:
            current.append(line)
    return bodies


def trips_of(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs: the product of the trips of the loops around it."""
    trips = {"ENTRY": 1}
    waiting = ["ENTRY"]
    while waiting:
        name = waiting.pop()
        for line in bodies.get(name, []):
            called = _CALLED.findall(line)
            if not called:
                continue
            times = trips[name]
            if " while(" in line:
                condition = re.search(r"condition=%?([\w.\-]+)", line)
                times *= _bound(bodies.get(condition[1], [])) if condition else 1
            for other in called:
                if trips.get(other, 0) < times:
                    trips[other] = times
                    waiting.append(other)
    return trips


def _bound(condition: list[str]) -> int:
    """A loop's trips: the largest integer constant that its condition compares with, 1 when there is none."""
    constants = [int(found) for line in condition for found in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", line)]
    return max(constants, default=1) or 1


def _group(line: str) -> int:
    """How many devices a collective's group has."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(iota[1]) if iota else 1


def _size(result: str, started: bool) -> int:
    shapes = _SHAPE.findall(result)
    sizes = [
        BYTES.get(kind, 4) * math.prod(int(length) for length in lengths.split(",") if length)
        for kind, lengths in shapes
    ]
    # A "-start" returns its operand, its result and some flags.
    return max(sizes, default=0) if started else sum(sizes)
