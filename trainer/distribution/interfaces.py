"""Which network interface leads to the other machines: gloo takes that of the host name, often the wrong one."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

try:
    import fcntl
except ImportError:  # Windows: gloo is left to find it
    fcntl = None  # type: ignore[assignment]

__all__ = ["interface_towards", "interfaces"]

_GET_ADDRESS = 0x8915
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
#: An address for documentation: nothing is sent there, the system only says which way it would go.
_ELSEWHERE = "192.0.2.1"


def interfaces() -> dict[str, str]:
    """The interfaces that have an IPv4 address, with that; without those of this machine alone."""
    found = {}
    if fcntl is not None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # it has none
                    answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                    found[name] = socket.inet_ntoa(answer[20:24])
    return {name: address for name, address in found.items() if not address.startswith("127.")}


def interface_towards(address: str) -> str | None:
    """The interface by which this machine reaches another, or by which that one reaches this.

    Args:
        address: of the machine that rank 0 is on. On that machine its own name may mean 127.0.1.1 (so on Debian), which
            nobody else reaches: then it is the interface of the default route, or the only one.

    Returns:
        None where the address means this machine to everybody, or where it cannot be told.
    """
    if address in _THIS_MACHINE:
        return None
    here = interfaces()
    for way in (_source_towards(address), _source_towards(_ELSEWHERE)):
        for name, own in here.items():
            if own == way:
                return name
    return next(iter(here)) if len(here) == 1 else None


def _source_towards(address: str) -> str | None:
    """The own address that packets to another would carry."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        own: str = probe.getsockname()[0]
        return own
    return None
