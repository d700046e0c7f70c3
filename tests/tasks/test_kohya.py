"""Kohya's dataset files: what is read, what wins, what is refused in which words."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tasks.kohya import DatasetFileError, read_toml
from tasks.trainers.batches import Batches, mask, pixels
from tasks.trainers.buckets import BucketError
from tasks.trainers.pictures import Dataset, Subset
from tests.drawn_pictures import gradient, png

ONE = 'resolution = 64\n[[datasets.subsets]]\nimage_dir = "cats"\n'


def folder(path: Path, count: int = 2, caption: str | None = "a cat", extension: str = ".caption") -> Path:
    """`count` images with captions "<caption> <number>"."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (path / f"{number}.png").write_bytes(png(64 + 32 * number, 64))
        if caption is not None:
            (path / f"{number}{extension}").write_text(f"{caption} {number}\n")
    return path


@pytest.fixture
def read(tmp_path: Path):
    """Reads a TOML text as `dataset.toml` beside a folder `cats`; a text without tables stands in the only dataset."""
    folder(tmp_path / "cats")

    def read(text: str) -> list[Dataset]:
        path = tmp_path / "dataset.toml"
        path.write_text(text if text.startswith("[") else f"[[datasets]]\n{text}")
        return read_toml(path)

    return read


def captions(subset: Subset) -> list[str]:
    return [picture.caption for picture in subset.pictures]


def test_a_dataset_is_read_with_its_pictures(read, tmp_path: Path):
    (dataset,) = read(ONE)
    (subset,) = dataset.subsets
    assert dataset == Dataset((subset,), (64, 64)) and subset == Subset(subset.pictures)  # all defaults are Kohya's
    assert captions(subset) == ["a cat 0", "a cat 1"]
    assert [(picture.width, picture.height) for picture in subset.pictures] == [(64, 64), (96, 64)]
    assert [picture.read() for picture in subset.pictures] == [png(64, 64), png(96, 64)]
    assert len({picture.id for picture in subset.pictures}) == 2 and len(subset.pictures[0].id) == 64


def test_every_option_arrives_where_it_belongs(read):
    (dataset,) = read(
        """[[datasets]]
        resolution = [128, 64]
        batch_size = 3
        enable_bucket = true
        min_bucket_reso = 32
        max_bucket_reso = 256
        bucket_reso_steps = 16
        bucket_no_upscale = true
        [[datasets.subsets]]
        image_dir = "cats"
        num_repeats = 5
        keep_tokens = 2
        keep_tokens_separator = "|||"
        shuffle_caption = true
        caption_separator = ";"
        caption_prefix = "photo of"
        caption_suffix = "at night"
        caption_dropout_rate = 0.1
        caption_dropout_every_n_epochs = 4
        caption_tag_dropout_rate = 1
        flip_aug = true
        color_aug = true
        random_crop = true
        alpha_mask = true
        is_reg = true
        """
    )
    subset = dataset.subsets[0]
    assert dataset == Dataset((subset,), (128, 64), 3, True, 32, 256, 16, True)
    assert subset == Subset(
        subset.pictures, 5, True, 2, "|||", True, ";", "photo of", "at night", 0.1, 4, 1, True, True, True, True
    )


def test_the_inner_level_wins(read, tmp_path: Path):
    folder(tmp_path / "dogs")
    (dataset,) = read(
        """[general]
        resolution = 512
        batch_size = 4
        num_repeats = 2
        flip_aug = true
        keep_tokens = 1
        [[datasets]]
        resolution = 64
        num_repeats = 3
        [[datasets.subsets]]
        image_dir = "cats"
        num_repeats = 4
        flip_aug = false
        [[datasets.subsets]]
        image_dir = "dogs"
        """
    )
    assert (dataset.resolution, dataset.batch_size) == ((64, 64), 4)
    assert [(s.num_repeats, s.flip_aug, s.keep_tokens) for s in dataset.subsets] == [(4, False, 1), (3, True, 1)]


def test_several_concepts_with_class_images(read, tmp_path: Path):
    folder(tmp_path / "my cat", 3, caption=None)
    folder(tmp_path / "class", 2, caption=None)
    (dataset,) = read(
        """resolution = 64
        [[datasets.subsets]]
        image_dir = "my cat"
        class_tokens = "sks cat"
        num_repeats = 2
        [[datasets.subsets]]
        image_dir = "class"
        class_tokens = "cat"
        is_reg = true
        """
    )
    batches = Batches([dataset], 0, 8)
    items = [item for step in range(len(batches)) for item in batches.batch(step).items]
    assert sorted(item.caption for item in items) == ["cat"] * 6 + ["sks cat"] * 6
    assert all(item.is_reg == (item.caption == "cat") for item in items)


def test_several_datasets_may_share_a_folder_at_other_resolutions(read):
    datasets = read(
        """[[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = "cats"
        [[datasets]]
        resolution = [32, 96]
        [[datasets.subsets]]
        image_dir = "cats"
        """
    )
    assert [dataset.resolution for dataset in datasets] == [(64, 64), (32, 96)]


# --- pictures and captions --------------------------------------------------------------------------------------------


def test_a_relative_folder_is_looked_for_where_kohya_does_and_then_beside_the_file(read, tmp_path: Path, monkeypatch):
    assert captions(read(ONE)[0].subsets[0]) == ["a cat 0", "a cat 1"]
    folder(tmp_path / "elsewhere" / "cats", caption="another cat")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert captions(read(ONE)[0].subsets[0]) == ["another cat 0", "another cat 1"]


def test_the_first_line_of_a_caption_file_counts_and_may_be_empty(read, tmp_path: Path):
    (tmp_path / "cats/0.caption").write_bytes("\ufeff ein Kätzchen \r\nzweite Zeile".encode())
    (tmp_path / "cats/1.caption").write_text("\n")
    assert captions(read(ONE)[0].subsets[0]) == ["ein Kätzchen", ""]


@pytest.mark.parametrize("extension", [".txt", "txt"])
def test_captions_with_another_extension(read, tmp_path: Path, extension: str):
    folder(tmp_path / "dogs", caption="a dog", extension=".txt")
    text = f'resolution = 64\n[[datasets.subsets]]\nimage_dir = "dogs"\ncaption_extension = "{extension}"'
    assert captions(read(text)[0].subsets[0]) == ["a dog 0", "a dog 1"]


def test_class_tokens_stand_in_for_captions_that_are_not_there(read, tmp_path: Path):
    (tmp_path / "cats/1.caption").unlink()
    assert captions(read(ONE + 'class_tokens = "cat"')[0].subsets[0]) == ["a cat 0", "cat"]


def test_images_without_captions_are_an_error_that_knows_of_other_files(read, tmp_path: Path):
    (tmp_path / "cats/1.caption").unlink()
    with pytest.raises(
        DatasetFileError, match=r"subset 1: 1 of 2 images have no caption file ending in \.caption \(1\.png\): write"
    ):
        read(ONE)
    (tmp_path / "cats/1.txt").write_text("a cat")
    with pytest.raises(
        DatasetFileError, match=r'set caption_extension = "\.txt", since there are such files, or set cl'
    ):
        read(ONE)


def test_only_images_are_taken_and_folders_are_not_searched(read, tmp_path: Path):
    (tmp_path / "cats/notes.md").write_text("")
    (tmp_path / "cats/2.JPG").write_bytes((tmp_path / "cats/0.png").read_bytes())
    folder(tmp_path / "cats" / "5_inner")
    subset = read(ONE + 'class_tokens = "cat"')[0].subsets[0]
    assert captions(subset) == ["a cat 0", "a cat 1", "cat"] and subset.num_repeats == 1


def test_a_picture_that_a_camera_turned_has_its_upright_size(read, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(gradient(96, 64)).save(tmp_path / "cats/0.jpg", exif=exif)
    (dataset,) = read(ONE.replace("64", "[64, 96]", 1))
    turned = next(p for p in dataset.subsets[0].pictures if p.height == 96)
    assert turned.width == 64
    batches = Batches([dataset], 0, 8)
    assert {tuple(pixels(batches.batch(step).items[0]).shape) for step in range(len(batches))} == {(3, 96, 64)}


def test_the_alpha_channel_weighs_where_it_is_asked_for(read, tmp_path: Path):
    image = Image.fromarray(gradient(64, 64))
    image.putalpha(0)
    image.save(tmp_path / "cats/0.png")
    (tmp_path / "cats/1.png").unlink()
    weights = mask(Batches(read(ONE + "alpha_mask = true"), 0, 8).batch(0).items[0])
    assert weights is not None and weights.eq(0).all()
    assert mask(Batches(read(ONE), 0, 8).batch(0).items[0]) is None


METADATA = {
    "0.png": {"caption": "a cat", "tags": "red, small", "train_resolution": [64, 64]},
    "1": {"tags": "blue\nsecond line"},
}


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_metadata_file_names_images_and_captions(read, tmp_path: Path, form: str):
    lines = "\n".join(json.dumps({"image_path": name, **entry}) for name, entry in METADATA.items())
    (tmp_path / f"meta.{form}").write_text(json.dumps(METADATA) if form == "json" else lines)
    text = f'resolution = 64\n[[datasets.subsets]]\nmetadata_file = "meta.{form}"\nimage_dir = "cats"\nnum_repeats = 2'
    subset = read(text)[0].subsets[0]
    assert captions(subset) == ["a cat,red, small", "blue"] and subset.num_repeats == 2
    assert [picture.width for picture in subset.pictures] == [64, 96]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (ONE + "num_repeat = 3", r"\[\[datasets\]\] 1, subset 1: unknown key 'num_repeat' \(did you mean num_repeats\?\)"),
        (ONE + "num_repeat = 3", r"known here are image_dir, metadata_file, is_reg, alpha_mask, num_repeats, "),
        ("zzz = 1\n" + ONE, r"\[\[datasets\]\] 1: unknown key 'zzz'; known here are resolution, "),
        ("[general]\nflip = true\n[[datasets]]\n" + ONE, r"\[general\]: unknown key 'flip' \(did you mean flip_aug\?\)"),
        ("[generel]\n[[datasets]]\n" + ONE, r"unknown table or key 'generel'"),
        ('[general]\nimage_dir = "cats"\n[[datasets]]\n' + ONE, r"image_dir does not belong here, but into \[\[datasets\.s"),
        (ONE + "resolution = 64", r"subset 1: resolution does not belong here, but into \[\[datasets\]\] or \[general\]"),
        (ONE + 'num_repeats = "3"', r'num_repeats must be a whole number from 1 to 10,000.*, received "3"'),
        (ONE + "num_repeats = 0", r"num_repeats must be a whole number from 1 to 10,000.*, received 0"),
        (ONE + "num_repeats = 1000000000", r"1, subset 1: num_repeats must be .* to 10,000, as an .*, received 1000000000"),
        (ONE + "num_repeats = true", r"num_repeats must be a whole number from 1 to 10,000.*, received true"),
        (ONE + "flip_aug = 1", r"flip_aug must be true or false, received 1"),
        (ONE + "caption_dropout_rate = 1.5", r"caption_dropout_rate must be a number from 0 to 1, received 1\.5"),
        (ONE + "keep_tokens = -1", r"keep_tokens must be a whole number from 0, received -1"),
        (ONE + 'caption_separator = ""', r"caption_separator must be a text in quotes that is not empty"),
        (ONE.replace("64", "[64]"), r"resolution must be a whole number of pixels, or \[width, height\], received \[64\]"),
        (ONE.replace("64", "512.0"), r"resolution must be a whole number of pixels"),
        ("batch_size = 0\n" + ONE, r"batch_size must be a whole number from 1, received 0"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"', r"resolution is missing, such as resolution = 512"),
        ("[[datasets]]\nresolution = 64", r"\[\[datasets\]\] 1: there is no subset"),
        ("[general]\nresolution = 64", r"there is no dataset: write \[\[datasets\]\]"),
        ("[datasets]\nresolution = 64", r"there is no dataset: write \[\[datasets\]\]"),
        ("resolution = 64\n[[datasets.subsets]]\nnum_repeats = 2", r"subset 1: image_dir is missing"),
        (ONE + '[[datasets.subsets]]\nimage_dir = "cats"', r"image_dir 'cats' stands in two subsets"),
        (ONE + '[[datasets.subsets]]\nmetadata_file = "m.json"', r"with and without metadata_file cannot be mixed"),
        (
            'resolution = 64\n[[datasets.subsets]]\nmetadata_file = "m.json"\nis_reg = true',
            r"is_reg has no meaning beside metadata_file",
        ),
        (ONE + "enable_wildcard = true", r"enable_wildcard = true is known to Kohya, but Darkroom does not do it.*to false"),
        (ONE + "face_crop_aug_range = [1.0, 2.0]", r"face_crop_aug_range = \[1\.0, 2\.0\] is known to Kohya.*leave it out"),
        (ONE + 'conditioning_data_dir = "x"', r'conditioning_data_dir = "x" is known to Kohya'),
        ("validation_split = 0.1\n" + ONE, r"validation_split = 0\.1 is known to Kohya"),
        ("[[datasets]\n", r"cannot be read as TOML"),
        (ONE.replace("cats", "dogs"), r"there is no folder 'dogs', neither here \(.*\) nor beside the file"),
        (ONE.replace("cats", "/nowhere/dogs"), r"there is no folder '/nowhere/dogs': correct image_dir"),
        (ONE.replace("cats", "."), r"holds no image \(.*\.png.*\); it is not searched within \(cats\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_name_and_place(read, text: str, told: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetFileError, match=told):
        read(text)


def test_all_that_is_wrong_is_told_at_once(read):
    with pytest.raises(DatasetFileError, match="has 3 problems") as error:
        read("batch_size = 0\n" + ONE + 'flip_aug = "yes"\nnum_repeat = 1')
    assert str(error.value).count("\n  ") == 3


@pytest.mark.parametrize(
    "off",
    [
        "enable_wildcard = false",
        "token_warmup_step = 0",
        "token_warmup_step = 0.0",
        "token_warmup_min = 1",
        'secondary_separator = ""',
        "cache_info = true",
    ],
)
def test_what_is_not_done_may_be_switched_off(read, off: str):
    assert captions(read(ONE + off)[0].subsets[0]) == ["a cat 0", "a cat 1"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", r"metadata_file '.*' is not one of Kohya's: JSONDecodeError"),
        ("[1]", r"is not one of Kohya's: TypeError"),
        ('{"0.png": "a cat"}', r"is not one of Kohya's: AttributeError"),
        ("{}", r"names no image"),
        ('{"0.png": {}}', r"'0\.png' of '.*' is a relative path: set image_dir"),
        ('{"/nowhere/0.png": {}}', r"'/nowhere/0\.png' is not an image"),
        (None, r"there is no metadata_file"),
    ],
)
def test_a_metadata_file_that_is_none_is_told(read, tmp_path: Path, content: str | None, told: str):
    if content is not None:
        (tmp_path / "m.json").write_text(content)
    with pytest.raises(DatasetFileError, match=told):
        read('resolution = 64\n[[datasets.subsets]]\nmetadata_file = "m.json"')


def test_files_that_are_no_images_or_captions_are_named(read, tmp_path: Path):
    (tmp_path / "cats/0.png").write_bytes(b"torn")
    with pytest.raises(DatasetFileError, match=r"cats/0\.png' is not an image"):
        read(ONE)
    folder(tmp_path / "cats")
    (tmp_path / "cats/0.caption").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetFileError, match=r"cats/0\.caption' is not UTF-8"):
        read(ONE)
    (tmp_path / "cats/0.caption").write_bytes(b"")
    with pytest.raises(DatasetFileError, match=r"cats/0\.caption' is empty"):
        read(ONE)


def test_a_file_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(DatasetFileError, match=r"there is no dataset file '.*nothing\.toml'"):
        read_toml(tmp_path / "nothing.toml")


def test_buckets_larger_than_the_resolution_are_told_by_kohyas_names(read):
    with pytest.raises(BucketError, match=r"resolution is 64×64, below min_bucket_reso = 256"):
        Batches(read("enable_bucket = true\n" + ONE), 0, 8)
