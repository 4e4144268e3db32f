"""Builds extensions; run as a script by the job's interpreter, with their names as arguments.

It loads the package from its own folder, because the job's environment may have no flatout.
"""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__" and sys.version_info < (3, 11):
    del sys.path[0]  # this folder, whose files would shadow other modules


def main() -> None:
    """Build all at once: each is one process of the compiler."""
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "flatout", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["flatout"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    from flatout.kernels import extensions

    with ThreadPoolExecutor() as pool:
        list(pool.map(extensions.build, sys.argv[1:]))


if __name__ == "__main__":
    main()
