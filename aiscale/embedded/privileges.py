"""Start children that end with us, and run Postgres as root's servant: it refuses to run as root.

Where root starts it, Postgres runs as an unprivileged user of the system. That user may not be able to enter the folders above
the data directory (root's home, for one), so it keeps a single capability, to pass folders and open files; Linux only.
"""

import ctypes
import os
import pwd
import signal
import struct
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECUREBITS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 1, 8, 28, 47, 2
_SECBIT_NO_SETUID_FIXUP = 4
_CAP_DAC_OVERRIDE = 1
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def find_servant() -> pwd.struct_passwd | None:
    """Return the user that runs Postgres for root; None when we are not root and run it ourselves.

    Raises: RuntimeError when the system has no such user.
    """
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody", "daemon"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError(
        "Postgres does not run as root, and this system has no user postgres, nobody or daemon to run it"
    )


def make_preparation(death_signal: signal.Signals, servant: pwd.struct_passwd | None = None) -> Callable[[], None]:
    """Return what a child does between fork and exec: become the servant, and ask to be told when its parent dies."""
    parent = os.getpid()

    def prepare() -> None:
        if servant is not None:
            _become(servant)
        end_with(parent, death_signal)

    return prepare


def end_with(parent: int, death_signal: signal.Signals = signal.SIGKILL) -> None:
    """Ask for ``death_signal`` when the process ``parent``, which started this one, dies; end now if it has. Linux only.

    Linux sends it once for each thread that the dying process has: whoever handles it must bear to be interrupted by it again.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:
            # it died in between
            os._exit(1)


def _become(servant: pwd.struct_passwd) -> None:
    if _libc is None:
        os.setgroups([])
        os.setgid(servant.pw_gid)
        os.setuid(servant.pw_uid)
        return
    _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    # access(2), by which initdb looks for its programs, would leave the capability out of account otherwise
    _libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    os.setgroups([])
    os.setgid(servant.pw_gid)
    os.setuid(servant.pw_uid)
    wanted = 1 << _CAP_DAC_OVERRIDE
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", wanted, wanted, wanted, 0, 0, 0)
    # without the capability (a container that drops it) Postgres still runs where its folders let it in
    if _libc.capset(header, data) == 0:
        _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0)
