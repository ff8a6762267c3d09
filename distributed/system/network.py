"""Network interfaces of this machine."""

from __future__ import annotations

import contextlib
import socket
import struct

_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's address (netdevice(7))."""


def interface_towards(address: str) -> str | None:
    """The network interface through which this machine reaches another, or itself at that address.

    gloo takes the one that this machine's own name resolves to, which often is the loopback.

    Args:
        address: name or IPv4 address.

    Returns:
        Its name; None where that cannot be told.
    """
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # Sends nothing: only the route is chosen.
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    asked = struct.pack("256s", name.encode()[:15])
                    if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)[20:24] == own:
                        return name
    except (ImportError, OSError):
        pass
    return None
