"""The ground truth: what a picture shows and whether it fulfils a prompt, by geometry alone.

The background is fitted as a plane of colour, the object is cut out by colour, brought to a fixed area and place, and
compared with drawn templates of the six shapes and of decoys (polygons, ellipses, blunt stars, pierced discs, ...).
A shape counts as seen only if its template overlaps well, clearly better than any other shape's, and no decoy fits
better.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scenes import ATTRIBUTES, COLORS, IMAGE_SIZE, SIZES, parse
from shapes import DECOYS, SHAPES, coverage
from torch import Tensor
from torch.nn import functional as F

MIN_CONTRAST = 0.18
"""RGB distance of the object from the background below which there is no object."""
MAX_COLOR_ERROR = 0.30
"""RGB distance from the nearest named colour beyond which a colour is none of them."""
MAX_FOREIGN = 0.15
"""Area of other colours, as a share of the object's area, beyond which a picture is malformed."""
MIN_IOU = 0.88
"""Overlap with the best shape's template below which a picture is malformed."""
MIN_MARGIN = 0.03
"""How much better the best shape must fit than the second best one."""
DECOY_MARGIN = 0.004
"""How much better a decoy must fit than the best shape for the picture to be malformed."""

_FRAME = 48
_REACH = 1.15
_RADII = (10.0, 12.5, 16.0, 19.0, 23.0)


@dataclass(frozen=True)
class Finding:
    """What the checker sees in one picture; an attribute that it cannot tell is None."""

    match: bool
    """Every attribute that the prompt names is right, and the picture is not malformed."""
    malformed: bool
    """There is no object, or none of the six shapes fits it."""
    size: str | None
    color: str | None
    shape: str | None
    background: str | None
    iou: float
    """Overlap with the best shape's template, 0..1."""


def check(images: Tensor, prompts: Sequence[str]) -> list[Finding]:
    """Judge uint8 [N, 64, 64, 3] pictures against one prompt each; only attributes that the prompt names count."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    return [found for chunk in _chunks(images, prompts) for found in _check(*chunk)]


def _chunks(images: Tensor, prompts: Sequence[str], size: int = 256) -> list[tuple[Tensor, Sequence[str]]]:
    return [(images[i : i + size], prompts[i : i + size]) for i in range(0, len(prompts), size)]


def _check(images: Tensor, prompts: Sequence[str]) -> list[Finding]:
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 [N, 64, 64, 3], not {images.dtype} {list(images.shape)}")
    mask, ink, ground, readable = _cut_out(images.float() / 255)
    area = mask.sum((1, 2)).clamp(min=1.0)
    fit = _canonical(mask).flatten(1)
    templates, owners, unit_areas = _templates()
    overlap = fit @ templates.T
    iou = overlap / (fit.square().sum(1, keepdim=True) + templates.square().sum(1) - overlap)
    by_shape = torch.stack([iou[:, owners == k].amax(1) for k in range(len(SHAPES))], 1)
    decoy = iou[:, owners == len(SHAPES)].amax(1)
    top = by_shape.topk(2, dim=1)
    best, shape = top.values[:, 0], top.indices[:, 0]
    clear = (best - top.values[:, 1] >= MIN_MARGIN) & (decoy - best < DECOY_MARGIN)
    formed = readable & (best >= MIN_IOU) & clear
    radius = (area / unit_areas[shape]).sqrt()
    names, findings = list(SHAPES), []
    for i, prompt in enumerate(prompts):
        well = bool(formed[i])
        seen = {
            "size": _size(float(radius[i])) if well else None,
            "color": _color(ink[i]),
            "shape": names[int(shape[i])] if well else None,
            "background": _color(ground[i]),
        }
        wanted = parse(prompt)
        match = well and all(seen[name] == wanted[name] for name in ATTRIBUTES if name in wanted)
        findings.append(Finding(match=match, malformed=not well, iou=float(best[i]), **seen))
    return findings


def _size(radius: float) -> str | None:
    """The size whose range the radius (px) lies in, with two and a half pixels to spare on both sides."""
    return next((name for name, (low, high) in SIZES.items() if low - 2.5 <= radius <= high + 2.5), None)


def _color(rgb: Tensor) -> str | None:
    """The nearest named colour of RGB [3] in 0..1."""
    names, values = list(COLORS), torch.tensor(list(COLORS.values()))
    distance = (values - rgb).norm(dim=1)
    return names[int(distance.argmin())] if float(distance.min()) <= MAX_COLOR_ERROR else None


@functools.cache
def _axes() -> tuple[Tensor, Tensor]:
    axis = (torch.arange(IMAGE_SIZE) + 0.5) / (IMAGE_SIZE / 2) - 1
    return torch.meshgrid(axis, axis, indexing="xy")


def _cut_out(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures [N, 64, 64, 3] to the object's mask [N, 64, 64], both colours [N, 3] and whether it is readable [N]."""
    n = len(pictures)
    x, y = _axes()
    plane = torch.stack([torch.ones_like(x), x, y], -1)
    rim = torch.maximum(x.abs(), y.abs()) > 1 - 6 / IMAGE_SIZE
    ground = pictures[:, rim].median(1).values
    steady = (pictures[:, rim] - ground[:, None]).norm(dim=2, keepdim=True) < 0.15
    weighted = plane[rim] * steady
    ridge = 1e-4 * torch.eye(3)
    fit = torch.linalg.solve(weighted.mT @ weighted + ridge, weighted.mT @ pictures[:, rim])
    back = (plane.view(1, -1, 3) @ fit).view_as(pictures)

    difference = pictures - back
    distance = difference.norm(dim=3)
    reference = distance.flatten(1).quantile(0.99, dim=1).view(n, 1, 1)
    core = (distance > 0.7 * reference).float()[..., None]
    ink_step = (difference * core).sum((1, 2)) / core.sum((1, 2)).clamp(min=1)
    direction = ink_step.view(n, 1, 1, 3)
    share = (difference * direction).sum(3) / direction.square().sum(3).clamp(min=1e-6)
    foreign = (difference - share.clamp(0, 1.2)[..., None] * direction).norm(dim=3) > 0.2
    mask = _sharpen(share.clamp(0, 1))
    area = mask.sum((1, 2))
    readable = (reference.flatten() > MIN_CONTRAST) & (area > 40) & (area < 0.6 * IMAGE_SIZE**2)
    readable &= foreign.float().sum((1, 2)) <= MAX_FOREIGN * area
    return mask, ink_step + fit[:, 0], fit[:, 0], readable


def _sharpen(mask: Tensor) -> Tensor:
    """Steeper edges; takes away faint shades and evens out how soft edges are."""
    return ((mask - 0.5) * 1.6 + 0.5).clamp(0, 1)


def _canonical(masks: Tensor) -> Tensor:
    """Masks [N, 64, 64] moved to their centroid and scaled to one area, [N, 48, 48]."""
    x, y = _axes()
    area = masks.sum((1, 2)).clamp(min=1.0)
    cx, cy = (masks * x).sum((1, 2)) / area, (masks * y).sum((1, 2)) / area
    scale = _REACH * area.sqrt() / (IMAGE_SIZE / 2)
    theta = torch.zeros(len(masks), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, 0, 2], theta[:, 1, 2] = cx, cy
    grid = F.affine_grid(theta, [len(masks), 1, _FRAME, _FRAME], align_corners=False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


@functools.cache
def _templates() -> tuple[Tensor, Tensor, Tensor]:
    """Templates [T, 2304], the index of each one's shape [T] (`len(SHAPES)` for decoys), area of each unit shape."""
    x, y = (axis * IMAGE_SIZE / 2 for axis in _axes())
    masks, owners, unit_areas = [], [], []
    for index, distance in enumerate([*SHAPES.values(), *DECOYS.values()]):
        for radius in _RADII:
            for angle in (-0.12, -0.06, 0.0, 0.06, 0.12):
                u = x * math.cos(angle) + y * math.sin(angle)
                v = y * math.cos(angle) - x * math.sin(angle)
                masks.append(_sharpen(coverage(distance, u, v, radius)))
                owners.append(min(index, len(SHAPES)))
        unit_areas.append(float(coverage(distance, x, y, 23.0).sum()) / 23.0**2)
    return _canonical(torch.stack(masks)).flatten(1), torch.tensor(owners), torch.tensor(unit_areas)
