"""Hosts made of network namespaces (``ip netns``), each with addresses of its own on one bridge."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")


def unavailable_reason() -> str | None:
    """Why there can be no such hosts here; ``None``: there can."""
    if _IP is None:
        return "iproute2 is not installed"
    try:
        Hosts(1).close()
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made: {error.stderr.strip()}"
    return None


class Hosts:
    """Several hosts.

    Args:
        count: their number.

    Attributes:
        addresses: of each, IPv4.
        addresses_v6: of each.
    """

    def __init__(self, count: int) -> None:
        self._names = [f"flatout-{secrets.token_hex(3)}" for _ in range(count + 1)]
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]
        self.addresses_v6 = [f"fd77::{number + 1}" for number in range(count)]
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        *hosts, switch = self._names
        for name in self._names:
            _ip("netns", "add", name)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(hosts):
            port = f"port{number}"
            other = ("peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "add", port, "type", "veth", *other)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{self.addresses[number]}/24", "dev", "eth0")
            v6 = f"{self.addresses_v6[number]}/64"
            _ip("-n", name, "addr", "add", v6, "dev", "eth0", "nodad")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    def command(self, number: int, words: Sequence[str]) -> list[str]:
        """Return a command line that runs another one on a host."""
        assert _IP is not None
        return [_IP, "netns", "exec", self._names[number], *words]

    def start(
        self, number: int, words: Sequence[str], folder: Path, variables: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """Start a command on a host.

        Args:
            number: of the host.
            words: program and arguments.
            folder: the working folder.
            variables: the environment.
        """
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            self.command(number, words),
            cwd=folder,
            env=dict(variables),
            text=True,
            start_new_session=True,
            **options,
        )

    def cut_off(self, number: int) -> None:
        """Let no packet to a host through any more, nor from it."""
        _ip("-n", self._names[-1], "link", "set", f"port{number}", "nomaster")

    def close(self) -> None:
        """Remove the hosts."""
        for name in self._names:
            subprocess.run([str(_IP), "netns", "delete", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run([str(_IP), *words], capture_output=True, text=True, check=True)
