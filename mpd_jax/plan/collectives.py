"""Bytes that a compiled program sends between chips: its collectives, times the trips of the loops they stand in.

A chip of a group of n sends, on a ring: all-gather (n - 1) parts, reduce-scatter (n - 1) / n of its input, all-reduce
twice that, all-to-all (n - 1) / n, a permute all of it. A loop whose trips the compiler does not know counts once. A
collective that runs beside other work stands in several fusions under one channel, and counts once. libtpu writes a
reduce-scatter as an all-reduce in a computation of its own, called all-reduce-scatter.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
WIDTHS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r"(?:^|[\s)])([a-z][a-z0-9\-]*)\(")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations)=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)\}?")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+)")
TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)')


@dataclass
class _Computation:
    sent: list[tuple[str, str, float]]  # kind, channel, bytes
    called: list[tuple[str, int | str]]  # name, and times or the loop condition that says them
    constants: dict[str, int]
    scatters: bool = False
    limit: int | None = None  # of a loop condition `counter < limit`; loops of a scan count from 0


def sent_bytes(hlo: str) -> dict[str, float]:
    """Bytes one chip sends when the program runs once, by kind of collective."""
    computations, entry = _read(hlo)
    times: dict[str, float] = defaultdict(float)

    def visit(name: str, runs: float) -> None:
        if name in computations:
            times[name] += runs
            for callee, trips in computations[name].called:
                visit(callee, runs * (_limit(computations.get(trips)) if isinstance(trips, str) else trips))

    visit(entry, 1)
    by_channel: dict[tuple[str, str], float] = {}
    for name, runs in times.items():
        for kind, channel, amount in computations[name].sent:
            by_channel[kind, channel] = max(by_channel.get((kind, channel), 0), runs * amount)
    total: dict[str, float] = defaultdict(float)
    for (kind, _), amount in by_channel.items():
        total[kind] += amount
    return dict(total)


def _limit(condition: "_Computation | None") -> int:
    return 1 if condition is None or condition.limit is None else condition.limit


def _read(hlo: str) -> tuple[dict[str, _Computation], str]:
    sizes: dict[str, int] = {}
    computations: dict[str, _Computation] = {}
    current, entry = _Computation([], [], {}), ""
    for line in hlo.splitlines():
        if head := COMPUTATION.match(line.strip()) if line and not line[0].isspace() else None:
            scatters = head[1].startswith("all-reduce-scatter")
            current = computations[head[1]] = _Computation([], [], {}, scatters)
            entry = head[1] if line.startswith("ENTRY") else entry
        elif found := INSTRUCTION.match(line):
            sizes[found[1]] = _instruction(found[1], found[2], sizes, current)
    return computations, entry


def _instruction(name: str, text: str, sizes: dict[str, int], current: _Computation) -> int:
    """Reads one instruction into its computation; returns the bytes of its result."""
    opcode = OPCODE.search(text)
    if not opcode:
        return 0
    result, rest = text[: opcode.start(1)], text[opcode.end(1) :]
    operation = opcode[1].removesuffix("-start")
    if operation == "all-reduce" and current.scatters:
        operation = "reduce-scatter"
    if operation in KINDS:
        channel = re.search(r"channel_id=(\d+)", rest)
        amount = _sent(operation, _operands(rest, sizes), _group(rest))
        current.sent.append((operation, channel[1] if channel else name, amount))
    elif operation not in ("async-done", "async-update"):
        current.called.extend((callee, _trips(operation, rest)) for callee in _callees(rest))
    if operation == "constant" and (value := re.match(r"\((\d+)\)", rest)):
        current.constants[name] = int(value[1])
    if operation == "compare" and "direction=LT" in rest:
        current.limit = current.constants.get(rest.split(")")[0].rpartition("%")[2])
    return _bytes(result)


def _trips(operation: str, rest: str) -> int | str:
    if operation != "while":
        return 1
    if known := TRIPS.search(rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    return condition[1] if condition else 1


def _callees(rest: str) -> list[str]:
    names = [name for match in CALLED.finditer(rest) for name in match[1].split(",")]
    names += [name for match in BRANCHES.finditer(rest) for name in (match[1] or match[2]).split(",")]
    return [name.strip().lstrip("%") for name in names]


def _operands(rest: str, sizes: dict[str, int]) -> int:
    """Bytes of the arguments in the parentheses that `rest` begins with."""
    depths = accumulate((letter == "(") - (letter == ")") for letter in rest)
    given = rest[: next((at for at, depth in enumerate(depths) if depth == 0), len(rest))]
    names = re.findall(r"%([\w.\-]+)", given)
    return sum(sizes.get(name, 0) for name in names) if names else _bytes(given)


def _group(rest: str) -> int:
    """Chips of one replica group."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    return 2 if "source_target_pairs" in rest else 1


def _sent(kind: str, given: int, group: int) -> float:
    match kind:
        case "all-gather":
            return given * (group - 1)
        case "all-reduce":
            return 2 * given * (group - 1) / group
        case "collective-permute":
            return given
        case _:
            return given * (group - 1) / group


def _bytes(text: str) -> int:
    """Bytes of every array shape in a piece of HLO text."""
    total = 0
    for kind, sizes in SHAPE.findall(text):
        bits = WIDTHS.get(kind) or next((int(n) for n in re.findall(r"^[suf](\d+)", kind)), 0)
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total
