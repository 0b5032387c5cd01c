"""Images of a training experiment: training, held-out and test images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from backpass.data import Images, load_data
from backpass.models.shapes import Shape, check_shape

__all__ = ["Parts", "Source", "load_parts"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Selection of the images of a data set.

    Attributes:
        data: a data set with the parts ``train`` and ``test``.
        train: number of training images, the first ones; None: all but the held-out ones.
        held_out: number of held-out images, the last of the training part.
        test: number of test images, the first ones; None: all.
    """

    data: str
    train: int | None = None
    held_out: int = 0
    test: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The images of a `Source`.

    Attributes:
        train: training images.
        held_out: held-out images; empty if the source has none.
        test: test images.
        classes: number of classes.
        description: one line for reports.
        warning: warning about the images for reports; may be empty.
    """

    train: Images
    held_out: Images
    test: Images
    classes: int
    description: str
    warning: str = ""

    @property
    def shape(self) -> Shape:
        """(C, H, W) of one image."""
        return check_shape(tuple(self.train.pixels.shape[1:]))

    @property
    def line(self) -> str:
        """Description and warning."""
        return " ".join(filter(None, (f"{self.description}.", self.warning)))


@lru_cache(maxsize=2)
def load_parts(source: Source) -> Parts:
    """Return the images, decoded once and mapped from the cache.

    Raises:
        UnknownNameError: there is no data set of this name.
        BackpassError: the data is not where it should be, or has too few images.
    """
    whole, test = load_data(source.data, split="train"), load_data(source.data, split="test").first(source.test)
    rest = whole.first(len(whole.images) - source.held_out)
    learned = rest.first(source.train).images
    kept = slice(len(rest.images), None)
    images = whole.images
    held_out = Images(pixels=images.pixels[kept], labels=images.labels[kept], white=images.white)
    description = f"{source.data}: {len(learned):,} images to learn from, {len(test.images):,} test images"
    if source.held_out:
        description += f", {source.held_out:,} held-out training images to choose rates on"
    return Parts(
        train=learned,
        held_out=held_out,
        test=test.images,
        classes=whole.classes,
        description=description,
        warning=whole.warning,
    )
