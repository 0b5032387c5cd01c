"""Images and labels that no one would save on purpose."""

import io
import zlib

import pytest
import torch
from PIL import Image, PngImagePlugin

from backpass import BackpassError
from backpass.data import load_data
from backpass.data.decode import Encoded, decode


def _png(size):
    stream = io.BytesIO()
    Image.new("1", size).save(stream, "PNG")
    return stream.getvalue()


def test_labels_are_int64_whatever_they_came_as():
    decoded = decode([Encoded("one", _png((8, 8)), True), Encoded("two", _png((8, 8)), False)])
    assert decoded.labels.dtype == torch.int64
    assert decoded.labels.tolist() == [1, 0]


def _saved(kind, *, size=(6, 4), orientation=None, **options):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    stream = io.BytesIO()
    pixels = Image.frombytes("RGB", size, bytes(range(3 * size[0] * size[1])))
    pixels.save(stream, kind, **({"exif": exif} if orientation else {}), **options)
    return stream.getvalue()


def _chunk(name, content):
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


def _png_with(*, text=b"", size=(8, 8)):
    """A PNG file whose header claims a size, with compressed text behind the header."""
    whole = _png((8, 8))
    header = b"".join(side.to_bytes(4, "big") for side in size) + whole[24:29]
    return whole[:8] + _chunk(b"IHDR", header) + _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(text)) + whole[33:]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95, "subsampling": 0})],
)
def test_four_formats_are_read_by_their_content(kind, options):
    decoded = decode([Encoded("anything.gif", _saved(kind, **options), 0)])
    expected = torch.arange(72).view(4, 6, 3).permute(2, 0, 1)
    assert (decoded.pixels[0].int() - expected).abs().max() <= (4 if kind == "JPEG" else 0)
    assert decoded.formats == (kind,)


def test_every_orientation_of_exif_stands_upright():
    image = torch.arange(72, dtype=torch.uint8).view(4, 6, 3).permute(2, 0, 1)
    turned = {
        1: image, 2: image.flip(2), 3: image.flip(1, 2), 4: image.flip(1),
        5: image.mT, 6: image.mT.flip(2), 7: image.mT.flip(1, 2), 8: image.mT.flip(1),
    }  # fmt: skip
    for kind in ("PNG", "WEBP"):
        for orientation, expected in turned.items():
            lossless = {"lossless": True} if kind == "WEBP" else {}
            content = _saved(kind, orientation=orientation, **lossless)
            assert torch.equal(decode([Encoded("it", content, 0)]).pixels[0], expected), (kind, orientation)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
REFUSED = {
    "EPS, which starts Ghostscript": (EPS, "is no PNG, JPEG, WebP or BMP image"),
    "GIF": (_saved("GIF"), "is no PNG, JPEG, WebP or BMP image"),
    "TIFF": (_saved("TIFF"), "is no PNG, JPEG, WebP or BMP image"),
    "text that unpacks without end": (
        _png_with(text=bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1)),
        "is a corrupt image: Decompressed data too large",
    ),
    "pixels without end": (_png_with(size=(20000, 20000)), "is too large to be an image of a data set"),
    "many pixels": (_png_with(size=(8200, 8200)), "is too large to be an image of a data set: 8200x8200"),
    "several frames": (
        _saved("PNG", save_all=True, append_images=[Image.new("RGB", (6, 4))]), "has 2 frames: one image each"
    ),
    "cut off": (_saved("BMP")[:90], "is a corrupt image"),
    "nothing": (b"", "is no PNG, JPEG, WebP or BMP image"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_another_file_is_refused_by_its_name(case):
    content, message = REFUSED[case]
    with pytest.raises(BackpassError, match=f"row 1 of x.parquet {message}"):
        decode([Encoded("row 0 of x.parquet", _png((8, 8)), 0), Encoded("row 1 of x.parquet", content, 0)])


def test_digits_take_no_settings():
    with pytest.raises(BackpassError, match="digits has no settings"):
        load_data("digits:label=fine", split="train")
