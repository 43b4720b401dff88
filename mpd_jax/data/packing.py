"""Which row each trajectory of a step lies in, and the shape of the arrays that hold the rows.

A pure function of lengths: the same on every host and at a resumed step. Every distinct shape is compiled once, so
lengths of rows are 2^k or 3 * 2^k, their number a multiple of what divides over the devices, four steps an octave.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHORTEST = 32


@dataclass(frozen=True)
class Packing:
    """members: for each row that holds any, its trajectories by number. The rest is the shape of the batch's arrays."""

    members: tuple[tuple[int, ...], ...]
    rows: int
    student: int
    target: int
    responses: int

    @property
    def area(self) -> int:
        return self.rows * (self.student + self.target)


def two_bits(length: int) -> int:
    """The smallest number of the form 2^k or 3 * 2^(k-1), 32 or more, that holds `length`: two an octave."""
    power = max(SHORTEST, 1 << max(length - 1, 0).bit_length())
    return power * 3 // 4 if power * 3 // 4 >= max(length, SHORTEST) else power


def three_bits(count: int) -> int:
    """The smallest of 1, 2, ... 8, 10, 12, 14, 16, 20, ... that is not below `count`: four an octave."""
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return max(1, -(-count // step) * step)


def pack(
    student: Sequence[int],
    target: Sequence[int],
    responses: Sequence[int],
    *,
    row_length: int,
    multiple: int,
    alone: bool = False,
) -> Packing:
    """The packing of least area in rows of at most `row_length`, the shorter rows if two are equal.

    student, target: tokens of each trajectory, prompt included, on either side; responses: without. multiple: what the
    number of rows has to be divisible by. alone: one trajectory a row, in the order given.
    """
    both = np.array([student, target], np.int64).reshape(2, -1)
    shortest = min(two_bits(int(both.max(initial=1))), row_length)
    if alone:
        return _shaped([(i,) for i in range(both.shape[1])], both, responses, shortest, multiple)
    lengths = {row_length}
    while shortest < row_length:
        lengths.add(shortest)
        shortest = two_bits(shortest + 1)
    packings = [_shaped(_first_fit(both, length), both, responses, length, multiple) for length in sorted(lengths)]
    return min(packings, key=lambda packing: packing.area)


def _shaped(
    members: list[tuple[int, ...]], both: np.ndarray, responses: Sequence[int], length: int, multiple: int
) -> Packing:
    """Rows of `length`; a side that needs no half of it, or no quarter, gets that much."""

    def width(lengths: Sequence[int]) -> int:
        fullest, enough = max((sum(int(lengths[i]) for i in row) for row in members), default=1), length
        while enough % 2 == 0 and enough // 2 >= max(fullest, SHORTEST):
            enough //= 2
        return enough

    rows = multiple * three_bits(-(-len(members) // multiple))
    return Packing(tuple(members), rows, width(both[0]), width(both[1]), width(responses))


def _first_fit(both: np.ndarray, length: int) -> list[tuple[int, ...]]:
    """First-fit decreasing by the longer side: each trajectory into the first row with room for both its sides."""
    members: list[list[int]] = []
    room = np.zeros((2, both.shape[1]), np.int64)
    for i in np.argsort(-both.max(axis=0), kind="stable"):
        fits = (room[:, : len(members)] >= both[:, i, None]).all(axis=0)
        row = int(fits.argmax()) if fits.any() else len(members)
        if row == len(members):
            members.append([])
            room[:, row] = length
        members[row].append(int(i))
        room[:, row] -= both[:, i]
    return [tuple(row) for row in members]
