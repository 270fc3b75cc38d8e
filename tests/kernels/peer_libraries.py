"""The libraries whose scores the compatibility modes reproduce, loaded for tests at exactly the versions they name.

`make test` installs them without their dependencies (the Makefile's PEERS), because together they pin versions that
clash with each other's and with ours. Of a package whose `__init__` needs what is then missing, only the scoring
module is loaded: its parents are stood in for by empty packages that know where their files are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

# Written by `make test` once everything below is installed: from then on an absent library is a failure, no skip.
STAMP = Path(sys.prefix) / ".peers"


@dataclass(frozen=True)
class Peer:
    distribution: str
    version: str
    stubs: tuple[str, ...] = ()  # packages whose own __init__ is not run


PEERS = {
    peer.distribution: peer
    for peer in (
        Peer("sentence-transformers", "6.2.0"),
        Peer("pylate", "1.6.0", ("pylate", "pylate.scores", "pylate.utils")),
        Peer("colpali-engine", "0.3.18", ("colpali_engine", "colpali_engine.utils", "colpali_engine.loss")),
        Peer("colbert-ai", "0.2.22", ("colbert", "colbert.infra")),
    )
}


def _stand_in(peer: Peer) -> None:
    files = importlib.metadata.distribution(peer.distribution)
    for name in peer.stubs:
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(files.locate_file(name.replace(".", "/")))]
            sys.modules[name] = package


@cache
def load(distribution: str, module: str) -> ModuleType:
    """`module` of the installed `distribution`.

    Skips the test where the library is absent, except after `make test` has installed it: then that is a failure.
    Another version than the tests were written against is always a failure.
    """
    peer = PEERS[distribution]
    try:
        version = importlib.metadata.version(distribution)
        _stand_in(peer)
        loaded = importlib.import_module(module)
    except ImportError as error:  # of which PackageNotFoundError is one
        reason = f"{module} of {distribution} {peer.version} cannot be imported ({error}); `make test` installs it"
        if STAMP.exists():
            pytest.fail(f"{reason}, and says that it did: {STAMP}")
        pytest.skip(reason)
    if version != peer.version:
        pytest.fail(f"{distribution} {version} is installed, but the compatibility modes follow {peer.version}")
    return loaded


def sentence_transformers() -> ModuleType:
    """`maxsim`, `maxsim_pairwise`, `mean_maxsim`, `mean_maxsim_pairwise`."""
    return load("sentence-transformers", "sentence_transformers.util.similarity")


def sentence_transformers_scoring() -> ModuleType:
    """`colbert_scores`, `colbert_kd_scores`, ...: what its losses take as `similarity_fct`."""
    return load("sentence-transformers", "sentence_transformers.multi_vector_encoder.scoring.colbert")


def sentence_transformers_losses() -> ModuleType:
    return load("sentence-transformers", "sentence_transformers.multi_vector_encoder.losses")


def pylate() -> ModuleType:
    """`colbert_scores`, `colbert_kd_scores`, `colbert_scores_pairwise`, `ColBERTScores`."""
    return load("pylate", "pylate.scores.colbert")


def pylate_flash() -> ModuleType:
    """The glue between PyLate and flash-maxsim, without flash-maxsim."""
    return load("pylate", "pylate.scores._flash_backend")


def colpali_engine() -> ModuleType:
    """`maxsim_inbatch`, `maxsim_kd`."""
    return load("colpali-engine", "colpali_engine.utils.maxsim")


def colpali_engine_losses() -> ModuleType:
    return load("colpali-engine", "colpali_engine.loss.late_interaction_losses")


def colpali_engine_processing() -> ModuleType:
    """`BaseVisualRetrieverProcessor.score_multi_vector`."""
    return load("colpali-engine", "colpali_engine.utils.processing_utils")


def colbert() -> ModuleType:
    """`colbert_score`, `colbert_score_packed`, `ColBERT`."""
    return load("colbert-ai", "colbert.modeling.colbert")


def colbert_with_extension(build_directory: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same with `segmented_maxsim` compiled, which takes half a minute, a C++ compiler and ninja."""
    module = colbert()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(build_directory))
    # A virtual environment that is not activated does not put its ninja on the path.
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    module.ColBERT.try_load_torch_extensions(use_gpu=False)
    return module
