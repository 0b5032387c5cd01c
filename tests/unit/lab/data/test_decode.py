"""Images and labels that no one would save on purpose."""

import io

import pytest
import torch
from PIL import Image

from backpass import BackpassError
from backpass.lab.data import load_data
from backpass.lab.data.decode import Encoded, decode


def _png(size):
    stream = io.BytesIO()
    Image.new("1", size).save(stream, "PNG")
    return stream.getvalue()


def test_labels_are_int64_whatever_they_came_as():
    decoded = decode([Encoded("one", _png((8, 8)), True), Encoded("two", _png((8, 8)), False)])
    assert decoded.labels.dtype == torch.int64
    assert decoded.labels.tolist() == [1, 0]


def test_an_image_that_unpacks_without_end_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(BackpassError, match="bomb.png is too large"):
        decode([Encoded("bomb.png", _png((8, 8)), 0)])


def test_digits_take_no_settings():
    with pytest.raises(BackpassError, match="digits has no settings"):
        load_data("digits:label=fine", split="train")
