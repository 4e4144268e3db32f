"""Gives a trial a copy-on-write view of the whole file system, so that what it writes is discarded.

``command`` returns the command line of a *stage*: this file, run as a script. The stage leaves the
mount namespace (and, without privileges, the user namespace), builds the view and then becomes the
job by ``exec``, so that process id, group, terminal, signals and environment are the job's own.

The view is a new root on a tmpfs (by the kernel's default up to half of the memory), which is
discarded with the job's last process. It has every directory of the old root under an overlay whose
upper layer is on that tmpfs (Linux kernel documentation, "Overlay Filesystem"). A directory that
contains other mounts is rebuilt entry by entry. ``/proc``, ``/sys`` and ``/dev`` are the real ones;
``/dev/shm`` is empty. A single file that is a mount cannot have an overlay, so it is read-only.

The folders that are passed through (the run directory) stay real and writable. Caches persist
between trials in a scratch folder: an empty cache for compiled kernels, and a layer over the user's
own cache for models.

Without privileges there are two limits. Renaming a directory of the old root fails with EXDEV, as
between two file systems, because the kernel allows it only for privileged overlays (``shutil.move``
and ``mv`` copy instead). And files of other users cannot be written to, whatever their modes are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import getpass
import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CANNOT_ISOLATE = 125
"""Exit status of a stage that failed before the job began, as for ``docker run`` and ``env``."""

# mount(2), umount(2), unshare(2), linux/mount.h, linux/sched.h
_MS_RDONLY = 1
_MS_REMOUNT = 32
_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000

_STAYS_REAL = ("/proc", "/sys", "/dev")
_STAGING = "/dev/shm"
"""Where the tmpfs is mounted while the view is built; the view has its own empty one."""


def unavailable_reason() -> str | None:
    """Why isolation is not available here, in one sentence; ``None``: it was tried and works."""
    if not sys.platform.startswith("linux"):
        return "Trials need Linux to run isolated from your files."
    import subprocess

    stage = command(["true"], passthrough=[], scratch=None)
    tried = subprocess.run(stage, capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return None
    said = tried.stderr.strip().splitlines()
    reason = said[-1].removeprefix("flatout: ") if said else f"exit status {tried.returncode}"
    return f"Trials cannot run isolated from your files here ({reason})."


def command(job: Sequence[str], *, passthrough: Sequence[Path], scratch: Path | None) -> list[str]:
    """The command line that runs ``job`` in a copy-on-write view.

    Args:
        job: program and arguments.
        passthrough: existing folders that stay real and writable.
        scratch: the folder in which caches persist between trials, made if necessary; ``None``:
            caches do not persist.
    """
    options = {
        "passthrough": [str(path) for path in passthrough],
        "scratch": None if scratch is None else str(scratch),
    }
    return [sys.executable, "-I", "-S", __file__, json.dumps(options), "--", *job]


def _main() -> None:
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler prints a traceback
    options = json.loads(sys.argv[1])
    job = sys.argv[3:]
    try:
        _enter_view(options["passthrough"], options["scratch"])
    except OSError as error:
        _fail(CANNOT_ISOLATE, f"{error.strerror}: {error.filename or 'isolation'}")
    _become(job)


def _become(job: list[str]) -> None:
    import signal

    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # CPython ignores these
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(job[0], job)
    except FileNotFoundError:
        _fail(127, f"there is no program {job[0]!r}")
    except OSError as error:
        _fail(126, f"{job[0]!r} cannot be executed: {error.strerror}")


def _fail(status: int, reason: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            os.write(2, f"flatout: {reason}\n".encode())
    sys.exit(status)


def _enter_view(passthrough: list[str], scratch: str | None) -> None:
    cwd = os.getcwd()
    privileged = _leave_namespaces()
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    persistent = [] if scratch is None else _persistent_caches(Path(scratch))
    _mount("tmpfs", _STAGING, "tmpfs", 0, "mode=0755")
    view = _View(privileged)
    view.cover("/")
    for path in passthrough:
        _mount(path, view.inside(path), None, _MS_BIND)
    for path, layer in persistent:
        view.persist(path, layer)
    _pivot(view.root)
    os.chdir(cwd)


def _leave_namespaces() -> bool:
    """Leave the mount namespace; returns whether that needed no user namespace."""
    if os.geteuid() == 0:
        try:
            _call("unshare", _CLONE_NEWNS)
        except PermissionError:
            pass
        else:
            return True
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    return False


class _View:
    """The new root while it is built."""

    def __init__(self, privileged: bool) -> None:
        self.root = f"{_STAGING}/root"
        self._layers = f"{_STAGING}/layers"
        self._options = "redirect_dir=on" if privileged else "userxattr"
        self._mounts = _mount_points() + ([] if privileged else _own_folders())
        self._count = 0
        os.mkdir(self.root)
        os.mkdir(self._layers)
        _mount(self.root, self.root, None, _MS_BIND)  # a new root has to be a mount

    def inside(self, path: str) -> str:
        """Where ``path`` is while the view is built."""
        return self.root + os.path.abspath(path)

    def cover(self, path: str) -> None:
        """Add a copy-on-write ``path`` to the view."""
        target = self.inside(path) if path != "/" else self.root
        if path in _STAYS_REAL:
            os.makedirs(target, exist_ok=True)
            _mount(path, target, None, _MS_BIND | _MS_REC)
            if path == os.path.dirname(_STAGING):
                _mount("tmpfs", self.inside(_STAGING), "tmpfs", 0, "mode=1777")
        elif any(mount.startswith(path.rstrip("/") + "/") for mount in self._mounts):
            self._rebuild(path, target)
        else:
            os.makedirs(target, exist_ok=True)
            self._overlay(path, target, self._layer(path))

    def persist(self, path: str, layer: Path) -> None:
        """Cover ``path`` again, with an upper layer in the folder ``layer`` on disk."""
        target = self.inside(path)
        os.makedirs(target, exist_ok=True)
        upper, work = layer / "upper", layer / "work"
        upper.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        lower = path
        if not os.path.isdir(path):
            lower = self._layer(None)[0]
        self._overlay(lower, target, (str(upper), str(work)))

    def _rebuild(self, path: str, target: str) -> None:
        """Add the entries of a directory that contains mounts one by one."""
        os.makedirs(target, exist_ok=True)
        _copy_owner_and_mode(path, target)
        for entry in os.scandir(path):
            copy = os.path.join(target, entry.name)
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), copy)
            elif entry.is_dir():
                self.cover(entry.path)
            else:
                self._read_only(entry.path, copy)

    def _read_only(self, path: str, target: str) -> None:
        with open(target, "w"):
            pass
        _mount(path, target, None, _MS_BIND)
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            flags = _locked_flags(path)
            _mount(None, target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)

    def _layer(self, like: str | None) -> tuple[str, str]:
        self._count += 1
        layer = f"{self._layers}/{self._count}"
        upper, work = f"{layer}/upper", f"{layer}/work"
        os.makedirs(upper)
        os.makedirs(work)
        if like is not None:
            _copy_owner_and_mode(like, upper)
        return upper, work

    def _overlay(self, lower: str, target: str, layer: tuple[str, str]) -> None:
        parts = {"lowerdir": lower, "upperdir": layer[0], "workdir": layer[1]}
        options = ",".join(f"{name}={_escape(value)}" for name, value in parts.items())
        _mount("overlay", target, "overlay", 0, f"{options},{self._options}")


def _persistent_caches(scratch: Path) -> list[tuple[str, Path]]:
    """Folders of caches, and the layer of each in the scratch."""
    environment = os.environ
    home = os.path.expanduser("~")
    cache = environment.get("XDG_CACHE_HOME") or f"{home}/.cache"
    inductor = f"{_temporary_folder()}/torchinductor_{getpass.getuser()}"
    folders = {
        "torchinductor": environment.get("TORCHINDUCTOR_CACHE_DIR") or inductor,
        "triton": environment.get("TRITON_CACHE_DIR") or f"{home}/.triton/cache",
        "huggingface": environment.get("HF_HOME") or f"{cache}/huggingface",
        "torch": environment.get("TORCH_HOME") or f"{cache}/torch",
    }
    caches = []
    for name, folder in folders.items():
        layer = scratch / name
        try:
            layer.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue  # this cache is discarded with the rest
        if _claim(layer):
            caches.append((folder, layer))
    return caches


def _claim(layer: Path) -> bool:
    """Claim a layer for this process; returns whether it is free, as overlays must not share one.

    The owner's file is locked meanwhile, because two trials may begin at the same time.
    """
    try:
        with open(layer / "owner", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            owner = file.read()
            if owner.isdigit() and int(owner) != os.getpid() and _is_alive(int(owner)):
                return False
            file.truncate(0)
            file.write(str(os.getpid()))
    except OSError:
        return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it belongs to another user
    return True


def _mount_points() -> list[str]:
    """The mount points inside the directories that are covered."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if not any(point == real or point.startswith(f"{real}/") for real in _STAYS_REAL):
            points.append(point)
    points.extend(_STAYS_REAL)
    return [point for point in points if point != "/"]


def _own_folders() -> list[str]:
    """The outermost folders that need their own overlay without privileges.

    A user namespace knows no other users. When something in a directory of theirs changes, the
    directory cannot be copied to an upper layer (EOVERFLOW), unless it is the top of an overlay.
    """
    folders = {os.getcwd(), os.path.expanduser("~"), _temporary_folder(), "/var/tmp"}
    real = sorted(folder for folder in map(os.path.realpath, folders) if os.path.isdir(folder))
    return [
        folder
        for folder in real
        if folder != "/" and not any(folder.startswith(f"{other}/") for other in real)
    ]


def _temporary_folder() -> str:
    """The folder of ``tempfile.gettempdir``, which would write a file to try it."""
    environment = os.environ
    return environment.get("TMPDIR") or environment.get("TEMP") or environment.get("TMP") or "/tmp"


def _locked_flags(path: str) -> int:
    """The flags of the mount of ``path`` that a remount in a user namespace must keep."""
    names = {os.ST_NOSUID: 2, os.ST_NODEV: 4, os.ST_NOEXEC: 8, os.ST_NOATIME: 1024}
    flags = os.statvfs(path).f_flag | (os.ST_RELATIME & os.statvfs(path).f_flag)
    kept = sum(mount_flag for flag, mount_flag in names.items() if flags & flag)
    return kept | (1 << 21 if flags & os.ST_RELATIME else 0)


def _copy_owner_and_mode(source: str, target: str) -> None:
    status = os.stat(source)
    try:
        os.chown(target, status.st_uid, status.st_gid)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):  # the namespace does not know the owner
            raise
    os.chmod(target, stat.S_IMODE(status.st_mode))


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _pivot(root: str) -> None:
    """Make ``root`` the root and detach the old one (pivot_root(2), "." for both)."""
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    def encode(text: str | None) -> bytes | None:
        return None if text is None else os.fsencode(text)

    what = f"mounting {kind or source or 'flags'} on {target}"
    _call(
        "mount",
        encode(source),
        encode(target),
        encode(kind),
        ctypes.c_ulong(flags),
        encode(options),
        what=what,
    )


_PIVOT_ROOT_NUMBERS = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
"""System call numbers from asm/unistd.h of each architecture, as glibc has no wrapper."""


def _call(name: str, *arguments: Any, what: str | None = None) -> None:
    """Call a function of libc.

    Raises:
        OSError: the call failed; ``filename`` names what it did.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if name == "pivot_root":
        number = _PIVOT_ROOT_NUMBERS.get(os.uname().machine)
        if number is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), "pivot_root")
        result = libc.syscall(ctypes.c_long(number), *arguments)
    else:
        result = getattr(libc, name)(*arguments)
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what or name)


if __name__ == "__main__":
    _main()
