"""Data by name or folder: decoded once, byte for byte, and mistakes are named."""

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.data import cache, load_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BACKPASS_DATA", raising=False)


def picture(seed, *, size=(6, 5), colour=True, kind="PNG"):
    """The file and the pixels (C, H, W) of a random image."""
    width, height = size
    shape = (height, width, 3) if colour else (height, width)
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format=kind)
    pixels = torch.from_numpy(array.reshape(height, width, -1)).permute(2, 0, 1)
    return stream.getvalue(), pixels


def parquet(path, contents, labels, *, image="image", label="label", names=None):
    table = pa.table({image: [{"bytes": c, "path": None} for c in contents], label: labels})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def classes(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_parquet_rows_become_the_very_pixels_in_order(tmp_path):
    files = [picture(i) for i in range(5)]
    parquet(tmp_path / "d" / "test-00000-of-00002.parquet", [c for c, _ in files[:3]], [2, 0, 1], names=["a", "b", "c"])
    parquet(tmp_path / "d" / "test-00001-of-00002.parquet", [c for c, _ in files[3:]], [1, 1], names=["a", "b", "c"])
    data = load_data(str(tmp_path / "d"))
    assert torch.equal(data.images.pixels, torch.stack([pixels for _, pixels in files]))
    assert data.images.labels.tolist() == [2, 0, 1, 1, 1]
    assert data.class_name(2) == "c"
    assert data.images.x.max() <= 1
    assert data.warning == ""


def test_an_images_column_may_be_called_img_and_splits_are_told_apart(tmp_path):
    (one, ours), (other, theirs) = picture(1, colour=False), picture(2, colour=False)
    parquet(tmp_path / "test-0.parquet", [one], [0], image="img")
    parquet(tmp_path / "train-0.parquet", [other], [0], image="img")
    assert torch.equal(load_data(str(tmp_path)).images.pixels[0], ours)
    assert torch.equal(load_data(str(tmp_path), split="train").images.pixels[0], theirs)


def test_a_folder_of_classes_is_numbered_by_sorted_names(tmp_path):
    (cat, cat_pixels), (dog, dog_pixels) = picture(1), picture(2, colour=False)
    classes(tmp_path / "d", {"dog/1.png": dog, "cat/b.png": cat, "cat/a.png": cat, "cat/notes.txt": b"no image"})
    data = load_data(str(tmp_path / "d"))
    assert data.class_names == ("cat", "dog")
    assert data.images.labels.tolist() == [0, 0, 1]
    # Grey images among coloured ones become coloured.
    assert torch.equal(data.images.pixels, torch.stack([cat_pixels, cat_pixels, dog_pixels.expand(3, -1, -1)]))


def test_a_folder_of_classes_may_have_splits(tmp_path):
    (one, _), (two, pixels) = picture(1), picture(2)
    classes(tmp_path, {f"{split}/{name}/1.png": c for split, c in (("train", one), ("test", two)) for name in "ab"})
    assert torch.equal(load_data(str(tmp_path), split="test").images.pixels[1], pixels)
    with pytest.raises(BackpassError, match="has no 'val'; it has train, test"):
        load_data(str(tmp_path), split="val")


def test_jpeg_images_are_announced(tmp_path):
    jpeg, _ = picture(1, kind="JPEG")
    parquet(tmp_path / "cifar10" / "test-0.parquet", [jpeg], [0], image="img")
    data = load_data(str(tmp_path / "cifar10"))
    assert "JPEG" in data.description
    assert data.warning.startswith("The images are JPEG")


def test_images_are_decoded_once(tmp_path, monkeypatch):
    content, pixels = picture(1)
    parquet(tmp_path / "d" / "test-0.parquet", [content], [3])
    load_data(str(tmp_path / "d"))
    monkeypatch.setattr("backpass.lab.data.parquet.decode", lambda _: pytest.fail("decoded again"))
    (tmp_path / "d").rename(tmp_path / "moved")  # the cache goes by content, not by name
    again = load_data(str(tmp_path / "moved"))
    assert torch.equal(again.images.pixels[0], pixels)
    assert again.images.labels.tolist() == [3]


def test_changed_content_is_decoded_anew(tmp_path):
    path = tmp_path / "test-0.parquet"
    (one, _), (two, pixels) = picture(1), picture(2)
    parquet(path, [one], [0])
    load_data(str(tmp_path))
    was = path.stat()
    parquet(path, [two], [0])
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert torch.equal(load_data(str(tmp_path)).images.pixels[0], pixels)


def test_a_damaged_cache_is_made_anew_and_one_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    content, pixels = picture(1)
    parquet(tmp_path / "d" / "test-0.parquet", [content], [0])
    load_data(str(tmp_path / "d"))
    (kept,) = (tmp_path / "cache" / "data").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(load_data(str(tmp_path / "d")).images.pixels[0], pixels)
    assert load_data(str(tmp_path / "d")).images.pixels.shape == (1, 3, 5, 6)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("BACKPASS_CACHE", str(tmp_path / "file"))
    assert torch.equal(load_data(str(tmp_path / "d")).images.pixels[0], pixels)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("BACKPASS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "backpass"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder().parts[-2:] == (".cache", "backpass")


def test_digits_have_both_parts_and_the_first_can_be_taken():
    train, test = load_data("digits", split="train"), load_data("digits")
    assert len(train.images) + len(test.images) == 1797
    some = test.first(7)
    assert torch.equal(some.images.x, test.images.x[:7])
    assert "the first 7" in some.description
    assert test.first(None) is test
    with pytest.raises(BackpassError, match="at least 1"):
        test.first(0)


def _mistakes(tmp_path):
    good, _ = picture(1)
    other, _ = picture(2, size=(4, 4))
    parquet(tmp_path / "column" / "test-0.parquet", [good], [0], image="picture")
    parquet(tmp_path / "label" / "test-0.parquet", [good], [0], label="class")
    parquet(tmp_path / "row" / "test-0.parquet", [good, good, good[:60], good], [0] * 4)
    parquet(tmp_path / "noimage" / "test-0.parquet", [good, b"not an image"], [0] * 2)
    parquet(tmp_path / "size" / "test-0.parquet", [good, other], [0] * 2)
    parquet(tmp_path / "negative" / "test-0.parquet", [good], [-1])
    parquet(tmp_path / "split" / "train-0.parquet", [good], [0])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "test-0.parquet").write_bytes(b"PAR1 and nothing else")
    classes(tmp_path / "sizes", {"a/1.png": good, "b/small.png": other})
    classes(tmp_path / "cut", {"a/1.png": good, "b/cut.png": good[:60]})
    classes(tmp_path / "one", {"a/1.png": good})
    classes(tmp_path / "bare", {"a/1.png": good, "b/readme.txt": b""})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("column", r"no column 'image' or 'img'; its columns are 'picture', 'label'"),
        ("label", r"no column 'label' or 'labels'"),
        ("row", r"row 2 of test-0.parquet is a corrupt image"),
        ("noimage", r"row 1 of test-0.parquet is no image that can be read"),
        ("size", r"row 1 of test-0.parquet has 4x4 pixels, row 0 of test-0.parquet has 6x5"),
        ("negative", r"row 0 of test-0.parquet has the label -1"),
        ("split", r"no test-\*.parquet in .*split; there is train-0.parquet"),
        ("broken", r"test-0.parquet cannot be read as Parquet"),
        ("sizes", r"small.png has 4x4 pixels"),
        ("cut", r"cut.png is a corrupt image"),
        ("one", r"at least two folders"),
        ("bare", r"b holds no PNG or JPEG image"),
    ],
)
def test_a_mistake_in_the_data_names_its_place(tmp_path, name, message):
    _mistakes(tmp_path)
    with pytest.raises(BackpassError, match=message):
        load_data(str(tmp_path / name))


def test_data_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackpassError, match="BACKPASS_DATA is not set"):
        load_data("mnist")
    with pytest.raises(UnknownNameError, match="Did you mean 'mnist'"):
        load_data("mnst")
    with pytest.raises(BackpassError, match="there is no folder './mnist'"):
        load_data("./mnist")
    with pytest.raises(UnknownNameError, match="Did you mean 'test'"):
        load_data("digits", split="tset")
    parquet(tmp_path / "all" / "mine" / "test-0.parquet", [picture(1)[0]], [0])
    monkeypatch.setenv("BACKPASS_DATA", str(tmp_path / "all"))
    assert len(load_data("mine").images) == 1
    with pytest.raises(UnknownNameError, match="Known: cifar10, digits, mine, mnist"):
        load_data("yours")
    with pytest.raises(BackpassError, match="there is no .*all/mnist"):
        load_data("mnist")


PUBLISHED = os.environ.get("BACKPASS_DATA")


@pytest.mark.skipif(not PUBLISHED, reason="BACKPASS_DATA names no folder with mnist and cifar10")
@pytest.mark.parametrize(
    ("name", "shape", "mean"), [("mnist", (10000, 1, 28, 28), 0.1325), ("cifar10", (10000, 3, 32, 32), 0.4765)]
)
def test_the_published_data_sets_are_read(monkeypatch, name, shape, mean):
    monkeypatch.setenv("BACKPASS_DATA", PUBLISHED)
    data = load_data(name)
    assert data.images.pixels.shape == shape
    assert data.images.labels.bincount().min() > 800
    assert data.images.x.mean().item() == pytest.approx(mean, abs=0.002)
    assert ("re-encoded" in data.warning) == ("JPEG" in data.description)
