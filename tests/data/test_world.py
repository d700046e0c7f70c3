"""The procedural world: captions can be read back, and the checker is right where the truth is known."""

import random

import pytest
import torch
from evaluate import decoys
from hypothesis import given
from hypothesis import strategies as st
from world import (
    ATTRIBUTES,
    FILTER_TEMPLATES,
    JUDGE_TEMPLATES,
    PROMPT,
    Scene,
    all_scenes,
    caption,
    change,
    check,
    parse,
    random_caption,
    render,
)

SCENES = all_scenes()


@pytest.fixture(scope="module")
def rendered() -> tuple[list[Scene], torch.Tensor]:
    scenes = random.Random(21).sample(SCENES, 300)
    return scenes, render(scenes, torch.Generator().manual_seed(21))


def test_there_are_672_different_scenes():
    assert len(SCENES) == len(set(SCENES)) == 672
    assert all(scene.color != scene.background for scene in SCENES)


@given(
    st.sampled_from(SCENES),
    st.sampled_from(FILTER_TEMPLATES + JUDGE_TEMPLATES),
    st.sets(st.sampled_from(ATTRIBUTES)),
)
def test_parse_reads_back_what_a_caption_says(scene, template, drop):
    named = {name: getattr(scene, name) for name in ATTRIBUTES if name not in drop}
    assert parse(caption(scene, template, drop)) == named


@given(st.sampled_from(SCENES), st.integers(0, 10_000))
def test_random_captions_never_say_anything_false(scene, seed):
    said = parse(random_caption(scene, FILTER_TEMPLATES + JUDGE_TEMPLATES, random.Random(seed)))
    assert said.items() <= vars(scene).items()


@given(st.sampled_from(SCENES), st.sampled_from((*ATTRIBUTES, "swap")), st.integers(0, 10_000))
def test_a_change_makes_another_valid_scene(scene, kind, seed):
    other = change(scene, kind, random.Random(seed))
    assert other in SCENES
    assert sum(getattr(scene, n) != getattr(other, n) for n in ATTRIBUTES) == (2 if kind == "swap" else 1)


def test_captions_are_plain_english():
    scene = Scene("large", "orange", "circle", "blue")
    assert caption(scene) == "a large orange circle on a blue background"
    assert caption(scene, PROMPT, {"size", "background"}) == "an orange circle"
    assert caption(scene, PROMPT, {"shape"}) == "a large orange shape on a blue background"
    with pytest.raises(ValueError, match="colour"):
        caption(scene, PROMPT, {"colour"})


def test_parse_takes_free_wording():
    assert parse("A big RED disc, on the blue backdrop!") == {
        "size": "large",
        "color": "red",
        "shape": "circle",
        "background": "blue",
    }
    assert parse("a photo of a cat") == {}


def test_pictures_depend_on_the_generator_only():
    first, again = (render(SCENES[:8], torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.dtype == torch.uint8
    assert first.shape == (8, 64, 64, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, render(SCENES[:8], torch.Generator().manual_seed(4)))


def test_clean_renders_match_their_prompts(rendered):
    scenes, images = rendered
    found = check(images, [caption(s) for s in scenes])
    assert all(f.match and not f.malformed for f in found)
    assert [Scene(f.size, f.color, f.shape, f.background) for f in found] == scenes


@pytest.mark.parametrize("kind", [*ATTRIBUTES, "swap"])
def test_wrong_prompts_do_not_match(rendered, kind):
    scenes, images = rendered
    rng = random.Random(22)
    assert not any(f.match for f in check(images, [caption(change(s, kind, rng)) for s in scenes]))


def test_only_named_attributes_count(rendered):
    scenes, images = rendered
    prompts = [caption(change(s, "color", random.Random(23)), PROMPT, {"color"}) for s in scenes]
    assert all(f.match for f in check(images, prompts))


def test_near_misses_are_malformed():
    for name, images in decoys(21.0, 4, random.Random(24)).items():
        assert all(f.malformed for f in check(images, ["a shape"] * len(images))), name


def test_empty_pictures_are_malformed():
    flat = torch.stack([torch.full((64, 64, 3), value, dtype=torch.uint8) for value in (0, 128, 255)])
    noise = torch.randint(0, 256, (1, 64, 64, 3), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    assert all(f.malformed and not f.match for f in check(torch.cat([flat, noise]), ["a shape"] * 4))


def test_check_says_what_it_got():
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        check(images, ["a circle"])
    with pytest.raises(ValueError, match="uint8"):
        check(images.float(), ["a circle"] * 2)
