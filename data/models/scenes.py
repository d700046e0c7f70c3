"""Scenes of the procedural world, their pictures and their captions.

A scene is one coloured shape on a background of another colour. There are 2 sizes x 8 colours x 6 shapes x 7 other
background colours = 672 scenes. `render` draws them, `caption` describes them, `parse` reads a description back.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from shapes import SHAPES, coverage
from torch import Tensor

IMAGE_SIZE = 64
"""Edge of a picture, in pixels."""

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.14, 0.28, 0.86),
    "yellow": (0.97, 0.87, 0.14),
    "orange": (0.97, 0.52, 0.08),
    "purple": (0.56, 0.18, 0.68),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.06),
}
"""Colour name to RGB in 0..1; objects and backgrounds use the same eight."""

SIZES: dict[str, tuple[float, float]] = {"small": (10.0, 12.5), "large": (19.0, 23.0)}
"""Size name to the range of the shape's outer radius, in pixels."""

ATTRIBUTES = ("size", "color", "shape", "background")

MAX_SHIFT = 2.0
"""Pixels the centre moves at most, per axis, at jitter 1."""
MAX_ANGLE = 0.06
"""Radians the shape turns at most at jitter 1."""
COLOR_NOISE = 0.02
"""Standard deviation of each colour channel from picture to picture (range 0..1)."""
GRADIENT = 0.03
"""Largest brightening or darkening of the background at the picture's rim (range 0..1)."""

PROMPT = "a {size} {color} {shape}[ on a {background} background]"
"""The wording that prompts use. A part in brackets goes when an attribute in it is dropped."""

FILTER_TEMPLATES = (
    PROMPT,
    "{size} {color} {shape}[ on {background}]",
    "a picture of a {size} {color} {shape}[ against a {background} background]",
    "an image of a {size} {color} {shape}[, {background} background]",
    "there is a {size} {color} {shape}[ on a {background} backdrop]",
    "[{background} background, ]{size} {color} {shape}",
    "one {size} {color} {shape}[ in front of a {background} background]",
    "[on a {background} background, ]a {size} {color} {shape}",
)
"""Captions that the diffusion model and the filter learn from."""

JUDGE_TEMPLATES = (
    "drawing of a {size} {color} {shape}[ placed on a {background} canvas]",
    "{color} {shape}[, {size}][, {background} canvas]",
    "[the canvas is {background} with ]a {size} {color} {shape}",
    "this shows a {color} {shape}[ of {size} size][ over {background}]",
    "a {size} {shape} coloured {color}[ over a {background} canvas]",
    "[{background} behind ]a {size} {color} {shape}",
)
"""Captions that only the judge learns from: another wording for the same facts."""

SYNONYMS = {"large": "big", "small": "little", "circle": "disc"}
"""Other words that captions use now and then for the same thing."""

DROP_RATES = {"size": 0.15, "background": 0.08, "color": 0.05, "shape": 0.03}
"""How often a training caption leaves an attribute out."""

_ANY_SHAPE = "shape"
_GROUND = r"(?:background|backdrop|canvas)"
_COLOR = "(" + "|".join(COLORS) + ")"
_BACKGROUND_PATTERNS = (
    re.compile(rf"\b{_COLOR} {_GROUND}\b"),
    re.compile(rf"\b{_GROUND} is {_COLOR}\b"),
    re.compile(rf"\b{_COLOR} behind\b"),
    re.compile(rf"\b(?:on|over|against|in front of) (?:an? |the )?{_COLOR}\b"),
)
_CANONICAL = {synonym: word for word, synonym in SYNONYMS.items()}


@dataclass(frozen=True, order=True)
class Scene:
    """What a picture shows; every field is a word that captions use."""

    size: str
    color: str
    shape: str
    background: str


def all_scenes() -> list[Scene]:
    """All 672 scenes, in a fixed order."""
    return [
        Scene(size, color, shape, background)
        for size, color, shape, background in product(SIZES, COLORS, SHAPES, COLORS)
        if color != background
    ]


def change(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """`scene` with another value of one attribute, or with object and background colour swapped for `"swap"`."""
    if attribute == "swap":
        return replace(scene, color=scene.background, background=scene.color)
    taken = {"color": {scene.color, scene.background}, "background": {scene.color, scene.background}}
    words = {"size": SIZES, "color": COLORS, "shape": SHAPES, "background": COLORS}[attribute]
    others = [w for w in words if w not in taken.get(attribute, {getattr(scene, attribute)})]
    return replace(scene, **{attribute: rng.choice(others)})


def caption(scene: Scene, template: str = PROMPT, drop: Iterable[str] = ()) -> str:
    """Describe `scene` in the words of `template`, leaving the attributes in `drop` unsaid."""
    dropped = set(drop)
    if unknown := dropped - set(ATTRIBUTES):
        raise ValueError(f"cannot drop {sorted(unknown)}: the attributes are {', '.join(ATTRIBUTES)}")

    def optional(match: re.Match[str]) -> str:
        return "" if any(f"{{{name}}}" in match[1] for name in dropped) else match[1]

    words = {name: "" if name in dropped else getattr(scene, name) for name in ATTRIBUTES}
    words["shape"] = words["shape"] or _ANY_SHAPE
    text = re.sub(r"\[(.*?)\]", optional, template).format(**words)
    text = re.sub(r" coloured(?= (over|$)|$)", "", re.sub(r"\s+", " ", text).strip())
    return re.sub(r"\ban? (?=([aeiou])?)", lambda m: "an " if m[1] else "a ", text)


def random_caption(scene: Scene, templates: Sequence[str], rng: random.Random) -> str:
    """A training caption: a template by chance, attributes dropped at `DROP_RATES`, now and then a synonym."""
    drop = [name for name, rate in DROP_RATES.items() if rng.random() < rate]
    text = caption(scene, rng.choice(templates), drop)
    for word, synonym in SYNONYMS.items():
        if rng.random() < 0.1:
            text = re.sub(rf"\b{word}\b", synonym, text)
    return text


def parse(prompt: str) -> dict[str, str]:
    """The attributes that `prompt` names, e.g. `{"size": "large", "shape": "ring"}`; unnamed ones are absent."""
    text = re.sub(r"[^a-z ]", " ", prompt.lower())
    text = " ".join(_CANONICAL.get(word, word) for word in text.split())
    found: dict[str, str] = {}
    for pattern in _BACKGROUND_PATTERNS:
        if match := pattern.search(text):
            found["background"] = match[1]
            text = text[: match.start()] + " " + text[match.end() :]
            break
    for name, vocabulary in (("size", SIZES), ("color", COLORS), ("shape", SHAPES)):
        if word := next((word for word in text.split() if word in vocabulary), None):
            found[name] = word
    return {name: found[name] for name in ATTRIBUTES if name in found}


def render(scenes: Sequence[Scene], generator: torch.Generator, jitter: float = 1.0) -> Tensor:
    """Draw `scenes` as uint8 [N, 64, 64, 3].

    `generator` (CPU) decides radius within the size's range, place, angle, colour noise and the background's
    gradient; `jitter` scales place and angle: 0 is centred and upright, 1 moves `MAX_SHIFT` and `MAX_ANGLE`.
    """
    n = len(scenes)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * 2 - 1

    low, high = torch.tensor([SIZES[s.size] for s in scenes]).reshape(n, 2).T
    radius = ((low + high) / 2 + (high - low) / 2 * uniform()).view(n, 1, 1)
    shift = uniform(2) * MAX_SHIFT * jitter
    angle = (uniform() * MAX_ANGLE * jitter).view(n, 1, 1)
    noise = torch.randn(n, 2, 3, generator=generator) * COLOR_NOISE
    slope = uniform(2) * GRADIENT

    axis = torch.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2
    dx = (axis - shift[:, :1]).view(n, 1, IMAGE_SIZE)
    dy = (axis - shift[:, 1:]).view(n, IMAGE_SIZE, 1)
    x = dx * angle.cos() + dy * angle.sin()
    y = dy * angle.cos() - dx * angle.sin()
    alpha = torch.empty(n, IMAGE_SIZE, IMAGE_SIZE)
    for shape in SHAPES:
        rows = torch.tensor([i for i, s in enumerate(scenes) if s.shape == shape], dtype=torch.long)
        if len(rows):
            alpha[rows] = coverage(SHAPES[shape], x[rows], y[rows], radius[rows])

    ink = torch.tensor([[COLORS[s.color], COLORS[s.background]] for s in scenes]).reshape(n, 2, 3) + noise
    unit = axis / (IMAGE_SIZE / 2)
    shade = slope[:, 0].view(n, 1, 1) * unit.view(1, 1, -1) + slope[:, 1].view(n, 1, 1) * unit.view(1, -1, 1)
    ground = ink[:, 1].view(n, 1, 1, 3) + shade[..., None]
    picture = ground + alpha[..., None] * (ink[:, 0].view(n, 1, 1, 3) - ground)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)
