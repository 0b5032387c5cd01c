"""Data by name or folder: decoded once, byte for byte, and mistakes are named."""

import os

import pytest
import torch

from backpass.data import load_data
from backpass.errors import BackpassError, UnknownNameError
from support.pictures import classes, parquet, picture


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BACKPASS_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_parquet_rows_become_the_very_pixels_in_order(tmp_path):
    files = [picture(i) for i in range(5)]
    parquet(tmp_path / "d" / "test-00000-of-00002.parquet", [c for c, _ in files[:3]], [2, 0, 1], names=["a", "b", "c"])
    parquet(tmp_path / "d" / "test-00001-of-00002.parquet", [c for c, _ in files[3:]], [1, 1], names=["a", "b", "c"])
    data = load_data(str(tmp_path / "d"))
    assert torch.equal(data.images.pixels, torch.stack([pixels for _, pixels in files]))
    assert data.images.labels.tolist() == [2, 0, 1, 1, 1]
    assert data.class_name(2) == "c"
    assert data.classes == 3
    assert data.images.x.max() <= 1
    assert data.warning == ""


def test_an_images_column_may_be_called_img_and_splits_are_told_apart(tmp_path):
    (one, ours), (other, theirs) = picture(1, colour=False), picture(2, colour=False)
    parquet(tmp_path / "test-0.parquet", [one], [0], image="img")
    parquet(tmp_path / "train-0.parquet", [other], [0], image="img")
    assert torch.equal(load_data(str(tmp_path)).images.pixels[0], ours)
    assert torch.equal(load_data(str(tmp_path), split="train").images.pixels[0], theirs)


def test_the_columns_can_be_chosen(tmp_path):
    content, pixels = picture(1)
    parquet(
        tmp_path / "d" / "test-0.parquet", [content], [7], image="photo", label="fine", label_of_all=[1], coarse=[2]
    )
    fine, coarse = (load_data(f"{tmp_path / 'd'}:image=photo,label={label}") for label in ("fine", "coarse"))
    assert torch.equal(fine.images.pixels[0], pixels)
    assert (fine.images.labels.tolist(), coarse.images.labels.tolist()) == ([7], [2])
    assert (fine.classes, coarse.classes) == (8, 3)


def test_a_folder_of_classes_is_numbered_by_sorted_names(tmp_path):
    (a, a_pixels), (b, b_pixels), (dog, dog_pixels) = picture(1), picture(3), picture(2, colour=False)
    classes(tmp_path / "d", {"dog/1.png": dog, "cat/b.png": b, "cat/a.png": a, "cat/notes.txt": b"no image"})
    data = load_data(str(tmp_path / "d"))
    assert data.class_names == ("cat", "dog")
    assert data.images.labels.tolist() == [0, 1, 0]
    # Grey images among coloured ones become coloured.
    assert torch.equal(data.images.pixels, torch.stack([a_pixels, dog_pixels.expand(3, -1, -1), b_pixels]))


def test_every_image_of_a_class_is_read_also_in_folders_below_and_behind_links(tmp_path, caplog):
    kinds = {"a.PNG": "PNG", "b.jfif": "JPEG", "c.webp": "WEBP", "d.bmp": "BMP", "deep/er/e.jpeg": "JPEG"}
    files = {f"cat/{name}": picture(1, kind=kind)[0] for name, kind in kinds.items()}
    hidden = {"cat/._a.png": b"", "dog/.cache/x.png": b"", "cat/Thumbs.db": b"", "preview.png": b"", "__MACOSX/x": b""}
    classes(tmp_path / "d", {**files, "dog/1.png": picture(2)[0], **hidden})
    (tmp_path / "d" / "dog" / "more").symlink_to(tmp_path / "d" / "cat" / "deep")
    (tmp_path / "d" / "dog" / "loop").symlink_to(tmp_path / "d" / "dog")
    data = load_data(str(tmp_path / "d"))
    assert (data.class_names, data.images.labels.bincount().tolist()) == (("cat", "dog"), [5, 2])
    assert "files that are no images: 1 ('Thumbs.db')" in caplog.text
    assert "images beside the folders of classes, of no class: 1 ('preview.png')" in caplog.text


def test_the_first_images_of_a_folder_are_of_all_classes_alike(tmp_path):
    content, _ = picture(1)
    classes(
        tmp_path / "d", {f"{name}/{i}.png": content for name, n in (("a", 5), ("b", 2), ("c", 4)) for i in range(n)}
    )
    assert load_data(str(tmp_path / "d")).first(6).images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert load_data(str(tmp_path / "d")).images.labels.bincount().tolist() == [5, 2, 4]


def test_a_folder_of_classes_may_have_splits(tmp_path):
    (one, _), (two, pixels) = picture(1), picture(2)
    classes(tmp_path, {f"{split}/{name}/1.png": c for split, c in (("train", one), ("test", two)) for name in "ab"})
    assert torch.equal(load_data(str(tmp_path), split="test").images.pixels[1], pixels)
    with pytest.raises(BackpassError, match="has no 'val'; it has train, test"):
        load_data(str(tmp_path), split="val")


def test_a_part_without_one_of_the_classes_is_refused_as_its_labels_would_be_other_numbers(tmp_path):
    content, _ = picture(1)
    parts = {"train": "abc", "test": "bc"}
    classes(tmp_path, {f"{part}/{name}/1.png": content for part, names in parts.items() for name in names})
    assert load_data(str(tmp_path), split="train").class_names == ("a", "b", "c")
    with pytest.raises(BackpassError, match=r"only in train \['a'\], only in test \[\]"):
        load_data(str(tmp_path), split="test")


def test_jpeg_images_are_announced(tmp_path):
    jpeg, _ = picture(1, kind="JPEG")
    parquet(tmp_path / "cifar10" / "test-0.parquet", [jpeg], [0], image="img")
    data = load_data(str(tmp_path / "cifar10"))
    assert "JPEG" in data.description
    assert data.warning.startswith("The images are JPEG")


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
    parquet(tmp_path / "label" / "test-0.parquet", [good], [0], label="class", other=[5])
    parquet(tmp_path / "row" / "test-0.parquet", [good, good, good[:60], good], [0] * 4)
    parquet(tmp_path / "noimage" / "test-0.parquet", [good, b"not an image"], [0] * 2)
    parquet(tmp_path / "size" / "test-0.parquet", [good, other], [0] * 2)
    parquet(tmp_path / "negative" / "test-0.parquet", [good], [-1])
    parquet(tmp_path / "split" / "train-0.parquet", [good], [0])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "test-0.parquet").write_bytes(b"PAR1 and nothing else")
    classes(tmp_path / "sizes", {"a/1.png": good, "b/small.png": other})
    classes(tmp_path / "cut", {"a/1.png": good, "b/cut.png": good[:60]})
    parquet(tmp_path / "identifier" / "test-0.parquet", [good, good], [3, 1 << 40])
    parquet(tmp_path / "unnamed" / "test-0.parquet", [good, good], [1, 2], names=["a", "b"])
    shards = {"middle": ["1-of-3"], "last": ["0-of-3", "1-of-3"], "old": ["0-of-1", "0-of-2", "1-of-2"]}
    for folder, names in {**shards, "extra": ["0-of-1", "x"], "twice": ["0-of-2", "0-of-2-a"]}.items():
        for name in names:
            parquet(tmp_path / folder / f"test-{name}.parquet", [good], [0])
    classes(tmp_path / "gif", {"a/1.png": good, "b/1.png": good, "b/2.gif": b""})
    classes(tmp_path / "deeper", {f"{s}/{c}/1.png": good for s in ("training", "testing") for c in "ab"})
    classes(tmp_path / "one", {"a/1.png": good})
    classes(tmp_path / "bare", {"a/1.png": good, "b/readme.txt": b""})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("column", r"no column 'image' or 'img'; its columns are 'picture', 'label'\. .*NAME:image=picture"),
        ("label", r"no column 'label' or 'labels'; .*as in NAME:label=class \(or other\)\."),
        ("column:image=photo", r"no column 'photo'; its columns are 'picture', 'label'"),
        ("column:picture=image", r"unknown setting of data 'picture'"),
        ("column:image=", r"cannot read 'image=' in .*: expected setting=value"),
        ("row", r"row 2 of test-0.parquet is a corrupt image"),
        ("noimage", r"row 1 of test-0.parquet is no PNG, JPEG, WebP or BMP image"),
        ("size", r"row 1 of test-0.parquet has 4x4 pixels, row 0 of test-0.parquet has 6x5"),
        ("negative", r"row 0 of test-0.parquet has the label -1"),
        ("split", r"no test-\*.parquet in .*split; there is train-0.parquet"),
        ("broken", r"test-0.parquet cannot be read as Parquet"),
        ("sizes", r"small.png has 4x4 pixels"),
        ("cut", r"cut.png is a corrupt image"),
        (
            "identifier",
            r"row 1 of test-0.parquet has the label 1099511627776; expected a whole number from 0 to 999,999",
        ),
        ("unnamed", r"image 1 of .*unnamed has the label 2, and the files name 2 classes"),
        *((name, r"expected all \d shards of one set") for name in ("middle", "last", "old", "extra", "twice")),
        ("gif", r"2.gif is no PNG, JPEG, WebP or BMP image: convert it"),
        ("deeper", r"each of them 'a', 'b': expected the classes' own folders"),
        ("one", r"at least two folders"),
    ],
)
def test_a_mistake_in_the_data_names_its_place(tmp_path, name, message):
    _mistakes(tmp_path)
    with pytest.raises(BackpassError, match=message):
        load_data(str(tmp_path / name))


def test_data_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackpassError, match="cannot find 'mnist': .*BACKPASS_DATA is not set, and ylecun/mnist cannot"):
        load_data("mnist")
    with pytest.raises(UnknownNameError, match="Did you mean 'mnist'"):
        load_data("mnst")
    with pytest.raises(BackpassError, match="expected the name of a data set"):
        load_data(" ")
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


def test_a_data_set_of_the_hub_is_first_looked_for_beneath_backpass_data(tmp_path, monkeypatch):
    parquet(tmp_path / "somebody" / "cats" / "test-0.parquet", [picture(1)[0]], [0])
    parquet(tmp_path / "mnist" / "test-0.parquet", [picture(2)[0]] * 2, [0] * 2)
    monkeypatch.setenv("BACKPASS_DATA", str(tmp_path))
    assert len(load_data("somebody/cats").images) == 1
    assert len(load_data("ylecun/mnist").images) == len(load_data("mnist").images) == 2


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
