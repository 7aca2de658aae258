"""Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28 px, in ten classes.

    train-images-idx3-ubyte.gz     26 MB, md5 8d4fb7e6c68d591d4c3dfef9ec88bf0d
    train-labels-idx1-ubyte.gz     30 kB, md5 25c81989df183df01b3e8a0aad5dffbe
    t10k-images-idx3-ubyte.gz     4.4 MB, md5 bef4ecab320f06d8554ea6380940ec79
    t10k-labels-idx1-ubyte.gz     5.1 kB, md5 bb300cfdad3c16e7a12a480ee83cd310

in SOURCE, SOURCE/raw or SOURCE/FashionMNIST/raw, compressed or not; from
https://github.com/zalandoresearch/fashion-mnist. They have the names of MNIST's files, so keep the two apart. Splits:
train and test; only one if the files of the other are missing. Order: that of the files. License: MIT (Zalando SE).
"""

from pathlib import Path

from beton_builders import Splits
from beton_builders.mnist import idx_splits

CANVAS = 32
SOURCE = "the folder with train-images-idx3-ubyte.gz"
DOWNLOAD = [{"dataset": "FashionMNIST"}]

CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")


def splits(source: Path) -> Splits:
    origin = "https://github.com/zalandoresearch/fashion-mnist"
    return idx_splits(source, "fashionmnist", "FashionMNIST", CLASSES, origin)
