"""The kernels' own tests and cases serve here too; without what compiles a Python module, all of it is skipped."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(1, str(Path(__file__).parents[1] / "kernels"))


def _missing() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) to build the kernels with"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "no Python.h (python3-dev) to build the kernels with"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the module before the first test that wants it: it takes minutes, which are no test's own."""
    wanted = any(Path(__file__).parent in item.path.parents for item in session.items)
    if _missing() or not wanted or session.config.option.collectonly:
        return
    import host_module

    with contextlib.suppress(RuntimeError, ImportError):  # the tests say what does not compile
        host_module.load()
