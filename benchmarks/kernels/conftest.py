"""Every result file names the machine, the versions and the commit that it was measured on."""

from __future__ import annotations

from typing import Any

from benchmarks.environment import describe


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info |= describe()
