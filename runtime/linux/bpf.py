"""bpf(2) for one purpose: the device program of a cgroup v2 (BPF_PROG_TYPE_CGROUP_DEVICE, since Linux 4.15).

A program is assembled from a device policy, loaded once and attached to any number of cgroups. Programs carry a name,
so that ours can be told from those that others (systemd) attached to the same cgroup; all of them must agree.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from typing import Final

from runtime.linux.lib import SyscallError, byref, syscall

NAME: Final = b"crib_devices"

_ATTRIBUTES_BYTES: Final = 128  # larger than any attribute used here; the kernel wants the unknown rest zeroed
_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH = 5, 8, 9
_PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _PROG_QUERY = 13, 15, 16
_TYPE_CGROUP_DEVICE: Final = 15
_ATTACH_CGROUP_DEVICE: Final = 6
_F_ALLOW_MULTI, _F_REPLACE = 2, 4
_MOST_PROGRAMS: Final = 64  # BPF_CGROUP_MAX_PROGS

# struct bpf_cgroup_dev_ctx: u32 access_type (access << 16 | device type), u32 major, u32 minor
_DEVICE_TYPES: Final = {"b": 1, "c": 2}
_ACCESS: Final = {"m": 1, "r": 2, "w": 4}

# Opcodes (include/uapi/linux/bpf.h): class | operation | source.
_LOAD_WORD: Final = 0x61  # dst = *(u32 *)(src + offset)
_MOV_IMM, _MOV_REG, _AND_IMM, _RSH_IMM = 0xB4, 0xBC, 0x54, 0x74  # on 32 bits
_JEQ_IMM, _JNE_IMM, _JNE_REG = 0x16, 0x56, 0x5E  # on 32 bits, since Linux 5.1
_EXIT: Final = 0x95
_R0, _CONTEXT, _TYPE, _ASKED, _MAJOR, _MINOR, _SCRATCH = 0, 1, 2, 3, 4, 5, 6


def assemble(default_allow: bool, exceptions: Iterable[tuple[str, int | None, int | None, str]]) -> bytes:
    """The program for "allow (or deny) all but the exceptions": its instructions, 8 bytes each.

    An exception is (type "c" or "b", major, minor, access of "rwm"); None stands for every number. What is denied by
    default is allowed where one exception covers all that is asked; what is allowed by default is denied where an
    exception covers any of it (the rule of the v1 controller: security/device_cgroup.c).
    """
    code = [
        _instruction(_LOAD_WORD, _TYPE, _CONTEXT, 0),
        _instruction(_MOV_REG, _ASKED, _TYPE),
        _instruction(_AND_IMM, _TYPE, imm=0xFFFF),
        _instruction(_RSH_IMM, _ASKED, imm=16),
        _instruction(_LOAD_WORD, _MAJOR, _CONTEXT, 4),
        _instruction(_LOAD_WORD, _MINOR, _CONTEXT, 8),
    ]
    for device_type, major, minor, access in exceptions:
        mask = sum(_ACCESS[letter] for letter in set(access))
        # Each test leaves the block where it does not match: (opcode, register, source, immediate).
        tests = [(_JNE_IMM, _TYPE, 0, _DEVICE_TYPES[device_type])]
        if major is not None:
            tests.append((_JNE_IMM, _MAJOR, 0, major))
        if minor is not None:
            tests.append((_JNE_IMM, _MINOR, 0, minor))
        masked: list[bytes] = []
        if mask != 7:
            masked = [_instruction(_MOV_REG, _SCRATCH, _ASKED), _instruction(_AND_IMM, _SCRATCH, imm=mask)]
            tests.append((_JEQ_IMM, _SCRATCH, 0, 0) if default_allow else (_JNE_REG, _SCRATCH, _ASKED, 0))
        block = [*masked, *[b""] * len(tests), *_return(not default_allow)]
        for index, (opcode, register, source, imm) in enumerate(tests, start=len(masked)):
            block[index] = _instruction(opcode, register, source, len(block) - index - 1, imm)
        code += block
    return b"".join([*code, *_return(default_allow)])


def _return(allow: bool) -> list[bytes]:
    return [_instruction(_MOV_IMM, _R0, imm=int(allow)), _instruction(_EXIT)]


def _instruction(opcode: int, dst: int = 0, src: int = 0, offset: int = 0, imm: int = 0) -> bytes:
    return struct.pack("=BBhI", opcode, src << 4 | dst, offset, imm)


def load(program: bytes) -> int:
    """Load an assembled program; returns its descriptor. Raises SyscallError."""
    instructions = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = struct.pack(
        "=IIQQIIQII16s",
        _TYPE_CGROUP_DEVICE,
        len(program) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(licence),
        0,  # log level, size and buffer
        0,
        0,
        0,  # kern_version
        0,  # prog_flags
        NAME,
    )
    return _bpf(_PROG_LOAD, attributes)


def attach(cgroup: int, program: int) -> None:
    """Make `program` the device program of ours on the cgroup directory `cgroup` (both descriptors).

    One of ours that is there is replaced in one step (BPF_F_REPLACE, since Linux 5.6): at no time is the cgroup
    without one. Programs of others stay. Raises SyscallError.
    """
    present = _ours(cgroup)
    try:
        if not present:
            _attach(cgroup, program, _F_ALLOW_MULTI, 0)
            return
        try:
            _attach(cgroup, program, _F_ALLOW_MULTI | _F_REPLACE, present[0])
        except SyscallError as error:
            if error.errno != errno.EEXIST:  # the same program is attached already
                raise
        for extra in present[1:]:
            _detach(cgroup, extra)
    finally:
        _close(present)


def detach(cgroup: int) -> None:
    """Take every device program of ours off the cgroup directory `cgroup`. Raises SyscallError."""
    present = _ours(cgroup)
    try:
        for program in present:
            _detach(cgroup, program)
    finally:
        _close(present)


def attached(cgroup: int) -> int:
    """How many device programs of ours the cgroup directory `cgroup` has. Raises SyscallError."""
    present = _ours(cgroup)
    _close(present)
    return len(present)


def _attach(cgroup: int, program: int, flags: int, replaced: int) -> None:
    _bpf(_PROG_ATTACH, struct.pack("=IIIII", cgroup, program, _ATTACH_CGROUP_DEVICE, flags, replaced))


def _detach(cgroup: int, program: int) -> None:
    try:
        _bpf(_PROG_DETACH, struct.pack("=III", cgroup, program, _ATTACH_CGROUP_DEVICE))
    except SyscallError as error:
        if error.errno != errno.ENOENT:
            raise


def _ours(cgroup: int) -> list[int]:
    """Descriptors of the attached programs that carry our name."""
    ids = (ctypes.c_uint32 * _MOST_PROGRAMS)()
    query = ctypes.create_string_buffer(
        struct.pack("=IIIIQI", cgroup, _ATTACH_CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), _MOST_PROGRAMS),
        _ATTRIBUTES_BYTES,
    )
    syscall("bpf", _PROG_QUERY, byref(query), _ATTRIBUTES_BYTES)
    (count,) = struct.unpack_from("=I", query, 24)
    ours: list[int] = []
    for program_id in ids[:count]:
        try:
            program = _bpf(_PROG_GET_FD_BY_ID, struct.pack("=I", program_id))
        except SyscallError as error:
            if error.errno == errno.ENOENT:  # gone since the query
                continue
            _close(ours)
            raise
        if _name(program) == NAME:
            ours.append(program)
        else:
            os.close(program)
    return ours


def _name(program: int) -> bytes:
    info = ctypes.create_string_buffer(80)  # struct bpf_prog_info up to and with `name`
    _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", program, len(info), ctypes.addressof(info)))
    return info.raw[64:].rstrip(b"\0")


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    return syscall("bpf", command, byref(buffer), _ATTRIBUTES_BYTES)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
