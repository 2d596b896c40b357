"""torchao's observer of ranges that are only found out at run time, for scales a token."""

from __future__ import annotations

from torchao.quantization.pt2e._affine_quantization import AffineQuantizedPlaceholderObserver

__all__ = ["AffineQuantizedPlaceholderObserver"]
