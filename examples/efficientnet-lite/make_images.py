"""Cut natural images that scikit-image and scikit-learn ship into a folder for each class.

python make_images.py images
"""

import sys
from pathlib import Path

import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

CLASSES = {
    "Egyptian_cat": skimage.data.chelsea,
    "espresso": skimage.data.coffee,
    "palace": lambda: load_sample_image("china.jpg"),
    "tripod": skimage.data.camera,
}
SIDE = 224


def crops(image):
    """Yield six square crops: three parts of the image, each also mirrored."""
    side = round(0.9 * min(image.size))
    free_x, free_y = image.width - side, image.height - side
    for part in (0.35, 0.5, 0.65):
        left, top = round(part * free_x), round(part * free_y)
        crop = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield crop
        yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "images")
for name, load in CLASSES.items():
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number, crop in enumerate(crops(Image.fromarray(load()).convert("RGB"))):
        crop.save(folder / name / f"{number}.png")
