"""Writes demo.parquet: 30 prompts in three strata about the embedded models' world. Run it again after a change here:

python data/manifests/make_demo.py
"""

from pathlib import Path

import polars as pl

DEMO = Path(__file__).with_name("demo.parquet")

# stratum: campaign, tags of all its rows, then (size, colour, shape, background)
STRATA = {
    "basic": (
        "catalogue",
        ["plain", "daylight"],
        [
            ("large", "red", "circle", "white"),
            ("large", "blue", "square", "white"),
            ("large", "green", "triangle", "white"),
            ("large", "purple", "star", "white"),
            ("large", "orange", "ring", "white"),
            ("large", "black", "cross", "white"),
            ("small", "red", "square", "white"),
            ("small", "blue", "circle", "white"),
            ("small", "green", "ring", "white"),
            ("small", "purple", "triangle", "white"),
        ],
    ),
    "night": (
        "winter",
        ["dark"],
        [
            ("large", "yellow", "star", "black"),
            ("large", "white", "ring", "black"),
            ("large", "red", "triangle", "black"),
            ("large", "green", "cross", "black"),
            ("large", "orange", "circle", "black"),
            ("large", "blue", "square", "black"),
            ("small", "yellow", "circle", "black"),
            ("small", "white", "star", "black"),
            ("small", "red", "cross", "black"),
            ("small", "green", "square", "black"),
        ],
    ),
    "bold": (
        "summer",
        ["poster", "contrast"],
        [
            ("large", "yellow", "circle", "purple"),
            ("large", "red", "star", "yellow"),
            ("large", "blue", "cross", "orange"),
            ("large", "white", "triangle", "red"),
            ("large", "purple", "square", "green"),
            ("large", "orange", "ring", "blue"),
            ("small", "white", "circle", "blue"),
            ("small", "yellow", "square", "red"),
            ("small", "black", "triangle", "orange"),
            ("small", "red", "ring", "green"),
        ],
    ),
}


def prompt(size: str, colour: str, shape: str, background: str) -> str:
    article = "an" if background == "orange" else "a"
    return f"a {size} {colour} {shape} on {article} {background} background"


def demo() -> pl.DataFrame:
    """The manifest: prompts with settings of their own here and there, and three user columns (campaign, tags, brief)."""
    rows = [
        {
            "prompt": prompt(*scene),
            "stratum": stratum,
            "campaign": campaign,
            "tags": [*tags, scene[2]],
            "brief": 100 * number + place,
        }
        for number, (stratum, (campaign, tags, scenes)) in enumerate(STRATA.items(), start=1)
        for place, scene in enumerate(scenes)
    ]
    small = pl.col("prompt").str.starts_with("a small")
    night, bold, basic = (pl.col("stratum") == stratum for stratum in ("night", "bold", "basic"))
    return pl.DataFrame(rows).select(
        "prompt",
        "stratum",
        pl.when(night & small).then(3.5).alias("guidance"),  # a recipe of its own: four prompts, 16 images, two batches
        pl.when(night & small).then(4).when(bold & small).then(6).cast(pl.Int32).alias("n_candidates"),
        pl.when(basic).then(1).cast(pl.Int32).alias("k_min"),
        pl.when(bold).then(3).cast(pl.Int32).alias("k_max"),
        "campaign",
        "tags",
        "brief",
    )


if __name__ == "__main__":
    demo().write_parquet(DEMO)
    print(f"{DEMO.name}: {demo().height} prompts")
