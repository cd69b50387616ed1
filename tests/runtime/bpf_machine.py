"""A machine for classic BPF as seccomp uses it: what a filter answers, without loading it."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def run(program: bytes, arch: int, number: int, arguments: Sequence[int] = ()) -> int:
    """The filter's return value for one struct seccomp_data (see seccomp(2))."""
    values = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=iIQ6Q", number if number < 1 << 31 else number - (1 << 32), arch, 0, *values)
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, yes, no, constant = code[at]
        at += 1
        match operation:
            case 0x20:  # load a word
                (accumulator,) = struct.unpack_from("=I", data, constant)
            case 0x54:  # and
                accumulator &= constant
            case 0x05:  # jump
                at += constant
            case 0x15:
                at += yes if accumulator == constant else no
            case 0x25:
                at += yes if accumulator > constant else no
            case 0x35:
                at += yes if accumulator >= constant else no
            case 0x06:
                return int(constant)
            case _:
                raise AssertionError(f"instruction {operation:#x}")
