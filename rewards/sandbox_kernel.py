"""What a sandboxed process gives up, as plain system calls: namespaces, root, files, calls, limits.

Invariant: standard library only, because this module is loaded by `rewards.sandbox_zygote` in an
interpreter without site-packages; each function raises `OSError` when the kernel refuses, and the
caller then runs nothing. The layers are listed in `rewards.sandbox`.
"""

import ctypes
import functools
import os
import platform
import resource
import signal
import struct

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_CLONE_THREAD = 0x10000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 1, 2, 4, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_AUDIT_ARCH_X86_64 = 0xC000003E
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38
_SYS_PIVOT_ROOT, _SYS_CAPSET, _SYS_CLONE, _SYS_CLONE3, _SYS_IOCTL = 155, 126, 56, 435, 16
_SYS_OPEN, _SYS_OPENAT, _SYS_FCNTL, _SYS_PRLIMIT = 2, 257, 72, 302
_IOCTLS = (0x5401, 0x5421, 0x5450, 0x5451)  # TCGETS, FIONBIO, FIONCLEX, FIOCLEX
# Copies, flags and record locks; no owner or choice of signals, no leases.
_FCNTLS = (*range(8), 1030)
_O_TRUNC, _O_ACCMODE = 0x200, 3
# x86-64 numbers of all that single-process Python needs: memory, open files, time, threads, polls.
_ALLOWED = (
    *range(16), *range(17, 29), 32, 33, 34, 35, 36, 37, 38, 39, 53, 60, 63, 74, 75, 76, 77,
    78, 79, 80, 82, 83, 84, 85, 87, 89, 90, 95, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 111,
    131, 158, 186, 202, 204, 217, 218, 219, 228, 229, 230, 231, 232, 233, 257, 258, 262, 263, 264,
    267, 269, 270, 271, 273, 274, 280, 281, 290, 291, 292, 293, 316, 318, 332, 334, 439,
)  # fmt: skip
# Of these, what changes a path: truncate, rename, mkdir, rmdir, creat, unlink, chmod, utimensat and
# their kin. Landlock knows nothing of modes and times.
_PATH_CHANGES = (76, 82, 83, 84, 85, 87, 90, 258, 263, 264, 280, 316)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def die_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def enter_slot(read_only: list[str]) -> None:
    """What all runs of a zygote share: a user namespace with rights over nothing but its own
    namespaces, an empty network, and a read-only root of its own. `enter_run` needs it.

    Real root builds the root directory first and then becomes `nobody`; another user maps itself.
    """
    flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWCGROUP
    proc = os.open("/proc", os.O_PATH)
    if os.getuid() == 0:
        _check(_libc.unshare(CLONE_NEWNS), "unshare")
        enter_root(read_only)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self/uid_map is not ours
        _unshare(flags, proc)
    else:
        _unshare(flags | CLONE_NEWNS, proc)
        enter_root(read_only)
    os.close(proc)
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break


def enter_run(tmp_bytes: int, tmp_files: int) -> None:
    """What each run has alone: processes (children only), IPC objects, and an empty /tmp."""
    _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC), "unshare")
    _mount(
        "none", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV,
        f"size={tmp_bytes},nr_inodes={tmp_files},mode=777",
    )  # fmt: skip


def _unshare(flags: int, proc: int) -> None:
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(flags), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                       ("gid_map", f"{gid} {gid} 1")):  # fmt: skip
        descriptor = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(descriptor, text.encode())
        os.close(descriptor)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags),
        data.encode() or None,
    )  # fmt: skip
    _check(result, f"mount {target}")


def enter_root(read_only: list[str]) -> None:
    """A root of its own: the given directories read-only, three devices and an empty /tmp. Nothing
    else of the machine exists there.
    """
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    base = "/tmp"
    sources = {path: os.open(path, os.O_PATH) for path in read_only}
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in ("null", "zero", "urandom")}
    _mount("none", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=256,mode=755")
    for path, descriptor in sources.items():
        os.makedirs(base + path, exist_ok=True)
        _mount(f"/proc/self/fd/{descriptor}", base + path, "", _MS_BIND | _MS_REC)
        locked = _MS_NOSUID | _MS_NODEV
        _mount("none", base + path, "", _MS_BIND | _MS_REMOUNT | _MS_RDONLY | locked)
        os.close(descriptor)
    os.makedirs(f"{base}/dev")
    for name, descriptor in devices.items():
        os.close(os.open(f"{base}/dev/{name}", os.O_CREAT | os.O_WRONLY))
        _mount(f"/proc/self/fd/{descriptor}", f"{base}/dev/{name}", "", _MS_BIND)
        os.close(descriptor)
    for name in ("old", "tmp"):
        os.makedirs(f"{base}/{name}")
    os.chdir(base)
    _check(_libc.syscall(_SYS_PIVOT_ROOT, b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old", _MNT_DETACH), "umount")
    os.rmdir("/old")
    _mount("none", "/", "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def drop_capabilities() -> None:
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_libc.syscall(_SYS_CAPSET, header, nothing), "capset")


def set_limits(memory_bytes: int, cpu_s: int, file_bytes: int, threads: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_STACK: 64 << 20,
    }
    if threads:
        limits[resource.RLIMIT_NPROC] = threads
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))


def num_threads(pid: int) -> int:
    """Of a process; 0 without /proc, as after `enter_slot`, where RLIMIT_NPROC counts them."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:
        return 0


def no_new_privileges() -> None:
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def landlock_abi() -> int:
    """The Landlock version of this kernel; 0 without it."""
    return max(0, _libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def enter_landlock(readable: list[str], writable: list[str]) -> None:
    """Only these directories and files from now on; no TCP, signals or abstract sockets outside."""
    abi = landlock_abi()
    if abi < 1:
        raise OSError(_ENOSYS, "the kernel has no Landlock")
    handled = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    fields = [handled] + ([3] if abi >= 4 else []) + ([3] if abi >= 6 else [])
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    size = ctypes.c_size_t(len(attributes))
    ruleset = _check(_libc.syscall(444, attributes, size, ctypes.c_uint32(0)), "landlock")
    for paths, access in ((readable, 0b1101), (writable, handled & ~0b1111111000000 | 0b110010110)):
        for path in paths:
            descriptor = os.open(path, os.O_PATH)
            wanted = access if os.path.isdir(path) else access & 0b110 | (access & 1 << 14)
            rule = struct.pack("=Qi", wanted & handled, descriptor)
            _check(_libc.syscall(445, ruleset, 1, rule, ctypes.c_uint32(0)), f"landlock {path}")
            os.close(descriptor)
    _check(_libc.syscall(446, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")
    os.close(ruleset)


def enter_seccomp(tier: str) -> None:
    """Only `_ALLOWED` system calls, threads but no processes; a foreign ABI is killed."""
    code = seccomp_program(tier)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    )
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, filters, 0, 0), "seccomp")


_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


@functools.cache
def seccomp_program(tier: str) -> bytes:
    """The filter as the kernel reads it. In tier `landlock`, whose files are the machine's, no call
    changes a path, and `open` asks for reading or writing, which Landlock guards: to truncate, for
    writing. Raises `OSError` on a machine without a call table.
    """
    if platform.machine() != "x86_64":
        raise OSError(_ENOSYS, f"no system call table for {platform.machine()}")
    allow, kill = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x80000000)
    deny, no_tty, no_call = ((0x06, 0, 0, 0x00050000 | e) for e in (_EPERM, _ENOTTY, _ENOSYS))

    def load(offset: int) -> _Instruction:
        return (0x20, 0, 0, offset)

    def argument(index: int, half: int = 0) -> _Instruction:
        return load(16 + 8 * index + 4 * half)

    def when(value: int, result: _Instruction) -> list[_Instruction]:
        return [(0x15, 0, 1, value), result]

    def unless(value: int, result: _Instruction) -> list[_Instruction]:
        return [(0x15, 1, 0, value), result]

    def one_of(values: tuple[int, ...], otherwise: _Instruction) -> list[_Instruction]:
        return [*(i for value in values for i in when(value, allow)), otherwise]

    rules: dict[int, list[_Instruction]] = {
        _SYS_CLONE: [argument(0), (0x45, 0, 1, _CLONE_THREAD), allow, deny],
        _SYS_CLONE3: [no_call],
        _SYS_IOCTL: [argument(1), *one_of(_IOCTLS, no_tty)],
        _SYS_FCNTL: [argument(1), *one_of(_FCNTLS, deny)],
        # Its own limits, and CPU time only to be read: who shortens it looks killed from outside.
        _SYS_PRLIMIT: [
            argument(0), *unless(0, deny),
            argument(1), *unless(resource.RLIMIT_CPU, allow),
            argument(2), *unless(0, deny), argument(2, half=1), *unless(0, deny), allow,
        ],
    }  # fmt: skip
    allowed = _ALLOWED
    if tier == "landlock":
        allowed = tuple(number for number in _ALLOWED if number not in _PATH_CHANGES)
        for number, index in ((_SYS_OPEN, 1), (_SYS_OPENAT, 2)):
            rules[number] = [
                argument(index), (0x54, 0, 0, _O_TRUNC | _O_ACCMODE),
                *when(_O_TRUNC, deny), *when(_O_ACCMODE, deny),
                *when(_O_TRUNC | _O_ACCMODE, deny), allow,
            ]  # fmt: skip
    rules = rules | {number: [allow] for number in allowed if number not in rules}
    program = [load(4), *unless(_AUDIT_ARCH_X86_64, kill)]
    program += [load(0), (0x35, 0, 1, 0x40000000), deny]
    for number, block in rules.items():
        program += [(0x15, 0, len(block), number), *block]
    program.append(deny)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
