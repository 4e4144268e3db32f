"""Connections between the flatouts of several hosts, over which JSON objects go, one a line."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from typing import Any

from flatout.errors import UserError

RESOLVE_SECONDS = 20.0
"""How long a name may be unknown: a name service learns late of a host that has just started."""

_SEND_SECONDS = 5.0
_MOST_BYTES = 1 << 24
"""A line that is longer does not come from flatout."""

_IDLE_SECONDS, _PROBE_SECONDS, _PROBES = 5, 5, 2
"""A host that answers nothing counts as lost after 15 seconds (tcp(7)), as for torchrun."""


class Line:
    """A connection to another flatout.

    Args:
        connection: it is owned by this object.

    Attributes:
        is_lost: whether it has ended, or something that is not flatout is at its other end.
        own_address, address: of its two ends, as numbers.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.is_lost = False
        self._socket = connection
        self._received = b""
        for name, value in _keep_alive().items():
            connection.setsockopt(socket.IPPROTO_TCP, name, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.own_address = _plain(connection.getsockname()[0])
        self.address = _plain(connection.getpeername()[0])

    def send(self, **message: Any) -> None:
        """Send an object."""
        if self.is_lost:
            return
        try:
            self._socket.settimeout(_SEND_SECONDS)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_lost = True

    def receive(self) -> list[dict[str, Any]]:
        """Return the objects that have come, without waiting."""
        self._socket.settimeout(0)
        while not self.is_lost:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self._received += data
            self.is_lost = not data or len(self._received) > _MOST_BYTES
        *lines, self._received = self._received.split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(message := json.loads(line), dict):
                    found.append(message)
                    continue
            self.is_lost = True
        return found

    def close(self) -> None:
        """End the connection."""
        self.is_lost = True
        self._socket.close()


def listen(port: int) -> socket.socket:
    """Return a socket that listens on all addresses of this host.

    Args:
        port: 0: one that is free.

    Raises:
        UserError: the port is in use.
    """
    try:
        try:
            return _listener(socket.AF_INET6, port)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            return _listener(socket.AF_INET, port)  # this host has no IPv6
    except OSError as error:
        raise UserError(
            f"rank 0 cannot listen on port {port}: {error.strerror}; give all ranks another "
            "MASTER_PORT"
        ) from None


def _listener(family: socket.AddressFamily, port: int) -> socket.socket:
    is_dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    if family == socket.AF_INET6 and not is_dual:
        raise OSError(errno.EAFNOSUPPORT, "no sockets for both IPv4 and IPv6")
    return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=is_dual)


def connect(host: str, port: int) -> Line | None:
    """Return a connection to a host, ``None`` if it does not answer (yet).

    Raises:
        socket.gaierror: its name is unknown.
    """
    try:
        return Line(socket.create_connection((host, port), timeout=_SEND_SECONDS))
    except socket.gaierror:
        raise
    except OSError:
        return None


def resolve(host: str) -> str:
    """Return the first address of a host by its name, or the address that it is already.

    Raises:
        UserError: the name is unknown.
    """
    until_s = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() > until_s or isinstance(error, UnicodeError):
                reason = error.strerror if isinstance(error, socket.gaierror) else "no such name"
                raise UserError(
                    f"the host of rank 0 is {host!r}, and this host finds no address of that "
                    f"name: {reason}"
                ) from None
            time.sleep(0.2)
        else:
            return str(found[0][4][0])


def _plain(address: str) -> str:
    """Return an IPv4 address that a socket for both families has written as one of IPv6."""
    return address.removeprefix("::ffff:")


def is_of_this_host_only(address: str) -> bool:
    """Whether other hosts cannot reach an address."""
    return address == "::1" or address.startswith("127.")


def own_address_towards(address: str, port: int) -> str:
    """Return the address from which this host reaches another.

    Raises:
        UserError: there is no way to it.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # sends nothing
        except OSError as error:
            raise UserError(f"{address} cannot be reached: {error.strerror}") from None
        return str(probe.getsockname()[0])


def is_own(address: str) -> bool:
    """Whether an address is one of this host's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _keep_alive() -> dict[int, int]:
    values = {
        "TCP_KEEPIDLE": _IDLE_SECONDS,
        "TCP_KEEPINTVL": _PROBE_SECONDS,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": 1000 * (_IDLE_SECONDS + _PROBE_SECONDS * _PROBES),
    }
    return {getattr(socket, name): v for name, v in values.items() if hasattr(socket, name)}
