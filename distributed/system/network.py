"""Network interfaces of this machine."""

from __future__ import annotations

import contextlib
import socket
import struct

_SIOCGIFADDR = 0x8915
"""Linux ioctl that returns an interface's address (netdevice(7))."""


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
