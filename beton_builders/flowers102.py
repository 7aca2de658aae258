"""Oxford Flowers: 8,189 photographs of flowers in 102 classes.

    jpg/image_00001.jpg ...    102flowers.tgz unpacked (345 MB, md5 52808999861908f626f3c1f4e79d11fa)
    imagelabels.mat            a label from 1 to 102 per image (md5 e0620be6f572b9609742df49c70aed4d)
    setid.mat                  the numbers of each split's images (md5 a5357ecc9cb78c4bef273ce3793fc85c)

in SOURCE or SOURCE/flowers-102; all from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/. Splits: train and val,
1,020 images each, and test, 6,149. Order: that of setid.mat. The files name no classes; the names here are those of
torchvision, in the order of the labels. License: none is given; the authors ask to be cited (Nilsback and Zisserman,
Automated Flower Classification over a Large Number of Classes, 2008); the images come from the web.
"""

from pathlib import Path

from beton_builders import Splits
from beton_builders._files import find_folder, read_mat, whole_numbers
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "the folder with jpg and imagelabels.mat"
LABEL_FILES = ("*.mat", "flowers-102/*.mat")
DOWNLOAD = [{"dataset": "Flowers102"}]

NAMES = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid, bird
of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris, globe-flower,
purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red
ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william, carnation,
garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort,
siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold,
buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff,
gaura, geranium, orange dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed susan, silverbush,
californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily,
rose, thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus,
columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss,
foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
"""
CLASSES = " ".join(NAMES.split()).split(", ")
SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}  # and their names in setid.mat
IMAGES = 8189
HOW_TO_GET = "get them from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ and unpack them: tar -xzf 102flowers.tgz"


def splits(source: Path) -> Splits:
    folder = find_folder("flowers102", source, ["", "flowers-102"], ["jpg", "imagelabels.mat", "setid.mat"], HOW_TO_GET)
    labels_path, numbers_path = folder / "imagelabels.mat", folder / "setid.mat"
    labels = whole_numbers(labels_path, "labels", read_mat(labels_path, ["labels"])["labels"], 1, len(CLASSES))
    images = min(IMAGES, len(labels))
    below = (folder / "jpg").relative_to(source)
    found: Splits = {}
    for split, (variable, value) in zip(SPLITS, read_mat(numbers_path, list(SPLITS.values())).items()):
        numbers = whole_numbers(numbers_path, variable, value, 1, images).tolist()  # from 1, as the labels are
        names = [f"{below}/image_{number:05d}.jpg" for number in numbers]
        samples = [Sample(f"{source}/{name}", int(labels[i - 1]) - 1, name) for i, name in zip(numbers, names)]
        found[split] = (CLASSES, samples)
    return found
