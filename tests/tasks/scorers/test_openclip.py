"""The OpenCLIP scorer uses the model's own weights, tokenizer and preprocessing, or refuses; its scores mean what they say."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.scorers import ScorerError, open_scorer
from tasks.scorers.openclip import DEFAULT_BPE, OpenClipScorer, _package, fingerprint, locate, token_limit
from tasks.scorers.preprocessing import Preprocessing
from tasks.scorers.tokens import default_counter

ROOT = Path(__file__).parents[3]
FILTER = ROOT / "data/models/tiny-clip-filter"
SIZE = 64  # pixels the filter looks at
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
PROMPTS = ["a large red circle on a white background", "a small blue star on a black background", "a green ring"]


@pytest.fixture(scope="module")
def scorer() -> OpenClipScorer:
    return OpenClipScorer(str(FILTER), batch_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the filter's folder, to be changed."""
    return Path(shutil.copytree(FILTER, tmp_path / "clip"))


def edit(folder: Path, **changes: object) -> None:
    """Change entries of the configuration, by a path with __ for each level; None takes one out."""
    config = json.loads((folder / CONFIG).read_text())
    for path, value in changes.items():
        *levels, name = path.split("__")
        entry = config
        for level in levels:
            entry = entry[level]
        entry[name] = value
        if value is None:
            del entry[name]
    (folder / CONFIG).write_text(json.dumps(config))


def untrained(folder: Path, seed: int) -> torch.nn.Module:
    """A model of the folder's architecture with random weights."""
    import open_clip

    torch.manual_seed(seed)
    architecture = json.loads((folder / CONFIG).read_text())["model_cfg"]
    kind = open_clip.CustomTextCLIP if architecture.pop("custom_text", False) else open_clip.CLIP
    return kind(**architecture).eval()


def save_random(folder: Path, seed: int) -> None:
    """Replace the folder's weights by random ones."""
    from safetensors.torch import save_file

    weights = untrained(folder, seed).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)


def noise(n: int, height: int = SIZE, width: int = SIZE, seed: int = 0) -> np.ndarray:
    """Smooth random images, uint8 [n, height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC)) for image in coarse])


def disc(color: tuple[int, int, int], background: tuple[int, int, int], radius: float = 21) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
    return np.where((x * x + y * y < radius**2)[..., None], color, background).astype(np.uint8)


# --- what files tell ---------------------------------------------------------------------------------------------------


def test_reading_files_imports_nothing_heavy() -> None:
    code = f"""
import sys, time
from tasks.scorers.openclip import fingerprint, token_limit
fingerprint({str(FILTER)!r}); token_limit({str(FILTER)!r}).count(["a red circle"])
print([name for name in ("torch", "open_clip", "transformers") if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_fingerprint_is_of_the_content(folder: Path) -> None:
    original = fingerprint(str(FILTER))
    assert len(original) == 32
    assert fingerprint(str(folder)) == original
    found = {original}
    for change in (
        lambda: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0"),
        lambda: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " "),
        lambda: edit(folder, preprocess_cfg__mean=[0.4, 0.5, 0.5]),
        lambda: edit(folder, model_cfg__quick_gelu=False),
    ):
        change()
        found.add(fingerprint(str(folder)))
    assert len(found) == 5


def test_loaded_scorer_has_the_fingerprint_of_its_files(scorer: OpenClipScorer) -> None:
    assert scorer.fingerprint == fingerprint(str(FILTER))
    assert scorer.context_length == token_limit(str(FILTER)).limit == 24


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ScorerError, match=r"no weights.*random"):
        OpenClipScorer(str(folder))


def test_a_tag_open_clip_does_not_know_is_refused() -> None:
    with pytest.raises(ScorerError, match=r"no weights 'none' of ViT-B-32.*laion2b_s34b_b79k"):
        OpenClipScorer("ViT-B-32/none")
    with pytest.raises(ScorerError, match="no weights '' of ViT-B-32"):
        OpenClipScorer("ViT-B-32")


def test_a_name_that_is_nothing_is_refused() -> None:
    with pytest.raises(ScorerError, match="neither a folder here nor"):
        locate("data/models/tiny-clip-fliter")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ScorerError, match=r"has no open_clip_config.json"):
        locate(str(tmp_path))
    (folder / CONFIG).write_text("{}")
    with pytest.raises(ScorerError, match="not open_clip's"):
        locate(str(folder))


def test_weights_of_another_architecture_are_refused(folder: Path) -> None:
    edit(folder, model_cfg__embed_dim=32)
    with pytest.raises(ScorerError, match=r"do the weights open_clip_model.safetensors belong"):
        OpenClipScorer(str(folder))


def test_the_default_tokenizer_never_stands_in_for_the_models_own(folder: Path) -> None:
    for file in folder.glob("*okenizer*"):
        file.unlink()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    with pytest.raises(ScorerError, match=r"names the tokenizer './'.*no tokenizer files"):
        OpenClipScorer(str(folder))
    edit(folder, model_cfg__text_cfg__hf_tokenizer_name=None)
    with pytest.raises(ScorerError, match=r"reads \d+ different tokens.*default one of 49408"):
        OpenClipScorer(str(folder))


# --- tokens ------------------------------------------------------------------------------------------------------------

# Without code points that Python 3.11 does not know yet: newer Unicode makes letters of some, older libraries do not.
KNOWN = st.characters(exclude_categories=["Cs", "Cn"])
TEXT = st.lists(
    st.one_of(
        st.text(KNOWN, max_size=12),
        st.sampled_from(["photo", "it's", "naïve", "日本語", "&amp;amp;", "<start_of_text>", "ﬁ", "İ", "x_y", "4 1/2"]),
    ),
    max_size=8,
).map(" ".join)


@given(TEXT)
@settings(max_examples=300)
def test_tokens_are_those_open_clip_counts(text: str) -> None:
    from open_clip.tokenizer import _tokenizer

    assert default_counter(_package() / DEFAULT_BPE, "lower")([text]) == [len(_tokenizer.encode(text)) + 2]


@given(TEXT)
@settings(max_examples=100)
def test_tokens_are_those_of_the_models_own_tokenizer(scorer: OpenClipScorer, text: str) -> None:
    own = scorer._tokenize
    assert scorer.count_tokens([text]) == [len(own.tokenizer(own.clean_fn(text)).input_ids)]


def test_a_tokenizer_without_tokenizer_json_counts_alike(folder: Path) -> None:
    count = token_limit(str(FILTER)).count(PROMPTS)
    (folder / "tokenizer.json").unlink()
    assert token_limit(str(folder)).count(PROMPTS) == count


def test_what_stands_behind_the_context_is_not_judged(scorer: OpenClipScorer) -> None:
    beginning = "a large red circle " * 8
    assert min(scorer.count_tokens([beginning + "on white", beginning + "on black"])) > scorer.context_length
    scores = scorer.score(noise(1).repeat(2, axis=0), [beginning + "on white", beginning + "on black"])
    assert scores.cosine[0] == scores.cosine[1]


# --- scores ------------------------------------------------------------------------------------------------------------


def test_the_right_prompt_beats_the_wrong_one(scorer: OpenClipScorer) -> None:
    colors = {"red": (220, 30, 35), "green": (35, 158, 56), "blue": (36, 72, 220), "yellow": (247, 222, 36)}
    pixels = np.stack([disc(color, (245, 245, 245)) for color in colors.values()])
    texts = [f"a large {name} circle on a white background" for name in colors]
    right = scorer.score(pixels, texts).cosine
    for shift in (1, 2, 3):
        wrong = scorer.score(pixels, texts[shift:] + texts[:shift]).cosine
        assert (right > wrong + 0.05).all()


def test_scores_are_raw_cosines_in_float32(scorer: OpenClipScorer) -> None:
    scores = scorer.score(noise(10), (PROMPTS * 4)[:10])
    assert scores.cosine.dtype == scores.embedding.dtype == np.float32
    assert scores.embedding.shape == (10, 96)
    assert np.linalg.norm(scores.embedding, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.abs(scores.cosine).max() <= 1
    image = torch.from_numpy(noise(10)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        images = scorer._clip.encode_image(image, normalize=True)
        texts = scorer._clip.encode_text(scorer._tokenize((PROMPTS * 4)[:10]), normalize=True)
    assert scores.cosine == pytest.approx((images * texts).sum(1).numpy(), abs=1e-5)


def test_texts_and_images_are_embedded_in_one_space(scorer: OpenClipScorer) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    texts = ["a red circle", "a blue star"]
    scores, embedded = scorer.score(pixels, texts), scorer.encode_texts(texts)
    assert embedded.dtype == np.float32
    assert np.linalg.norm(embedded, axis=1) == pytest.approx(1, abs=1e-5)
    assert (embedded * scores.embedding).sum(axis=1) == pytest.approx(scores.cosine, abs=1e-6)


def test_neighbours_do_not_matter(scorer: OpenClipScorer) -> None:
    pixels, prompts = noise(20), (PROMPTS * 7)[:20]
    together = scorer.score(pixels, prompts)
    order = np.random.default_rng(1).permutation(20)
    shuffled = scorer.score(pixels[order], [prompts[i] for i in order])
    alone = [OpenClipScorer.score(scorer, pixels[i : i + 1], prompts[i : i + 1]) for i in range(20)]
    assert together.cosine[order] == pytest.approx(shuffled.cosine, abs=1e-6)
    assert together.cosine == pytest.approx(np.concatenate([score.cosine for score in alone]), abs=1e-6)
    assert together.embedding == pytest.approx(np.concatenate([score.embedding for score in alone]), abs=1e-6)


def test_a_text_is_encoded_once(scorer: OpenClipScorer) -> None:
    calls = []
    hook = scorer._clip.transformer.register_forward_hook(lambda *_: calls.append(1))
    texts = ["a text not met before", "another one"]
    scorer.score(noise(6), texts * 3)
    scorer.score(noise(4), texts * 2)
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 48), (128, 128), (100, 60), (77, 201)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_gives_the_scores_of_open_clips_own_transform(
    scorer: OpenClipScorer, mode: str, height: int, width: int, interpolation: str
) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = {
        "size": SIZE,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": interpolation,
        "resize_mode": mode,
        "fill_color": 128,
    }
    pixels = noise(8, height, width)
    one_by_one = image_transform_v2(PreprocessCfg(**config), is_train=False)
    expected = torch.stack([one_by_one(Image.fromarray(image)) for image in pixels])
    found = Preprocessing(**config)(torch.from_numpy(pixels))
    assert (found - expected).abs().mean() * 127.5 < 0.35  # PIL rounds to whole pixel values, twice
    with torch.no_grad():
        images = [scorer._clip.encode_image(batch, normalize=True) for batch in (found, expected)]
        texts = scorer._clip.encode_text(scorer._tokenize(PROMPTS), normalize=True)
    assert ((images[0] - images[1]) @ texts.T).abs().mean() < 1e-3


def test_resizing_to_what_is_not_square() -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(size=(48, 64))
    pixels = noise(1, 90, 75)
    expected = image_transform_v2(config, is_train=False)(Image.fromarray(pixels[0]))
    found = Preprocessing(**asdict(config))(torch.from_numpy(pixels))[0]
    assert found.shape == (3, 48, 64)
    assert (found - expected).abs().mean() < 0.01


def test_a_siglip_like_model_goes_through_the_same_code(folder: Path) -> None:
    edit(
        folder,
        model_cfg__custom_text=True,
        model_cfg__init_logit_bias=-10,
        model_cfg__text_cfg__no_causal_mask=True,
        model_cfg__text_cfg__pool_type="last",
        model_cfg__text_cfg__proj_bias=True,
        model_cfg__text_cfg__tokenizer_kwargs={"clean": "canonicalize"},
        preprocess_cfg__resize_mode="squash",
    )
    save_random(folder, seed=0)
    scorer = OpenClipScorer(str(folder), batch_size=4)
    assert scorer._clip.logit_bias is not None
    scores = scorer.score(noise(6, 40, 90), PROMPTS * 2)
    assert np.isfinite(scores.cosine).all()
    assert scorer.count_tokens(["A red, red circle!"]) == scorer.count_tokens(["a red red circle"])
    same = scorer.score(noise(1).repeat(2, axis=0), ["A red, red circle!", "a red red circle"]).cosine
    assert same[0] == same[1]


# --- models of the hub, from its local cache ---------------------------------------------------------------------------


def in_hub_cache(cache: Path, repository: str, folder: Path) -> None:
    repo = cache / f"models--{repository.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))


def offline(cache: Path, code: str) -> str:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def test_a_model_of_the_hub_is_the_folder_it_was_downloaded_to(tmp_path: Path) -> None:
    in_hub_cache(tmp_path, "someone/tiny-clip", FILTER)
    code = """
import sys
from tasks.scorers.openclip import OpenClipScorer, ScorerError, fingerprint
print(fingerprint("hf-hub:someone/tiny-clip"), "torch" in sys.modules)
print(OpenClipScorer("hf-hub:someone/tiny-clip", 4).fingerprint)
try:
    fingerprint("hf-hub:someone/else")
except ScorerError as error:
    print(error)
"""
    first, second, third = offline(tmp_path, code).splitlines()
    assert first == f"{fingerprint(str(FILTER))} False"
    assert second == fingerprint(str(FILTER))
    assert "'someone/else' cannot be read from the hub" in third


def test_a_tag_brings_the_activation_its_weights_were_trained_with(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / WEIGHTS).write_bytes(b"weights")
    in_hub_cache(tmp_path / "cache", "timm/vit_base_patch32_clip_224.openai", tmp_path / "weights")
    code = """
from tasks.scorers.openclip import locate
located = locate("ViT-B-32/openai")
print(located.name, located.tag, located.architecture["quick_gelu"], located.tokenizer, located.weights.read_text())
"""
    assert offline(tmp_path / "cache", code) == "ViT-B-32 openai True None weights"


def test_a_scorer_is_opened_once() -> None:
    assert open_scorer(str(FILTER), 8) is open_scorer(str(FILTER), 8)
