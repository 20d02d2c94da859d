"""Data sets as NumPy splits with a content digest; most need no network.

``load(name)`` prepares a data set once, in array_record files, and reads it back.
Importing this folder imports neither TensorFlow Datasets nor scikit-learn; ``load``
needs the extra ``jaxlab[train]``. The functions that make arrays need NumPy alone
(``digits``: scikit-learn too).
"""

from jaxlab.datasets.curves import curves
from jaxlab.datasets.dataset import Dataset, content_digest, make_dataset
from jaxlab.datasets.digits import digits
from jaxlab.datasets.gaussian_clusters import gaussian_clusters
from jaxlab.datasets.loading import load, names
from jaxlab.datasets.planted import planted_structure
from jaxlab.datasets.stdlib_text import decode_text, encode_text, stdlib_text, windows

__all__ = [
    "Dataset",
    "content_digest",
    "curves",
    "decode_text",
    "digits",
    "encode_text",
    "gaussian_clusters",
    "load",
    "make_dataset",
    "names",
    "planted_structure",
    "stdlib_text",
    "windows",
]
