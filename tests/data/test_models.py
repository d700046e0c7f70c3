"""The embedded models: they load without a network, share one tokenizer, stay small and do what the card says."""

import random
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from common import DEFAULT_STEPS, DIFFUSION, FILTER, HERE, JUDGE, to_float
from diffusers import AutoPipelineForText2Image, StableDiffusionPipeline
from PIL import Image
from sampling import load_pipeline, sample
from tiny_clip import Scorer, hard_negative_auc
from tokenizer import words
from transformers import CLIPTokenizer
from world import all_scenes, caption, check, render

MAX_BYTES = 25 * 10**6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two threads, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline()


def test_everything_together_stays_small():
    files = [p for p in HERE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= MAX_BYTES


def test_pipeline_needs_no_arguments(pipeline):
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 64
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert part.dtype == torch.float32
    image = pipeline("a large red circle on a blue background", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_auto_pipeline_finds_the_class():
    assert type(AutoPipelineForText2Image.from_pretrained(DIFFUSION)) is StableDiffusionPipeline


def test_samples_are_mostly_well_formed_and_partly_right(pipeline):
    prompts = [caption(s) for s in random.Random(31).sample(all_scenes(), 32)]
    found = check(sample(pipeline, prompts, range(32), DEFAULT_STEPS), prompts)
    assert 0.3 <= sum(f.match for f in found) / 32 <= 0.75
    assert sum(f.malformed for f in found) / 32 <= 0.2


def test_a_seed_makes_the_same_picture_again(pipeline):
    first, again = (sample(pipeline, ["a small white star"], [7], steps=3) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("folder", [FILTER, JUDGE], ids=lambda folder: folder.name)
def test_clip_uses_the_shared_tokenizer(folder: Path):
    shared = CLIPTokenizer.from_pretrained(DIFFUSION / "tokenizer")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert len(tokenizer.tokenizer) == len(shared) == shared.eos_token_id + 1
    texts = ["a large red circle on a blue background", "a zebra, naïve & 漢", ""]
    expected = shared(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenizer(texts), expected)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert (folder / name).read_bytes() == (DIFFUSION / "tokenizer" / name).read_bytes()


def test_every_word_of_the_world_is_one_token():
    tokenizer = CLIPTokenizer.from_pretrained(DIFFUSION / "tokenizer")
    assert [word for word in words() if len(tokenizer.tokenize(word)) != 1] == []


@pytest.mark.parametrize(("folder", "floor"), [(FILTER, 0.98), (JUDGE, 0.98)], ids=["filter", "judge"])
def test_clip_tells_hard_negatives_apart(folder: Path, floor: float):
    scenes = random.Random(32).sample(all_scenes(), 300)
    images = render(scenes, torch.Generator().manual_seed(32))
    found = hard_negative_auc(Scorer(folder), images, scenes)
    assert min(found.values()) >= floor, found


def test_clip_preprocessing_is_the_one_used_in_training():
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{FILTER}")
    images = render(all_scenes()[:2], torch.Generator().manual_seed(33))
    ready = torch.stack([preprocess(Image.fromarray(image.numpy())) for image in images])
    torch.testing.assert_close(ready, to_float(images), atol=1e-5, rtol=0, check_stride=False)
