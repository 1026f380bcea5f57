"""Names and folders -> ImageDataset.

The way of an image: a layout on disk (`layouts`) is read as a `Source`, whose images are decoded (`decode`) once
into a packed uint8 cache (`pack`), which `load_dataset` memory-maps.
"""

from ddgen.data.classes import check_class_order
from ddgen.data.dataset import ImageDataset, split_holdout
from ddgen.data.load import load_dataset, native_image_size

__all__ = ["ImageDataset", "check_class_order", "load_dataset", "native_image_size", "split_holdout"]
