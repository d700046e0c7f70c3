"""The procedural world in one import: scenes, pictures, captions and the ground truth."""

from scenes import (
    ATTRIBUTES,
    COLORS,
    DROP_RATES,
    FILTER_TEMPLATES,
    IMAGE_SIZE,
    JUDGE_TEMPLATES,
    PROMPT,
    SIZES,
    SYNONYMS,
    Scene,
    all_scenes,
    caption,
    change,
    parse,
    random_caption,
    render,
)
from shapes import SHAPES
from truth import Finding, check

__all__ = [
    "ATTRIBUTES",
    "COLORS",
    "DROP_RATES",
    "FILTER_TEMPLATES",
    "IMAGE_SIZE",
    "JUDGE_TEMPLATES",
    "PROMPT",
    "SHAPES",
    "SIZES",
    "SYNONYMS",
    "Finding",
    "Scene",
    "all_scenes",
    "caption",
    "change",
    "check",
    "parse",
    "random_caption",
    "render",
]
