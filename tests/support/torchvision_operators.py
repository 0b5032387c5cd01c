"""timm and transformers import torchvision, whose operators are missing beside a CPU build of torch."""

from __future__ import annotations

import torch

__all__ = ["define_missing_operators"]

_WITH_META_KERNELS = ("nms", "qnms")
_library: torch.library.Library | None = None


def define_missing_operators() -> None:
    """Declare the operators for which torchvision registers a shape function at import, where they are missing.

    A declared operator has no kernel: calling it is an error, importing torchvision is not.
    """
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        if "does not exist" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "DEF")
        for name in _WITH_META_KERNELS:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:
        return
