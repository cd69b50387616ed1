"""A seccomp program made smaller: other instructions, the same answers.

The kernel translates a filter anew for each process that loads it, and a probe pays for each instruction. libseccomp
compares with every number of a system call; here neighbours that get the same answer are one range, ranges are searched
as a balanced tree, and what is the same, as the checks of arguments and the answers, is there once.
"""

from __future__ import annotations

import struct
from typing import Final

# Classic BPF: code, distance if true, distance if false, constant. What is loaded is a word of struct seccomp_data.
LOAD: Final = 0x20
JUMP: Final = 0x05
EQUAL: Final = 0x15
GREATER: Final = 0x25
AT_LEAST: Final = 0x35
RETURN: Final = 0x06
_AND: Final = 0x54
_COMPARISONS: Final = (EQUAL, GREATER, AT_LEAST)
NUMBER: Final = 0  # the offset of its int nr,
ARCH: Final = 4  # and of its u32 arch

_ALL: Final = 0xFFFFFFFF  # bits of a word; the largest number
_REACH: Final = 253  # 255 less the two instructions that may come between a conditional jump and where it leads

_State = tuple[int, int, int]
"""The place of the next instruction, and what is loaded then: the offset of a word, and those bits of it."""


def smaller(program: bytes) -> bytes:
    """A program that answers as this one does to every call.

    It is this one itself where that is no longer, or has an instruction that libseccomp doesn't write.
    """
    given, made = _Given(program), _Made()
    try:
        begin = made.numbers(given.ranges(None, made))
        for arch in given.arches:
            begin = made.test(EQUAL, arch, made.numbers(given.ranges(arch, made)), begin)
    except NotImplementedError:
        return program
    made.load(ARCH, _ALL, begin)
    return min(program, made.program(), key=len)


class _Made:
    """A program written from its end, so that what an instruction leads to is there before it, and nothing twice.

    A label is an instruction's place, counted from the end.
    """

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int]] = []
        self._labels: dict[tuple[int, ...], int] = {}
        self._nearest: dict[int, int] = {}

    def program(self) -> bytes:
        return b"".join(struct.pack("=HBBI", *instruction) for instruction in reversed(self._code))

    def answer(self, value: int) -> int:
        """The label of an end."""
        key = (RETURN, value)
        if key not in self._labels:
            self._labels[key] = self._write(RETURN, value)
        return self._labels[key]

    def test(self, code: int, constant: int, yes: int, no: int) -> int:
        """The label of a comparison with what is loaded."""
        if yes == no:
            return yes
        key = (code, constant, yes, no)
        if key not in self._labels:
            yes, no = self._near(yes), self._near(no)
            self._labels[key] = self._write(code, constant, self._distance(yes), self._distance(no))
        return self._labels[key]

    def load(self, word: int, bits: int, then: int) -> int:
        """The label of loading some bits of a word, before `then`."""
        key = (LOAD, word, bits, then)
        if key not in self._labels:
            if self._distance(then):
                self._write(JUMP, self._distance(then))
            if bits != _ALL:
                self._write(_AND, bits)
            self._labels[key] = self._write(LOAD, word)
        return self._labels[key]

    def numbers(self, ranges: list[tuple[int, int]]) -> int:
        """The label of going to that of the range which a call's number is in; each begins with its first number."""
        return ranges[0][1] if len(ranges) == 1 else self.load(NUMBER, _ALL, self._search(ranges))

    def _search(self, ranges: list[tuple[int, int]]) -> int:
        """The same where the number is loaded."""
        if len(ranges) == 1:
            return ranges[0][1]
        middle = len(ranges) // 2
        return self.test(AT_LEAST, ranges[middle][0], self._search(ranges[middle:]), self._search(ranges[:middle]))

    def _near(self, label: int) -> int:
        """A label within a conditional jump's reach that leads to the same."""
        near = self._nearest.get(label, label)
        if self._distance(near) > _REACH:
            code, _, _, value = self._code[label]
            near = self._write(RETURN, value) if code == RETURN else self._write(JUMP, self._distance(label))
            self._nearest[label] = near
        return near

    def _distance(self, label: int) -> int:
        """How many instructions the next one to be written would have to skip."""
        return len(self._code) - 1 - label

    def _write(self, code: int, constant: int, yes: int = 0, no: int = 0) -> int:
        self._code.append((code, yes, no, constant))
        return len(self._code) - 1


class _Given:
    """The program to be written anew. `arches`: those that it knows, once the ranges of others have been asked for."""

    def __init__(self, program: bytes) -> None:
        self.arches: list[int] = []
        self._code: list[tuple[int, int, int, int]] = list(struct.iter_unpack("=HBBI", program))
        self._written: dict[_State, int] = {}

    def ranges(self, arch: int | None, made: _Made) -> list[tuple[int, int]]:
        """The ranges that it divides the calls of `arch` into (None: of any that it doesn't know).

        Their first numbers, ascending, and the labels of what it does with each, which this writes.
        """
        found: dict[int, _State] = {}
        todo = [(0, _ALL, (0, NUMBER, 0))]
        while todo:
            first, last, (at, word, bits) = todo.pop()
            code, yes, no, constant = self._code[at]
            if code == JUMP:
                todo.append((first, last, (at + 1 + constant, word, bits)))
            elif code == LOAD and constant in (NUMBER, ARCH):
                todo.append((first, last, (at + 1, constant, _ALL)))
            elif (word, bits, code) == (ARCH, _ALL, EQUAL):
                if arch is None and constant not in self.arches:
                    self.arches.append(constant)
                todo.append((first, last, (at + 1 + (yes if constant == arch else no), word, bits)))
            elif (word, bits) == (NUMBER, _ALL) and code in _COMPARISONS:
                true = constant + (code == GREATER), constant if code == EQUAL else _ALL
                for low, high, way in ((0, true[0] - 1, no), (*true, yes), (true[1] + 1, _ALL, no)):
                    if max(first, low) <= min(last, high):
                        todo.append((max(first, low), min(last, high), (at + 1 + way, word, bits)))
            else:
                found[first] = at, word, bits
        ranges: list[tuple[int, int]] = []
        for first in sorted(found):
            label = self._write(found[first], made)
            if not ranges or ranges[-1][1] != label:
                ranges.append((first, label))
        return ranges

    def _write(self, start: _State, made: _Made) -> int:
        """The label of what it does from `start` on, as it stands: checks of arguments, an answer."""
        todo = [start]
        while todo:
            state = todo[-1]
            at, word, bits = state
            code, yes, no, constant = self._code[at]
            if code == RETURN:
                follow: list[_State] = []
            elif code == JUMP:
                follow = [(at + 1 + constant, word, bits)]
            elif code == LOAD:
                follow = [(at + 1, constant, _ALL)]
            elif code == _AND:
                follow = [(at + 1, word, bits & constant)]
            elif code in _COMPARISONS:
                follow = [(at + 1 + yes, word, bits), (at + 1 + no, word, bits)]
            else:
                raise NotImplementedError(f"instruction {code:#x}")
            missing = [one for one in follow if one not in self._written]
            if missing:
                todo += missing
                continue
            labels = [self._written[one] for one in follow]
            if code == RETURN:
                labels = [made.answer(constant)]
            elif len(set(labels)) == 2:
                labels = [made.load(word, bits, made.test(code, constant, *labels))]
            self._written[state] = labels[0]
            todo.pop()
        return self._written[start]
