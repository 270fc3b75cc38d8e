"""The kernels' own tests and cases serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1] / "kernels"))
