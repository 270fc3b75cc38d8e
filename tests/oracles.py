"""What every kernel test shares: the tolerance rule and the property that no attention may break."""

from __future__ import annotations

import torch


def assert_as_exact_as_torch(name: str, actual: torch.Tensor, low: torch.Tensor, exact: torch.Tensor) -> None:
    """FlashAttention's rule: `actual` errs from float64 at most twice as much as plain torch at the same precision
    (`low`), plus one rounding of the type. No tolerance is chosen by hand."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == low.dtype, f"{name}: dtype {actual.dtype}, expected {low.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    exact = exact.double()
    error = (actual.double() - exact).abs().max().item() if actual.numel() else 0.0
    error_low = (low.double() - exact).abs().max().item() if actual.numel() else 0.0
    largest = exact.abs().max().item() if actual.numel() else 0.0
    allowed = 2 * error_low + torch.finfo(actual.dtype).eps * max(largest, torch.finfo(actual.dtype).tiny)
    assert error <= allowed, (
        f"{name}: error {error:.3e} from float64, allowed {allowed:.3e} (plain torch {error_low:.3e})"
    )
