"""Names of folders and files decide nothing in silence: splits, classes, litter, links, suffixes."""

import os

import pytest
from PIL import Image

from beton_builders import imagefolder, imagenet
from beton_builders._files import IMAGE_SUFFIXES, image_paths, walk


def tree(root, *folders, images=2):
    """Make folders with images in each."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            (root / folder / f"{number}.jpg").touch()
    return root


def found(root, **options):
    """Return the classes and the labels of each split."""
    return {
        split: (classes, [sample.label for sample in samples])
        for split, (classes, samples) in imagefolder.splits(root, **options).items()
    }


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "valid"), ("training", "validation"), ("Train", "VAL"), ("train", "dev"), ("TRAIN", "Development")],
)
def test_every_word_for_a_split_is_one_in_any_case(train, val, tmp_path):
    tree(tmp_path, f"{train}/cat", f"{train}/dog", f"{val}/cat", f"{val}/dog")
    assert found(tmp_path) == dict.fromkeys(("train", "val"), (["cat", "dog"], [0, 0, 1, 1]))


@pytest.mark.parametrize("test", ["test", "Test", "testing", "eval", "evaluation"])
def test_words_for_the_test_split(test, tmp_path):
    tree(tmp_path, "train/cat", f"{test}/cat")
    assert list(found(tmp_path)) == ["train", "test"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["car", "train", "truck"], "holds train/ next to other folders of images, car/, truck/: .*--splits none"),
        (["beaker", "test"], "holds test/ next to other folders of images, beaker/"),
        (["train/cat", "val/cat", "extra"], "holds train/ and val/ next to other folders of images, extra/"),
        (["train/cat", "valid/cat", "validation/cat"], "holds valid/ and validation/, and imagefolder takes both"),
        (["Train/cat", "train/cat"], "holds Train/ and train/, and imagefolder takes both"),
        (["test/cat", "eval/cat"], "takes both for the split test"),
        (["bottle/train/good", "bottle/test/bad"], "bottle is a class in .*--source .*bottle .*--splits none"),
        (["data/train/cat", "data/val/cat"], "holds train/, which is named as a split: use --source .*data"),
        (["images/train", "images/val"], "holds train/, which is named as a split"),
        (["train2017", "val2017"], "words for splits, train2017, val2017: rename .*--splits none"),
        (["training_set/cat", "test_set/cat"], "words for splits, test_set, training_set"),
    ],
)
def test_what_may_be_splits_or_classes_is_refused(folders, message, tmp_path):
    tree(tmp_path, *folders)
    with pytest.raises(ValueError, match=message):
        found(tmp_path)


def test_without_splits_by_name_every_folder_is_a_class(tmp_path):
    tree(tmp_path, "car", "test", "train/freight", "val")
    assert found(tmp_path, by_name=False) == {"train": (["car", "test", "train", "val"], [0, 0, 1, 1, 2, 2, 3, 3])}


def test_class_names_with_a_word_for_a_split_are_classes(tmp_path):
    tree(tmp_path, "airfield", "train_station", "test_tube")
    assert found(tmp_path)["train"][0] == ["airfield", "test_tube", "train_station"]


def test_folders_without_images_next_to_splits_do_not_matter(tmp_path):
    tree(tmp_path, "train/cat", "val/cat")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.xml").touch()
    assert list(found(tmp_path)) == ["train", "val"]


def test_an_empty_class_stays_a_class(tmp_path):
    tree(tmp_path, "cat", "dog")
    (tmp_path / "bird").mkdir()
    assert found(tmp_path) == {"train": (["bird", "cat", "dog"], [1, 1, 2, 2])}


def test_litter_is_neither_a_class_nor_data(tmp_path):
    litter = ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", ".ipynb_checkpoints", "#recycle", "cat/@EADIR/0.jpg"]
    tree(tmp_path, "cat", "dog", "cat/.thumbs", "System Volume Information", *litter)
    for name in ("Thumbs.db", "._0.jpg", ".hidden.jpg", "desktop.ini"):
        (tmp_path / "dog" / name).touch()
    assert found(tmp_path) == {"train": (["cat", "dog"], [0, 0, 1, 1])}


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    store = tree(tmp_path / "store", "one", "two")
    photos = tree(tmp_path / "photos", "cat", "dog")
    os.symlink(store / "one", photos / "cat" / "more")  # within a class
    os.symlink(store / "two", photos / "horse")  # a class
    os.symlink(store / "two" / "0.jpg", photos / "dog" / "link.jpg")
    os.symlink(photos, photos / "dog" / "loop")  # to a folder above
    os.symlink(photos / "dog", photos / "dog" / "itself")
    os.symlink(store, photos / "cat" / "more_again")
    assert found(photos) == {"train": (["cat", "dog", "horse"], [0] * 8 + [1] * 3 + [2] * 2)}


def test_links_that_multiply_end_with_a_sentence(tmp_path):
    """Two links in each of twelve folders lead to the next one: the last is reached 4,096 times."""
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in "ab":
            os.symlink(tmp_path / str(number + 1), folder / name)
    tree(tmp_path, "12")
    with pytest.raises(ValueError, match="More than 1000 symbolic links lead to"):
        list(walk(str(tmp_path / "0")))


@pytest.mark.parametrize("suffix", [".jpe", ".jfif", ".JFIF", ".avif", ".ppm", ".pgm", ".jp2", ".tga", ".WebP"])
def test_what_pillow_reads_is_read(suffix, tmp_path):
    (tmp_path / f"a{suffix}").touch()
    assert list(image_paths(str(tmp_path))) == [str(tmp_path / f"a{suffix}")]


def test_suffixes_are_those_of_pillow_and_of_no_program():
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN or kind == "MPO"}
    assert set(IMAGE_SUFFIXES) <= known
    assert not {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5"} & set(IMAGE_SUFFIXES)


@pytest.mark.parametrize("val", ["val", "validation", "Valid", "VAL"])
def test_imagenet_finds_its_validation_images_under_other_names(val, tmp_path):
    tree(tmp_path, "train/n01440764", "train/n01443537", f"{val}/n01440764", f"{val}/n01443537")
    splits = imagenet.splits(tmp_path)
    assert {split: len(list(samples)) for split, (_, samples) in splits.items()} == {"train": 4, "val": 4}
    assert next(iter(imagenet.splits(tmp_path)["val"][1])).name == "val/n01440764/0.jpg"
