"""The package's own networks. The counts are those of the papers that describe them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from support.zoo.architecture import Architecture

__all__ = ["OWN"]


def own(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from backpass.models import build

        return build(name, **settings)

    return build


OWN: dict[str, Architecture] = {
    "own_mlp": Architecture(build=own("mlp", widths=(20, 15, 10)), sites=3, shape=(2, 1, 8, 8)),
    "own_lenet5": Architecture(build=own("lenet5"), sites=4, shape=(2, 1, 28, 28)),
    "own_cnn": Architecture(build=own("cnn", activation="gelu"), sites=4, shape=(2, 1, 8, 8)),
    "own_convnet": Architecture(build=own("convnet"), sites=3),
    "own_wrn": Architecture(build=own("wrn", depth=16, width=1), sites=2 * 6 + 1),
    "own_mobilenetv2": Architecture(build=own("mobilenetv2"), sites=35),
    "own_resnet18": Architecture(build=own("resnet18", activation="silu"), sites=17, slow=True),
    "own_resnet50": Architecture(build=own("resnet50"), sites=49, slow=True),
    "own_vgg16": Architecture(build=own("vgg16"), sites=13 + 2, slow=True),
    "own_densenet161": Architecture(build=own("densenet161"), sites=161, slow=True),
}
