"""The compiled library as it is loaded: schemas, fakes, error paths, and what the binary asks of a system."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import jmlr_kernels
from jmlr_kernels import native, ops

NATIVE_ROWS = [row for row in ops._TABLE if ops._NATIVE in row.backends.values()]
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(autouse=True)
def library() -> native.Library:
    found = native.loaded()
    if found.problem:
        if found.chosen or shutil.which("g++") is None:
            pytest.skip(found.problem)
        pytest.fail(found.problem)
    return found


def loaded() -> Path:
    return Path(next(iter(torch.ops.loaded_libraries & {*map(str, Path(native.__file__).parent.glob("_C.so"))})))


# --------------------------------------------------------------------------- operations


@pytest.mark.parametrize("row", NATIVE_ROWS, ids=lambda row: row.name)
def test_schemas_are_the_tables_less_the_backend(row: ops._Operation) -> None:
    expected = torch._C.parse_schema(f"jmlr_native::{row.name}{row.schema.replace(', str backend)', ')')}")
    assert str(native.function(row.name)._schema) == str(expected)


def test_build_info_is_what_was_loaded(library: native.Library) -> None:
    told = json.loads(torch.ops.jmlr_native.build_info())
    assert told["cuda"] == library.cuda_version
    assert library.cuda_targets == (tuple(told["cuda_targets"].split(";")) if told["cuda"] else ())
    assert bool(library.cuda_problem) != bool(library.cuda_targets)


def maxsim_arguments(layout: str, dtype: torch.dtype) -> tuple[object, ...]:
    torch.manual_seed(0)
    queries, offsets = torch.randn(2, 3, 20, dtype=dtype), None
    shape = {"padded": (4, 5, 20), "packed": (11, 20), "candidates": (2, 2, 5, 20)}[layout]
    documents = torch.randn(shape, dtype=dtype)
    if layout == "packed":
        offsets = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    mask = torch.rand(shape[:-1]) > 0.3
    weights = torch.rand(2, 3)
    return queries, documents, None, mask, weights, offsets, layout == "candidates", True, False, True, 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["padded", "packed", "candidates"])
def test_maxsim_on_the_cpu_agrees_with_its_fakes(layout: str, dtype: torch.dtype) -> None:
    if not native.has("maxsim_forward", "cpu"):
        pytest.skip("the library has no CPU kernel of MaxSim")
    arguments = maxsim_arguments(layout, dtype)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(native.function("maxsim_forward"), arguments, test_utils=checks)
    scores, winners, *scales = native.function("maxsim_forward")(*arguments)
    queries, documents, query_mask, document_mask, weights, offsets, candidates, *_, max_length = arguments
    backward = (
        [torch.randn_like(scores)], queries, documents, winners, query_mask, document_mask, weights, offsets,
        *scales, "scores", candidates, max_length,
    )  # fmt: skip
    torch.library.opcheck(native.function("maxsim_backward"), backward, test_utils=checks)


def test_attention_has_its_fakes_on_every_machine() -> None:
    with FakeTensorMode():
        q, k = torch.empty(2, 9, 4, 32, device="cuda"), torch.empty(2, 9, 2, 32, device="cuda")
        out, lse = native.function("shifted_attention_forward")(q, k, k, 4, None, None, False, 1.0)
        grads = native.function("shifted_attention_backward")(q, q, k, k, out, lse, 4, None, None, False, 1.0)
    assert out.shape == q.shape and lse.shape == (2, 4, 9) and lse.device.type == "cuda"
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]


def test_what_the_library_lacks_for_a_device_is_said_in_words() -> None:
    tensors = [torch.randn(1, 8, 2, 32) for _ in range(3)]
    with pytest.raises(RuntimeError, match="no native cpu kernel.*use backend='cuda'"):
        jmlr_kernels.shifted_sparse_attention(*tensors, 4, backend="cpu")
    with pytest.raises(NotImplementedError, match="shifted_attention_forward"):
        native.function("shifted_attention_forward")(*tensors, 4, None, None, False, 1.0)
    with pytest.raises(RuntimeError, match="CUDA|cuda"):
        jmlr_kernels.shifted_sparse_attention(*tensors, 4, backend="cuda")


def test_a_direct_call_with_wrong_tensors_raises_one_sentence() -> None:
    if not native.has("maxsim_forward", "cpu"):
        pytest.skip("the library has no CPU kernel of MaxSim")
    queries, documents, *rest = maxsim_arguments("padded", torch.float32)
    for wrong in (documents.double(), documents[..., :7], documents[0]):
        with pytest.raises(RuntimeError) as raised:
            native.function("maxsim_forward")(queries, wrong, *rest)
        assert "documents" in str(raised.value) and "\n" not in str(raised.value) and ".cpp" not in str(raised.value)


def test_auto_takes_the_library_on_the_cpu_and_it_agrees_with_torch() -> None:
    if not native.has("maxsim_forward", "cpu"):
        pytest.skip("the library has no CPU kernel of MaxSim")
    assert ops.resolve_backend("auto", torch.empty(0), "maxsim_forward") == "cpu"
    torch.manual_seed(0)
    leaves = [torch.randn(3, 4, 24, requires_grad=True), torch.randn(3, 7, 24, requires_grad=True)]
    losses = [jmlr_kernels.maxsim_contrastive_loss(*leaves, backend=backend) for backend in ("auto", "torch")]
    torch.testing.assert_close(losses[0], losses[1])
    for ours, plain in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(ours, plain)


def test_compiled_without_a_break_in_the_graph() -> None:
    def step(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return jmlr_kernels.maxsim_contrastive_loss(queries, documents) + jmlr_kernels.maxsim(queries, documents).sum()

    leaves = [torch.randn(3, 4, 24, requires_grad=True), torch.randn(3, 7, 24, requires_grad=True)]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours, plain = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, step))
    torch.testing.assert_close(ours, plain)


# --------------------------------------------------------------------------- the file


@pytest.mark.source
def test_the_file_asks_for_little_and_has_no_python_in_it() -> None:
    sys.path.insert(0, str(CSRC))
    import portable_link

    assert portable_link.not_portable(loaded()) == []
    assert portable_link.unexpected_libraries(loaded()) == []
    assert portable_link.needed_libraries(loaded())[0] == "libtorch.so"
    symbols = [symbol for _, symbol, _ in portable_link.symbols(loaded(), "--undefined-only")]
    assert "torch_library_impl" in symbols
    assert not [symbol for symbol in symbols if symbol.lstrip("_").startswith("Py")]
    assert portable_link.symbols(loaded(), "--defined-only") == []


@pytest.mark.source
def test_a_library_that_needs_a_newer_system_is_noticed_and_linked_portably(tmp_path: Path) -> None:
    sys.path.insert(0, str(CSRC))
    import portable_link

    code, library = tmp_path / "code.cpp", tmp_path / "code.so"
    code.write_text(
        "#include <cmath>\n#include <pthread.h>\n"
        'extern "C" double f(double x) { pthread_create(0, 0, 0, 0); return std::exp(x); }\n'
    )

    def command(before: list[str]) -> list[str]:
        return ["g++", "-O1", "-shared", "-fPIC", str(code), "-o", str(library), *before]

    subprocess.run(command([]), check=True)
    found = portable_link.not_portable(library)
    if tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 34):
        pytest.skip("this system's own symbols are not new enough")
    assert any(one.startswith("pthread_create@GLIBC_2.3") or one.startswith("exp@") for one in found)
    portable_link.link("g++", command, library, tmp_path)
    assert portable_link.not_portable(library) == []
    newer = tmp_path / "newer.cpp"
    newer.write_text('extern "C" int arc4random_(void); extern "C" int g() { return arc4random_(); }\n')
    subprocess.run(["g++", "-shared", "-fPIC", str(newer), "-o", str(library)], check=True)
    assert portable_link.not_portable(library) == ["arc4random_"]
