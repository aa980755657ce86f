"""How many bytes of a chip's memory a compiled TPU program reads, from its text.

What decoding is bounded by. Operands in the on-chip memory (S(1) in a layout) cost nothing; a fusion that updates a
buffer in place doesn't read it; an asynchronous copy reads what it brings in.
"""

import math
import re

from almost_jax.plan.hlo import BYTES, computations, trips_of

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\](\{[^}]*\})?")
# They name memory, or wait for what another instruction has read; loops are counted by what is in them.
_READS_NOTHING = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota", "opt-barrier", "while",
    "conditional", "call", "copy-done", "slice-done", "async-done", "all-reduce-done", "all-gather-done",
    "collective-permute-done",
}  # fmt: skip
_READS_ITS_RESULT = {"slice-start", "dynamic-slice", "slice", "gather"}


def read_bytes(text: str) -> int:
    """Bytes read from a chip's memory in one call, those of loops times their trips.

    Args:
        text: of the compiled program (`compiled.as_text()`).
    """
    bodies = computations(text)
    # What a fusion does inside is in its operands, so only the program itself and its loops are looked at.
    loops = set(re.findall(r"body=%?([\w.\-]+)", text))
    return sum(
        times * _reads_of(bodies.get(name, []), bodies)
        for name, times in trips_of(bodies).items()
        if name == "ENTRY" or name in loops
    )


def _reads_of(lines: list[str], bodies: dict[str, list[str]]) -> int:
    shapes: dict[str, str] = {}
    total = 0
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, operation, rest = match.groups()
        shapes[name] = shape
        if operation in _READS_NOTHING:
            continue
        if operation in _READS_ITS_RESULT:
            # A start's shape holds its operand too, and some flags; what is brought in is in the on-chip memory.
            arrays = _ARRAY.findall(shape)
            total += sum(_size(*array[:2]) for array in arrays if len(arrays) == 1 or "S(1)" in array[2])
            continue
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        inside = "\n".join(bodies.get(called[1], [])) if called else f"{operation}("
        written = [array[:2] for array in _ARRAY.findall(shape) if "S(" not in array[2]]
        for place, operand in enumerate(re.findall(r"%([\w.\-]+)", rest.split("), ")[0])):
            arrays = _ARRAY.findall(shapes.get(operand, ""))
            if len(arrays) != 1 or "S(" in arrays[0][2]:
                continue
            if "dynamic-update-slice(" in inside and arrays[0][:2] in written:
                written.remove(arrays[0][:2])
                continue
            total += _sliced(inside, place) or _size(*arrays[0][:2])
    return total


def _sliced(inside: str, place: int) -> int:
    """What a fusion reads of an operand of which it takes but a slice; 0 when it takes the whole."""
    parameter = re.search(rf"%([\w.\-]+) = [^\n]* parameter\({place}\)", inside)
    if parameter is None:
        return 0
    uses = re.findall(rf"^.*%{re.escape(parameter[1])}[,)].*$", inside, re.MULTILINE)
    if len(uses) != 1 or " dynamic-slice(" not in uses[0]:
        return 0
    array = _ARRAY.search(uses[0])
    return _size(array[1], array[2]) if array else 0


def _size(kind: str, lengths: str) -> int:
    return BYTES.get(kind, 4) * math.prod(int(length) for length in lengths.split(",") if length)
