"""Signed distance functions of the world's shapes, and of the decoys that the checker must not take for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
"""Coordinates in radii (y down, centroid at the origin) to signed distance in radii, negative inside."""


def disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-12) - 1.0


def box(x: Tensor, y: Tensor, width: float = 0.86, height: float = 0.86) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def annulus(x: Tensor, y: Tensor, hole: float = 0.54) -> Tensor:
    return (disc(x, y) + (1 - hole) / 2).abs() - (1 - hole) / 2


def plus(x: Tensor, y: Tensor, arm: float = 0.32) -> Tensor:
    return torch.minimum(box(x, y, arm, 1.0), box(x, y, 1.0, arm))


def polygon(x: Tensor, y: Tensor, corners: int, turn: float = 0.0) -> Tensor:
    """A regular polygon; `turn` 0..1 goes from one corner up to the next one up."""
    sector = 2 * math.pi / corners
    angle = torch.remainder(torch.atan2(x, -y) + turn * sector, sector) - sector / 2
    return torch.sqrt(x * x + y * y + 1e-12) * angle.cos() - math.cos(sector / 2)


def star(x: Tensor, y: Tensor, inner: float = 0.45, tips: int = 5) -> Tensor:
    """A star with one tip up whose notches lie at radius `inner`."""
    sector = 2 * math.pi / tips
    angle = (torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2).abs()
    radius = torch.sqrt(x * x + y * y + 1e-12)
    ax, ay = radius * angle.cos() - 1.0, radius * angle.sin()
    bx, by = inner * math.cos(sector / 2) - 1.0, inner * math.sin(sector / 2)
    along = ((ax * bx + ay * by) / (bx * bx + by * by)).clamp(0, 1)
    return torch.sqrt((ax - bx * along) ** 2 + (ay - by * along) ** 2 + 1e-12) * torch.sign(ax * by - ay * bx)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.575


def ellipse(x: Tensor, y: Tensor, aspect: float, angle: float) -> Tensor:
    """An ellipse, its long axis turned by `angle` radians; the distance is exact on the outline only."""
    c, s = math.cos(angle), math.sin(angle)
    u, v = (x * c + y * s) / aspect, y * c - x * s
    radius = torch.sqrt(u * u + v * v + 1e-12)
    return (radius - 1) * radius / torch.sqrt((u / aspect) ** 2 + v * v + 1e-12)


def rounded_box(x: Tensor, y: Tensor, corner: float) -> Tensor:
    inside = 0.86 - corner
    dx, dy = x.abs() - inside, y.abs() - inside
    outside = torch.sqrt(dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2 + 1e-12)
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


SHAPES: dict[str, Distance] = {
    "circle": disc,
    "square": box,
    "triangle": triangle,
    "star": star,
    "ring": annulus,
    "cross": plus,
}
"""The shapes that captions name."""

DECOYS: dict[str, Distance] = {
    **{
        f"polygon {corners} {turn}": lambda x, y, n=corners, t=turn: polygon(x, y, n, t)
        for corners in (5, 6, 7, 8)
        for turn in (0.0, 0.25, 0.5, 0.75)
    },
    **{f"ellipse {a}": lambda x, y, a=a: ellipse(x, y, 1.25, a * math.pi / 4) for a in range(4)},
    "rectangle level": lambda x, y: box(x, y, 1.1, 0.86),
    "rectangle upright": lambda x, y: box(x, y, 0.86, 1.1),
    "rounded square": lambda x, y: rounded_box(x, y, 0.5),
    "diamond": lambda x, y: polygon(x, y, 4),
    "blunt star": lambda x, y: star(x, y, 0.72),
    "thin star": lambda x, y: star(x, y, 0.28),
    "four-pointed star": lambda x, y: star(x, y, 0.4, 4),
    "six-pointed star": lambda x, y: star(x, y, 0.55, 6),
    "pierced disc": lambda x, y: annulus(x, y, 0.22),
    "broken ring": lambda x, y: torch.maximum(annulus(x, y), 0.35 - torch.maximum(x, y.abs())),
    "blunt cross": lambda x, y: plus(x, y, 0.55),
}
"""Near misses: what a badly drawn circle, square, star, ring or cross looks like."""


def coverage(distance: Distance, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """How much of each pixel (0..1) a shape covers; x, y and the outer radius in pixels, broadcastable."""
    return (0.5 - distance(x / radius, y / radius) * radius).clamp(0, 1)
