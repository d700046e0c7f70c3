"""What is seen at which step, and what it looks like."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tasks.trainers.batches import Batches, PictureError, View, mask, pixels
from tasks.trainers.buckets import BucketError
from tasks.trainers.pictures import Dataset, Picture, Subset
from tests.drawn_pictures import gradient, picture, pictures

SIZES = ((64, 64), (96, 64), (64, 96), (128, 64), (200, 100), (33, 77))
BUCKETS = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}


def one(subset: Subset, **options) -> Dataset:
    return Dataset((subset,), (64, 64), **options)


def epoch(batches: Batches, number: int = 0) -> list:
    return [batches.batch(number * len(batches) + step) for step in range(len(batches))]


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


subsets = st.builds(
    lambda sizes, repeats, crop, flip, prefix: Subset(
        tuple(picture(f"{prefix}{number}", *size) for number, size in enumerate(sizes)),
        num_repeats=repeats,
        random_crop=crop,
        flip_aug=flip,
    ),
    st.lists(st.sampled_from(SIZES), min_size=1, max_size=8),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["a", "b"]),
)
datasets = st.builds(
    lambda subsets, size, bucketed, no_upscale: Dataset(
        tuple(subsets), (64, 64), size, **(BUCKETS | {"bucket_no_upscale": no_upscale} if bucketed else {})
    ),
    st.lists(subsets, min_size=1, max_size=3),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(datasets, min_size=1, max_size=2), st.integers(0, 2**32), st.integers(0, 5))
def test_an_epoch_shows_every_picture_as_often_as_it_should(several: list[Dataset], seed: int, number: int):
    seen = Counter(item.picture.id for batch in epoch(Batches(several, seed, 8), number) for item in batch.items)
    asked: Counter[str] = Counter()  # two subsets may hold the same picture
    for subset in (subset for dataset in several for subset in dataset.subsets):
        asked.update({picture.id: subset.num_repeats for picture in subset.pictures})
    assert seen == asked


@given(st.lists(datasets, min_size=1, max_size=2), st.integers(0, 2**32), st.integers(0, 10**6))
def test_a_batch_is_a_function_of_datasets_seed_and_step(several: list[Dataset], seed: int, step: int):
    batches = Batches(several, seed, 8)
    first = batches.batch(step)
    for other in (0, step + 1, step + 5 * len(batches), max(0, step - 1)):  # whatever was asked for in between
        batches.batch(other)
    assert batches.batch(step) == first == Batches(several, seed, 8).batch(step)


@given(datasets, st.integers(0, 2**32))
def test_a_batch_has_one_size_and_every_crop_lies_inside(dataset: Dataset, seed: int):
    for batch in epoch(Batches([dataset], seed, 8)):
        assert 1 <= len(batch.items) <= dataset.batch_size
        for item in batch.items:
            left, top, right, bottom = item.view.crop
            assert (right - left, bottom - top) == batch.size
            assert min(left, top) >= 0 and right <= item.view.resize[0] and bottom <= item.view.resize[1]


def test_only_the_last_batch_of_a_bucket_is_smaller():
    sizes = [len(batch.items) for batch in epoch(Batches([one(Subset(pictures(10)), batch_size=4)], 0, 8))]
    assert sorted(sizes) == [2, 4, 4]


def test_epochs_and_seeds_differ_in_their_order():
    dataset = one(Subset(pictures(20)))
    orders = {
        tuple(batch.items[0].picture.id for batch in epoch(Batches([dataset], seed, 8), number))
        for seed in range(3)
        for number in range(3)
    }
    assert len(orders) == 9


def test_epochs_count_from_one():
    batches = Batches([one(Subset(pictures(3), caption_dropout_every_n_epochs=2))], 0, 8)
    assert [batches.epoch(step) for step in (0, 2, 3, 6)] == [1, 1, 2, 3]
    assert [batches.batch(step).items[0].caption == "" for step in (0, 2, 3, 5, 6)] == [False, False, True, True, False]


def test_batches_of_all_datasets_come_mixed():
    small, large = one(Subset(pictures(20))), Dataset((Subset(pictures(20)),), (128, 128))
    sizes = [batch.size for batch in epoch(Batches([small, large], 0, 8))]
    assert Counter(sizes) == {(64, 64): 20, (128, 128): 20}
    assert (128, 128) in sizes[:10] and (64, 64) in sizes[:10]


def regular(trained: int, number: int, repeats: int = 1, reg_repeats: int = 1) -> Counter[str]:
    """How often each regularisation picture comes."""
    dataset = Dataset(
        (
            Subset(pictures(trained), num_repeats=repeats),
            Subset(pictures(number, prefix="reg"), num_repeats=reg_repeats, is_reg=True),
        ),
        (64, 64),
    )
    items = [item for batch in epoch(Batches([dataset], 0, 8)) for item in batch.items]
    assert all(item.is_reg == item.picture.id.startswith("reg") for item in items)
    return Counter(item.picture.id for item in items if item.is_reg)


def test_regularisation_pictures_are_repeated_until_they_are_as_many():
    assert regular(10, 4) == {"reg0": 3, "reg1": 3, "reg2": 2, "reg3": 2}
    assert regular(5, 2, repeats=3) == {"reg0": 8, "reg1": 7}


def test_regularisation_pictures_beyond_the_number_do_not_come():
    assert regular(3, 10) == {"reg0": 1, "reg1": 1, "reg2": 1}


def test_regularisation_pictures_with_repeats_come_as_kohya_counts_them():
    assert regular(10, 3, reg_repeats=4) == {"reg0": 4, "reg1": 4, "reg2": 4}  # until there are at least ten
    assert regular(10, 3, reg_repeats=2) == {"reg0": 4, "reg1": 3, "reg2": 3}


def test_a_dataset_of_regularisation_pictures_alone_teaches_nothing():
    with pytest.raises(PictureError, match="no picture to learn from"):
        Batches([one(Subset(pictures(3), is_reg=True))], 0, 8)


def test_repeats_of_a_picture_vary_on_their_own():
    subset = Subset(
        (picture("x", 128, 64, "a, b, c, d, e"),), 50, shuffle_caption=True, flip_aug=True, random_crop=True
    )
    items = [batch.items[0] for batch in epoch(Batches([one(subset)], 0, 8))]
    assert len({item.caption for item in items}) > 30
    assert {item.view.flip for item in items} == {True, False}
    assert len({item.view.crop for item in items}) > 20


def test_views_are_few_where_latents_can_be_kept():
    plain = Subset(pictures(5), flip_aug=True)
    batches = Batches([one(plain)], 0, 8)
    views = {
        (item.picture.id, item.view) for number in range(20) for batch in epoch(batches, number) for item in batch.items
    }
    assert batches.cacheable and len(views) == 10
    assert not Batches([one(replace(plain, random_crop=True))], 0, 8).cacheable
    assert not Batches([one(replace(plain, color_aug=True))], 0, 8).cacheable


def test_sizes_that_the_model_cannot_have_are_refused_before_anything_is_learnt():
    with pytest.raises(BucketError, match="multiples of 48"):
        Batches([one(Subset(pictures(1)))], 0, 48)


# --- pixels -----------------------------------------------------------------------------------------------------------


def item_of(made: Picture, resolution=(64, 64), **options):
    """The only picture of a dataset, as it is learnt first."""
    return Batches([Dataset((Subset((made,), **options),), resolution)], 0, 8).batch(0).items[0]


def test_pixels_are_those_of_the_picture_where_nothing_is_asked():
    got = pixels(item_of(picture("x", 64, 64)))
    assert got.dtype == torch.float32 and got.shape == (3, 64, 64) and got.min() >= -1 and got.max() <= 1
    assert np.array_equal(((got + 1) * 127.5).round().numpy().transpose(1, 2, 0), gradient(64, 64))


def test_a_picture_is_resized_to_cover_and_cropped_in_the_middle():
    item = item_of(picture("x", 256, 128))
    assert item.view.resize == (128, 64) and item.view.crop == (32, 0, 96, 64)
    red, green, _ = pixels(item)
    assert red[32, 0] == pytest.approx(-0.5, abs=0.02) and red[32, -1] == pytest.approx(0.5, abs=0.02)
    assert green[0, 32] == pytest.approx(-1, abs=0.02) and green[-1, 32] == pytest.approx(1, abs=0.02)


def test_a_random_crop_without_buckets_is_a_part_at_the_pictures_own_scale():
    item = item_of(picture("x", 256, 128), random_crop=True)
    left, top, *_ = item.view.crop
    assert item.view.resize == (256, 128)
    assert np.array_equal(
        ((pixels(item) + 1) * 127.5).round().numpy().transpose(1, 2, 0),
        gradient(256, 128)[top : top + 64, left : left + 64],
    )


def test_a_flipped_picture_is_its_mirror_image():
    item = item_of(picture("x"))
    flipped = replace(item, view=replace(item.view, flip=True))
    assert torch.equal(pixels(flipped), pixels(item).flip(-1))


def test_colours_vary_a_little_and_the_same_way_each_time():
    subset = Subset((picture("x"),), 100, color_aug=True)
    items = [batch.items[0] for batch in epoch(Batches([one(subset)], 0, 8))]
    changed = [item for item in items if item.view.hue or item.view.gamma != 1]
    assert 15 < len(changed) < 55 and {bool(item.view.hue) for item in changed} == {True, False}
    plain = pixels(item_of(picture("x")))
    for item in changed[:10]:
        assert torch.equal(pixels(item), pixels(item))
        assert (pixels(item) - plain).abs().mean() < 0.25
    assert sum(not torch.equal(pixels(item), plain) for item in changed) > len(changed) / 2


def test_hue_turns_and_gamma_darkens():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    item = item_of(Picture("red", "", 8, 8, lambda: encoded(red)), (8, 8))
    turned = pixels(replace(item, view=View((8, 8), (0, 0, 8, 8), hue=120.0)))[:, 0, 0]
    assert turned.tolist() == pytest.approx([-1, 1, -1], abs=0.05)  # green
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    darker = pixels(
        replace(item, picture=replace(item.picture, read=lambda: encoded(grey)), view=replace(item.view, gamma=2.0))
    )
    assert darker.max() < -0.45


def test_a_picture_that_a_camera_turned_stands_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    data = encoded(Image.fromarray(gradient(96, 64)), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    got = pixels(item_of(Picture("x", "", 64, 96, lambda: data), (64, 96)))
    assert np.array_equal(((got + 1) * 127.5).round().numpy().transpose(1, 2, 0), np.array(upright))


def test_the_alpha_channel_weighs_and_moves_with_the_picture():
    alpha = Image.new("L", (64, 64), 0)
    alpha.paste(255, (0, 0, 32, 64))
    image = Image.fromarray(gradient(64, 64))
    image.putalpha(alpha)
    item = item_of(Picture("x", "", 64, 64, lambda: encoded(image)), alpha_mask=True)
    weights = mask(item)
    assert weights is not None and weights.shape == (1, 64, 64) and weights.dtype == torch.float32
    assert weights[0, :, :32].eq(1).all() and weights[0, :, 32:].eq(0).all()
    flipped = mask(replace(item, view=replace(item.view, flip=True)))
    assert flipped is not None and torch.equal(flipped, weights.flip(-1))
    assert torch.equal(pixels(item), pixels(item_of(picture("y"))))  # what is under it stays


def test_without_an_alpha_channel_everything_counts_and_without_alpha_mask_nothing_is_asked():
    weights = mask(item_of(picture("x"), alpha_mask=True))
    assert weights is not None and weights.eq(1).all()
    assert mask(item_of(picture("x"))) is None


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pictures_of_every_mode_are_read(mode: str):
    grey = Image.fromarray(gradient(64, 64)).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    else:
        image = grey.quantize(256) if mode == "P" else grey.convert("RGB").convert(mode)
    assert image.mode == mode
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    got = pixels(item_of(Picture("x", "", 64, 64, lambda: data)))
    expected = torch.from_numpy(np.array(grey.convert("1" if mode == "1" else "L").convert("L"))) / 127.5 - 1
    assert (got[0] - expected).abs().max() < 0.1


def test_a_picture_that_changed_or_broke_is_named():
    with pytest.raises(PictureError, match=r"picture x has 64×64 pixels, not 64×32"):
        pixels(replace(item_of(picture("x")), picture=replace(picture("x"), height=32)))
    for data in (b"no image", picture("x").read()[:90], b""):
        broken = Picture("x", "", 64, 64, lambda data=data: data)
        with pytest.raises(PictureError, match="picture x cannot be read"):
            pixels(item_of(broken))


def test_a_file_that_is_gone_is_named():
    def gone() -> bytes:
        raise FileNotFoundError("x.png")

    with pytest.raises(PictureError, match=r"picture x cannot be read: x\.png"):
        pixels(item_of(Picture("x", "", 64, 64, gone)))
