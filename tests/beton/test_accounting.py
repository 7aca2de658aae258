"""A build accounts for every file of its source, and refuses to write into it."""

import io
import os
import re
import tarfile

import pytest
from PIL import Image
from synthetic_images import jpeg_bytes, photo

from fastssl.beton import BuildOptions, build_beton, estimate_build
from fastssl.cli import main
from fastssl.common.errors import UserError

JPEG = jpeg_bytes(photo(0, 24, 20))


def build(source, out, builder="imagefolder", **options):
    return build_beton(builder, source, out, workers=1, canvas=8, **options)


def check_sums(account):
    """The numbers after "Of N files" and "Of N images" add up to N."""
    sentences = re.findall(r"Of ([\d,]+) (?:files|images)[^:]*: (.*?)(?=\. Of|\.$)", account)
    assert sentences
    for total, parts in sentences:
        numbers = re.findall(r"(?:^|, )([\d,]*\d) ", re.sub(r"\([^()]*\)", "", parts))
        assert sum(int(number.replace(",", "")) for number in numbers) == int(total.replace(",", "")), account


def messy(root):
    """A folder as people have it: 20 files, 7 of them images that are read."""
    for folder in ("cat", "dog", "dog/@eaDir/x", "__MACOSX"):
        (root / folder).mkdir(parents=True)
        for name in ("a.jpg", "b.jpg", "c.JFIF"):
            (root / folder / name).write_bytes(JPEG)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "more.TXT", "no_suffix", "a.heic"):
        (root / "cat" / name).write_bytes(b"x")
    (root / "cat" / "broken.png").write_bytes(b"x")
    os.mkfifo(root / "cat" / "pipe.jpg")
    return root


def test_every_file_of_a_folder_is_counted(tmp_path):
    source = messy(tmp_path / "photos")
    files = sum(len(names) for _, _, names in os.walk(source))
    for up_to_date in (False, True):
        report = build(source, tmp_path / "out")
        assert report.splits[0].up_to_date == up_to_date
        check_sums(report.account)
        assert report.account == (
            f"Of {files} files in {source}: 7 read, 8 litter of other programs (@eaDir 3, __MACOSX 3, .DS_Store 1, "
            "Thumbs.db 1), 4 not images by their suffix (.txt 2, .heic 1, no suffix 1), 1 pipes, sockets or devices. "
            "Of 7 images: 6 stored, 1 bad."
        ).replace(
            "(@eaDir 3, __MACOSX 3,", re.search(r"\((@eaDir|__MACOSX) 3, (@eaDir|__MACOSX) 3,", report.account)[0]
        )


def test_images_that_are_not_chosen_or_not_read_are_said(tmp_path):
    source = tmp_path / "in"
    for folder in ("train/n01440764", "train/other_class", "val/n01440764", "extra"):
        (source / folder).mkdir(parents=True)
        for number in range(3):
            (source / folder / f"{number}.JPEG").write_bytes(JPEG)
    report = build(source, tmp_path / "out", "imagenet", limit=2)
    check_sums(report.account)
    assert "6 read, 6 images that imagenet does not read (in extra 3, in train 3)" in report.account
    assert "Of 6 images: 4 stored, 2 left out by --limit." in report.account


def test_files_in_shards_that_are_not_used_are_said(tmp_path):
    source = tmp_path / "shards"
    source.mkdir()
    with tarfile.open(source / "a.tar", "w") as tar:
        for name, content in (("1.jpg", JPEG), ("1.cls", b"0"), ("2.jpg", JPEG), ("2.mask.npy", b"x"), ("notes", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    report = build(source, tmp_path / "out", "webdataset")
    check_sums(report.account)
    assert "Of 1 file in" in report.account
    assert "2 stored, 2 left out: files in shards" in report.account


def test_a_source_of_one_file_accounts_for_its_entries(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "list.csv").write_text("path,label\na.jpg,x\n")
    assert build(tmp_path / "list.csv", tmp_path / "out", "csv").account == "Of 1 images: 1 stored."


def test_the_command_says_all_of_it(tmp_path, capsys, monkeypatch):
    source = messy(tmp_path / "photos")
    (source / "bird").mkdir()
    command = ["build-beton", "imagefolder", "--source", str(source), "--out", str(tmp_path / "out"), "--canvas", "8"]
    monkeypatch.setattr("sys.argv", ["fastssl", *command, "--workers", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "holds 6 images of 3 classes (bird, cat, dog)" in shown
    assert "Classes without images in the split train: 1 (bird)." in shown
    assert "Of 7 images: 6 stored, 1 bad." in shown


@pytest.mark.parametrize("out", [".", "beton", "cat/deeper", "link"])
def test_the_source_is_not_written_to(out, tmp_path):
    """It would be a class or a part of one at the next build; also through a symbolic link."""
    source = tmp_path / "photos"
    (source / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(source / "cat" / "a.png")
    os.symlink(source / "cat", tmp_path / "link")
    path = tmp_path / "link" if out == "link" else source / out
    with pytest.raises(UserError, match="choose a folder outside of it"):
        build(source, path)
    with pytest.raises(UserError, match="choose a folder outside of it"):
        estimate_build("imagefolder", source, path, BuildOptions(workers=1))
    assert sorted(os.listdir(source / "cat")) == ["a.png"]
