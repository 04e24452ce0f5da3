"""What a compiled program does: products, memory and collectives, counted in its HLO.

XLA's own ``cost_analysis`` counts the body of a loop once. Here each loop counts as
often as it runs, which the compiler notes where it is known; so of a program with
solves of a fixed number of steps. Numbers are those of one device.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# They move nothing, or what they move is counted where it is computed.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota"}
FREE |= {"while", "conditional", "call", "after-all", "partition-id", "replica-id"}


class Counts(NamedTuple):
    """Of one run of a program, on one device.

    Attributes:
      flops: two for each multiplication of a matrix product.
      memory: bytes that instructions read and write, fused ones together.
      collectives: by kind, how many, and the bytes of their results.
      unknown: loops whose number of turns the compiler does not know.
    """

    flops: float
    memory: float
    collectives: dict[str, tuple[float, float]]
    unknown: int

    def plain(self) -> dict[str, Any]:
        """For a result file."""
        kinds = {k: {"count": n, "bytes": b} for k, (n, b) in self.collectives.items()}
        return {"flops": self.flops, "memory": self.memory, "collectives": kinds}


class _Line(NamedTuple):
    name: str
    kind: str
    shape: str
    operands: list[str]
    text: str


_LINE = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$",
)


def count(text: str) -> Counts:
    """The counts of an HLO module, as text, after the compiler's passes."""
    parts, entry = _computations(text)
    memo: dict[str, Counts] = {}

    def of(name: str, fused: bool) -> Counts:
        key = f"{name} {fused}"
        if key not in memo:
            memo[key] = _added([of_line(line, name, fused) for line in parts[name]])
        return memo[key]

    def of_line(line: _Line, inside: str, fused: bool) -> Counts:
        shapes = {other.name: other.shape for other in parts[inside]}
        flops = 0.0
        if line.kind == "dot":
            flops = 2 * _entries(line.shape) * _contracted(line, shapes)
        memory = 0.0
        if not fused and line.kind not in FREE:
            operands = [_bytes(shapes.get(name, "")) for name in line.operands]
            memory = _bytes(line.shape) + sum(operands)
        kind, collectives = line.kind.removesuffix("-start"), {}
        if kind in COLLECTIVES:
            collectives = {kind: (1.0, _bytes(line.shape))}
        found = [Counts(flops, memory, collectives, 0)]
        if line.kind == "while":
            turns = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line.text)
            body = of(_called(line, "body")[0], False)
            found.append(_times(body, int(turns[1]) if turns else 1))
            found.append(Counts(0, 0, {}, int(turns is None)))
        elif line.kind == "conditional":
            ways = [of(name, False) for name in _branches(line)]
            found.append(max(ways, key=lambda c: (len(c.collectives), c.memory)))
        elif line.kind in ("fusion", "call", "async-start"):
            closed = fused or line.kind == "fusion"
            names = _called(line, "calls") or _called(line, "to_apply")
            found += [of(name, closed) for name in names]
        return _added(found)

    return of(entry, False)


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """The instructions of each computation, and the name of the first one."""
    pattern = r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}"
    parts, entry = {}, ""
    for first, name, body in re.findall(pattern, text, re.M | re.S):
        matches = filter(None, map(_LINE.match, body.splitlines()))
        parts[name] = [_Line(m[1], m[3], m[2], _operands(m[4]), m[4]) for m in matches]
        entry = name if first else entry
    return parts, entry


def _operands(rest: str) -> list[str]:
    depth, end = 1, len(rest)
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            end = i
            break
    return re.findall(r"%([\w.\-]+)", rest[:end])


def _called(line: _Line, word: str) -> list[str]:
    return re.findall(rf"\b{word}=%?([\w.\-]+)", line.text)


def _branches(line: _Line) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", line.text)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return _called(line, "true_computation") + _called(line, "false_computation")


def _arrays(shape: str) -> list[tuple[str, list[int]]]:
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return [(t, [int(n) for n in dims.split(",") if n]) for t, dims in found]


def _bytes(shape: str) -> float:
    return sum(BYTES.get(t, 4) * math.prod(dims) for t, dims in _arrays(shape))


def _entries(shape: str) -> float:
    return sum(math.prod(dims) for _, dims in _arrays(shape))


def _contracted(line: _Line, shapes: dict[str, str]) -> float:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.text)
    (_, dims), *_ = _arrays(shapes[line.operands[0]])
    return math.prod(dims[int(i)] for i in (axes[1] if axes else "").split(",") if i)


def _added(found: list[Counts]) -> Counts:
    collectives: dict[str, tuple[float, float]] = {}
    for counts in found:
        for kind, (number, size) in counts.collectives.items():
            before = collectives.get(kind, (0.0, 0.0))
            collectives[kind] = before[0] + number, before[1] + size
    return Counts(
        sum(c.flops for c in found),
        sum(c.memory for c in found),
        collectives,
        sum(c.unknown for c in found),
    )


def _times(counts: Counts, turns: int) -> Counts:
    scaled = {k: (n * turns, b * turns) for k, (n, b) in counts.collectives.items()}
    unknown = counts.unknown
    return Counts(counts.flops * turns, counts.memory * turns, scaled, unknown)
