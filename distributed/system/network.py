"""Network interfaces of this machine, and the end of a process group."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from pathlib import Path

_SIOCGIFADDR = 0x8915
"""Linux ioctl that returns an interface's address (netdevice(7))."""
_GLOO_THREAD = "pt_gloo_runloop"
"""Name of the threads in which gloo does collectives, and frees their tensors."""
_LOOKS, _LOOK_SECONDS, _LONGEST_SECONDS = 3, 0.005, 10.0


def interface_towards(address: str) -> str | None:
    """Return the network interface through which this machine reaches an address.

    gloo's default is the interface that this machine's name resolves to, which is often the loopback.

    Args:
        address: name or IPv4 address of another machine, or of this one.

    Returns:
        The name of the interface; None if it is unknown.
    """
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # Sends nothing; only selects the route.
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    request = struct.pack("256s", name.encode()[:15])
                    if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24] == own:
                        return name
    except (ImportError, OSError):
        pass
    return None


def leave_process_group() -> None:
    """Leave torch's process group at the end of a rank; do nothing without one.

    gloo frees a collective's tensors in its own threads, after the collective has ended, and for that needs Python: a
    process whose Python ends meanwhile aborts, after all its work. Groups to which DeepSpeed refers keep their threads.
    So this waits until gloo's threads rest.
    """
    import torch

    if not torch.distributed.is_initialized():
        return
    torch.distributed.destroy_process_group()
    rested, began = 0, time.monotonic()
    while rested < _LOOKS and time.monotonic() - began < _LONGEST_SECONDS:
        time.sleep(_LOOK_SECONDS)  # Other threads have Python's lock meanwhile.
        rested = rested + 1 if _gloo_rests() else 0


def _gloo_rests(tasks: Path = Path("/proc/self/task")) -> bool:
    """Return whether every thread of gloo in this process sleeps, that is, has nothing to do; True if it has none."""
    for task in tasks.glob("*/stat"):
        with contextlib.suppress(OSError):  # It has ended.
            name, _, rest = task.read_text().partition("(")[2].rpartition(")")
            if name == _GLOO_THREAD and rest.split()[0] != "S":
                return False
    return True
