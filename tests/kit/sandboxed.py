"""The sandbox of the systemd units, as far as it can be had without systemd.

``unshare --mount python sandboxed.py OPTIONS COMMAND...``: everything but one socket directory and one tmpfs is read-only,
``/tmp`` and home directories are empty, no capability, another user, no new privileges, no writable executable memory,
locked memory unlimited where that may be set, and the unit's system call filter and address families as a seccomp filter.
OPTIONS is JSON: unit (its file; "" for a user of the machine, who only cannot see the homes of others), socket_dir,
memory_dir ("" for none), uid, groups (the first is the user's own), keep (paths that stay visible).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

PR_CAPBSET_DROP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_MDWE = 24, 22, 38, 65
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
AUDIT_ARCH_X86_64 = 0xC000003E
ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # with an errno in its low bits
EPERM, EAFNOSUPPORT = 1, 97
MS_BIND, MS_REC = 4096, 16384
UNREMOUNTABLE = ("proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs")
libc = ctypes.CDLL(None, use_errno=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def hide_homes(keep: list[str]) -> None:
    """ProtectHome and PrivateTmp: only the code that is run stays visible, and becomes so to other users."""
    for place in ("/tmp", "/home", "/root"):
        kept = {path: os.open(path, os.O_PATH) for path in keep if path.startswith(f"{place}/")}
        if Path(place).is_dir():
            mount("-t", "tmpfs", "-o", "mode=0755", "empty", place)
        for path, fd in kept.items():
            Path(path).mkdir(parents=True, exist_ok=True)
            source = f"/proc/self/fd/{fd}".encode()
            checked(libc.mount(source, path.encode(), None, MS_BIND | MS_REC, None), f"bind {path}")


def shut_file_systems(options: dict[str, Any]) -> None:
    """ProtectSystem=strict and ReadWritePaths."""
    writable = [str(options["socket_dir"])]
    mount("--bind", writable[0], writable[0])
    if options["memory_dir"]:
        writable.append(str(options["memory_dir"]))
        owner = f"uid={options['uid']},gid={options['groups'][0]}"
        mount(
            "-t", "tmpfs", "-o", f"size=256m,mode=0700,{owner},nosuid,nodev,noexec,huge=advise", "memory", writable[1]
        )
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, kind = line.split()[4], line.partition(" - ")[2].split()[0]
        if place not in writable and kind not in UNREMOUNTABLE:
            subprocess.run(["mount", "-o", "remount,bind,ro", place], check=False, stderr=subprocess.DEVNULL)


def unit_values(unit: Path, key: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.read_text().splitlines() if line.startswith(f"{key}=")]


def expand(names: list[str]) -> set[str]:
    """System calls of sets such as ``@system-service``, as systemd knows them."""
    found: set[str] = set()
    for name in names:
        if name.startswith("@"):
            text = subprocess.run(
                ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
            ).stdout
            members = [
                line.strip() for line in text.splitlines()[1:] if line.strip() and not line.strip().startswith("#")
            ]
            found |= expand(members)
        else:
            found.add(name)
    return found


def seccomp_filter(unit: Path) -> bytes:
    """The unit's SystemCallFilter and RestrictAddressFamilies as a BPF program."""
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text()))
    allowed = set(numbers) & expand(["@default"])
    for value in unit_values(unit, "SystemCallFilter"):
        names = expand(value.removeprefix("~").split())
        allowed = allowed - names if value.startswith("~") else allowed | names
    families = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}
    wanted = [families[name] for value in unit_values(unit, "RestrictAddressFamilies") for name in value.split()]
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, AUDIT_ARCH_X86_64), (0x06, 0, 0, REFUSE | EPERM), (0x20, 0, 0, 0)]
    program += [(0x15, 0, len(wanted) + 3, int(numbers["socket"])), (0x20, 0, 0, 16)]
    program += [(0x15, len(wanted) - index, 0, family) for index, family in enumerate(wanted)]
    program += [(0x06, 0, 0, REFUSE | EAFNOSUPPORT), (0x06, 0, 0, ALLOW)]
    for name in sorted(allowed & set(numbers)):
        program += [(0x15, 0, 1, int(numbers[name])), (0x06, 0, 0, ALLOW)]
    program.append((0x06, 0, 0, REFUSE | EPERM))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def set_filter(code: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0), "seccomp")


def checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def become(uid: int, groups: list[int]) -> None:
    """Another user, without capabilities, for good."""
    for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        checked(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "bounding set")
    os.setgroups(groups[1:])
    os.setresgid(*[groups[0]] * 3)
    os.setresuid(uid, uid, uid)
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")


def main() -> None:
    options, command = json.loads(sys.argv[1]), sys.argv[2:]
    unit = Path(options["unit"]) if options["unit"] else None
    code = seccomp_filter(unit) if unit else b""
    mount("--make-rprivate", "/")
    hide_homes(options["keep"])
    if unit:
        shut_file_systems(options)
        with contextlib.suppress(ValueError):  # a container may not raise it
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    become(options["uid"], options["groups"])
    if unit:
        libc.prctl(PR_SET_MDWE, 1, 0, 0, 0)  # Linux 6.3
        set_filter(code)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
