"""The filter of system calls by its instructions: also what a new kernel denies by itself."""

import resource
import struct

import pytest

from rewards.sandbox import TIERS
from rewards.sandbox_kernel import seccomp_program

X86_64, ALLOW, EPERM = 0xC000003E, 0x7FFF0000, 0x50001
CLONE, IOCTL, FCNTL, PRLIMIT, OPEN, OPENAT = 56, 16, 72, 302, 2, 257
CHANGES = (76, 82, 83, 84, 85, 87, 90, 258, 263, 264, 280, 316)
HIGH = 1 << 32  # in a register, above what the kernel reads of an int


def verdict(tier: str, number: int, *arguments: int, machine: int = X86_64) -> int:
    """What the classic BPF program returns for `struct seccomp_data`."""
    padded = [*arguments, *[0] * 6][:6]
    data = struct.pack("=IIQ6Q", number, machine, 0, *padded)
    program = list(struct.iter_unpack("HBBI", seccomp_program(tier)))
    at = register = 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (register,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            register &= value
        else:
            holds = {0x15: register == value, 0x35: register >= value, 0x45: register & value}
            at += if_true if holds[code] else if_false


@pytest.mark.parametrize("tier", TIERS)
def test_arguments_decide_where_the_call_alone_does_not(tier: str) -> None:
    cpu, memory = resource.RLIMIT_CPU, resource.RLIMIT_AS
    allowed = [
        (CLONE, 0x10000), (IOCTL, 0, 0x5421), (PRLIMIT, 0, cpu, 0, 1), (PRLIMIT, 0, memory, 1),
        (PRLIMIT, HIGH, memory, HIGH), (OPENAT, 0, 0, 0), (OPENAT, 0, 0, 0o1101), (OPEN, 0, 0o1102),
        *((FCNTL, 0, command) for command in (*range(8), 1030)),
    ]  # fmt: skip
    denied = [
        (CLONE, 0x11), (IOCTL, 0, 0x5412), (PRLIMIT, 1, memory), (PRLIMIT, 0, cpu, 1),
        (PRLIMIT, 0, cpu, HIGH), (PRLIMIT, 0, HIGH | cpu, 1), (57,), (58,), (59,), (62,), (41,),
        *((FCNTL, 0, command) for command in (8, 10, 15, HIGH | 8, 1024, 1026, 1031)),
    ]  # fmt: skip
    assert [call for call in allowed if verdict(tier, *call) != ALLOW] == []
    assert [call for call in denied if verdict(tier, *call) == ALLOW] == []
    assert verdict(tier, 0, machine=0x40000003) == 0x80000000
    assert verdict(tier, 0x40000000) == EPERM


def test_without_files_of_its_own_a_program_changes_no_path() -> None:
    calls = range(600)
    lost = {n for n in calls if verdict("namespaces", n) != verdict("landlock", n)}
    assert lost == set(CHANGES)
    flags = (0o1000, 0o1003, 3, HIGH | 0o1000)
    opens = [c for f in flags for c in ((OPEN, 0, f), (OPENAT, 0, 0, f))]
    assert [verdict("landlock", *call) for call in opens] == [EPERM] * 8
    assert [verdict("namespaces", *call) for call in opens] == [ALLOW] * 8
