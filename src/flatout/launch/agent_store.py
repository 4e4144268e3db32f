"""Puts a text into the store of torchrun's agents, or waits for one and prints it.

It is run as a script by an interpreter that has torch, which flatout's own process does not load.
"""

from __future__ import annotations

import datetime
import sys
from typing import Any


def _main() -> None:
    host, port, seconds, key, *texts = sys.argv[1:]
    sys.path.pop(0)  # the folder of this file, whose modules are none of torch's
    from torch import distributed

    new_store: Any = distributed.TCPStore  # type: ignore[attr-defined]
    store = new_store(host, int(port), None, False, datetime.timedelta(seconds=float(seconds)))
    for text in texts:
        store.set(key, text)
    print(store.get(key).decode())


if __name__ == "__main__":
    _main()
