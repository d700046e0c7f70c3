"""Kohya's buckets: the published sizes, and what holds for all."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tasks.trainers.buckets import BucketError, Buckets, bucket_sizes
from tasks.trainers.pictures import Dataset

# printed by `make_bucket_resolutions` of sd-scripts 48d368f with its defaults (256 … 1024 in steps of 64): the wider half
AT_512 = [(512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)]
AT_768 = [(768, 768), (832, 704), (896, 640), (960, 576)] + [(1024, height) for height in range(256, 577, 64)]
# the sizes SDXL was trained in (Podell et al. 2023, appendix I), width × height; the paper has 0.5 … 2.0 in aspect and beyond
SDXL = [
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024),
]  # fmt: skip

sides = st.integers(64, 4096)
datasets = st.builds(
    lambda width, height, steps, no_upscale: Dataset(
        (), (width, height), 1, True, 256, 2048, steps, bucket_no_upscale=no_upscale
    ),
    st.integers(256, 1024),
    st.integers(256, 1024),
    st.sampled_from([8, 16, 32, 64]),
    st.booleans(),
)


def whole(half: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted({*half, *((height, width) for width, height in half)})


def bucketed(resolution=(512, 512), **options) -> Buckets:
    return Buckets(Dataset((), resolution, enable_bucket=True, **options), multiple=8)


def test_the_sizes_at_512_and_768_are_kohyas():
    assert bucket_sizes((512, 512), 256, 1024, 64) == whole(AT_512)
    assert bucket_sizes((768, 768), 256, 1024, 64) == whole(AT_768)


def test_the_sizes_at_1024_are_among_sdxls():
    found = bucket_sizes((1024, 1024), 512, 2048, 64)
    assert set(found) <= set(whole(SDXL)) and (832, 1216) in found and (512, 2048) in found
    largest = [max(height for w, height in SDXL if w == width) for width in range(512, 1025, 64)]
    assert [max(h for w, h in found if w == width) for width in range(512, 1025, 64)] == largest


@given(datasets, sides, sides)
def test_a_picture_fits_its_bucket_and_the_bucket_its_limits(dataset: Dataset, width: int, height: int):
    area, longest = dataset.resolution[0] * dataset.resolution[1], max(width, height) / min(width, height)
    # so long a picture comes out thinner than a step where it is shrunk, which is refused
    assume(not (dataset.bucket_no_upscale and area / longest < (dataset.bucket_reso_steps + 1) ** 2))
    bucket, resized = Buckets(dataset, multiple=8).place((width, height))
    assert bucket[0] <= resized[0] and bucket[1] <= resized[1]  # the crop lies inside
    # Kohya rounds a side by half a pixel before it cuts it to steps
    assert (bucket[0] - 1) * (bucket[1] - 1) <= dataset.resolution[0] * dataset.resolution[1]
    assert all(side % dataset.bucket_reso_steps == 0 for side in bucket)
    if dataset.bucket_no_upscale:
        assert resized[0] <= width and resized[1] <= height
        assert all(over < dataset.bucket_reso_steps for over in (resized[0] - bucket[0], resized[1] - bucket[1]))
    else:
        assert all(256 <= side <= 2048 or bucket[0] == bucket[1] for side in bucket)
        assert bucket[0] == resized[0] or bucket[1] == resized[1]  # resized no more than it must be


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((1024, 1024), (512, 512), (512, 512)),
        ((1920, 1080), (640, 384), (683, 384)),  # nearest to 1.78: 640×384 has 1.67, 704×320 has 2.2
        ((1080, 1920), (384, 640), (384, 683)),
        ((100, 100), (512, 512), (512, 512)),
        ((576, 448), (576, 448), (576, 448)),
        ((3000, 300), (1024, 256), (2560, 256)),
    ],
)
def test_pictures_go_where_kohya_puts_them(size, bucket, resized):
    assert bucketed().place(size) == (bucket, resized)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((300, 200), (256, 192), (300, 200)),  # smaller than the resolution: as it is, cut to whole steps
        ((512, 512), (512, 512), (512, 512)),
        ((1920, 1080), (640, 384), (683, 384)),
        ((1000, 1000), (512, 512), (512, 512)),
    ],
)
def test_without_upscaling_sizes_follow_from_the_pictures(size, bucket, resized):
    assert bucketed(bucket_no_upscale=True).place(size) == (bucket, resized)


def test_without_buckets_everything_is_cut_to_the_resolution():
    buckets = Buckets(Dataset((), (64, 96)), multiple=8)
    assert buckets.place((128, 128)) == ((64, 96), (96, 96))
    assert buckets.place((32, 96)) == ((64, 96), (64, 192))


def test_limits_are_widened_to_whole_steps():
    found = bucketed(min_bucket_reso=300, max_bucket_reso=1000)._sizes
    assert found == bucket_sizes((512, 512), 256, 1024, 64)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bucket_reso_steps": 12}, r"bucket_reso_steps is 12, but the model's sizes are multiples of 8: take 16"),
        ({"min_bucket_reso": 600}, r"resolution is 512×512, below min_bucket_reso = 576"),
        ({"max_bucket_reso": 400}, r"resolution is 512×512, above max_bucket_reso = 448"),
        ({"min_bucket_reso": 32}, r"min_bucket_reso is 32, less than a step of 64"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_told(options, told):
    with pytest.raises(BucketError, match=told):
        bucketed(**options)


def test_a_resolution_that_the_model_cannot_have_is_told():
    with pytest.raises(BucketError, match=r"resolution is 500×64.*multiples of 8: take 496×64, or set enable_bucket"):
        Buckets(Dataset((), (500, 64)), multiple=8)


def test_a_picture_too_small_for_a_step_is_told():
    with pytest.raises(BucketError, match=r"a picture of 40×600 pixels .* bucket_reso_steps = 64 on one side"):
        bucketed(bucket_no_upscale=True).place((40, 600))
