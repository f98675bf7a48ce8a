"""What the process that opens pickles may still do: nearly nothing. Each wall stands where the system has it, and says so.

- `leave_network`, before anything is imported: a network namespace without devices (Linux).
- `limit`: memory, CPU time, file sizes, open files, processes (POSIX).
- `no_new_privileges`, `die_with_parent`, `filter_calls`: Linux; the filter, on x86-64 and arm64, ends the process at a socket
  or an exec, whoever asks for it.
- `watch`, everywhere: an audit hook that ends the process at any event that is not known to be harmless, be it a socket, a
  process, an import, an ``exec``, or a file outside the working folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

# Audit events that change nothing outside this process; "open" is looked at, and any other ends it.
_HARMLESS = {
    "array.__new__", "builtins.id", "mmap.__new__", "object.__delattr__", "object.__getattr__", "object.__setattr__",
    "sys._getframe", "sys._getframemodulename", "sys.excepthook", "sys.unraisablehook", "time.sleep",
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# (number on x86-64, on arm64; None where there is none). A call of the first group ends the process, one of the second fails.
_KILLED = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "socketpair": (53, 199),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kill": (62, 129), "mount": (165, 40),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "userfaultfd": (323, 282),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "keyctl": (250, 219), "memfd_create": (319, 279),
}  # fmt: skip
_DENIED = {"clone": (56, 220), "clone3": (435, 435)}
_MACHINES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}  # column above, audit name, seccomp()


def leave_network() -> bool:
    """Enter namespaces of one's own, of users and of the network; of the network alone where users are not to be had.
    It works in a process of one thread only."""
    user, network = 0x10000000, 0x40000000
    try:
        unshare, ids = ctypes.CDLL(None).unshare, (os.getuid(), os.getgid())
    except (AttributeError, OSError, TypeError):
        return False
    if unshare(user | network) == 0:
        for file, text in (("setgroups", "deny"), ("uid_map", f"{ids[0]} {ids[0]} 1"), ("gid_map", f"{ids[1]} {ids[1]} 1")):
            with contextlib.suppress(OSError):
                Path("/proc/self", file).write_text(text)
        return True
    return bool(unshare(network) == 0)


def die_with_parent() -> bool:
    return _prctl(1, 9)


def no_new_privileges() -> bool:
    return _prctl(38, 1)


def _prctl(option: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)
    except (AttributeError, OSError, TypeError):
        return False


def limit(memory: int, file_bytes: int, cpu_seconds: int) -> dict[str, bool]:
    """Limit what this process may take from now on: `memory` beyond what it has. What of it holds, by name."""
    names = {"AS": "memory", "CPU": "CPU time", "FSIZE": "file sizes", "NOFILE": "open files", "NPROC": "processes"}
    try:
        import resource
    except ImportError:
        return dict.fromkeys(names.values(), False)
    wanted = {"CORE": 0, "CPU": cpu_seconds, "FSIZE": file_bytes, "NOFILE": 64, "NPROC": 0}
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        wanted["AS"] = pages * os.sysconf("SC_PAGE_SIZE") + memory
    held = {}
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
            held[name] = True
        except (AttributeError, OSError, ValueError):
            held[name] = False
    return {text: held.get(name, False) for name, text in names.items()}


def filter_calls() -> bool:
    """A seccomp filter for all threads: see _KILLED and _DENIED."""
    machine = _MACHINES.get(platform.machine())
    if machine is None or sys.platform != "linux":
        return False
    column, audit, seccomp = machine
    load, equal, above, answer = 0x20, 0x15, 0x35, 0x06
    kill, fail, allow = 0x80000000, 0x00050001, 0x7FFF0000
    lines = [(load, 0, 0, 4), (equal, 1, 0, audit), (answer, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(above, 0, 1, 0x40000000), (answer, 0, 0, kill)]  # the 32-bit names of x86-64's calls
    for calls, verdict in ((_KILLED, kill), (_DENIED, fail)):
        for numbers in calls.values():
            number = numbers[column]
            if number is not None:
                lines += [(equal, 0, 1, number), (answer, 0, 0, verdict)]
    lines.append((answer, 0, 0, allow))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(lines), ctypes.addressof(program)))
    return bool(ctypes.CDLL(None).syscall(seccomp, 1, 1, header) == 0)  # mode: filter; flag: every thread


def watch(tell: Callable[[str], None], here: str, readable: Collection[str]) -> None:
    """Add the audit hook. It tells what was tried and ends the process, with 13, at the first event that is not harmless.

    Args:
        here: the one folder whose files may be opened, and written.
        readable: paths that may be read.
    """

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _HARMLESS:
            return
        what = event
        if event == "open":
            if isinstance(args[0], int):  # a file that was opened before
                return
            path = os.path.realpath(os.fsdecode(args[0]))
            if os.path.dirname(path) == here or (path in readable and not (args[2] or 0) & _WRITES):
                return
            what = f"open {path}"
        elif args and isinstance(args[0], str):
            what = f"{event} {args[0]}"
        tell(what)
        os._exit(13)

    sys.addaudithook(hook)
