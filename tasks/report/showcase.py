"""Which candidates of a run a person gets to see, and how they look: a small, fair, repeatable choice of any number."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl
from PIL import Image

from tasks.references import PlanRef, Selection
from tasks.store import Store, layout
from tasks.store.images import decode
from tasks.store.shards import read_images, read_index

STRIP = 8  # images in each strip of extremes

_COLUMNS = ("candidate_id", "prompt_id", "stratum", "score", "rank_score", "verdict", "reason", "scorer", "part")
_FACTS = ("prompt", "negative_prompt", "recipe_id", "index", "seed", "width", "height", "pixel_hash", "run", "made_at")
_LOSSLESS_EDGE = 128  # pixels; up to here a thumbnail keeps every pixel
_QUALITIES = ((256, 82), (256, 60), (192, 50), (128, 50))  # (edge in pixels, WebP quality), best first
_THUMBNAIL_BYTES = 18_000  # × 400 images × 4/3 for base64 < 10 MB


def read_ledger(store: Store, selection: Selection) -> pl.DataFrame:
    """The run's verdicts, with the columns that reports need; scores that are not finite are null."""
    frame = store.read_frame(selection.ledger, columns=_COLUMNS)
    return frame.with_columns(pl.when(pl.col("score").is_finite()).then("score").alias("score"))


def extremes(ledger: pl.DataFrame, size: int = STRIP) -> dict[str, list[str]]:
    """The candidates worth a look first, as title → candidate ids: highest and lowest scores, and both sides of the cut.

    None where so few were judged that these would be the same images over and over.
    The cut runs through the rank the selection compared, so its two sides hold only images that were weighed against each
    other, not those that a guarantee, a cap or the floor decided.
    """
    judged = ledger.filter(pl.col("verdict").is_in(["accepted", "rejected"]), pl.col("score").is_not_null())
    if judged.height <= 2 * size:
        return {}
    weighed = judged.filter(pl.col("reason").is_in(["pool", "budget"]), pl.col("rank_score").is_not_null())
    last_in = weighed.filter(pl.col("verdict") == "accepted").sort("rank_score", "candidate_id")
    first_out = weighed.filter(pl.col("verdict") == "rejected").sort(
        "rank_score", "candidate_id", descending=[True, False]
    )
    strips = {
        "Highest scores": judged.sort("score", "candidate_id", descending=[True, False]),
        "Last ones in": last_in,
        "First ones out": first_out,
        "Lowest scores": judged.sort("score", "candidate_id"),
    }
    return {title: rows["candidate_id"].head(size).to_list() for title, rows in strips.items() if rows.height}


def choose(ledger: pl.DataFrame, limit: int, first: Iterable[str] = ()) -> pl.DataFrame:
    """At most `limit` rows of the ledger: those in `first`, then equally many of each verdict and stratum.

    Within a verdict and stratum the lowest candidate ids are taken. Ids are digests, so that is a fair draw, and the same
    one every time. Sorted by score, highest first.
    """
    turn = pl.int_range(pl.len()).over("verdict", "stratum")  # in id order: one of each group, then the next of each
    drawn = ledger.sort("candidate_id").with_columns(turn.alias("turn"))
    wanted = pl.col("candidate_id").is_in(list(first))
    drawn = drawn.sort(~wanted, "turn", "candidate_id").head(limit).drop("turn")
    return drawn.sort("score", "candidate_id", descending=[True, False], nulls_last=True)


def with_facts(store: Store, plan: PlanRef, chosen: pl.DataFrame) -> pl.DataFrame:
    """The chosen rows of the ledger with what their shards' indexes say of them; only those shards are read."""
    needed = {layout.shard_of(part) for part in chosen["part"]}
    # by part too: two runs at once may have made a candidate twice, and the ledger says which of the two was judged
    found = [
        read_index(store, shard.recipe_id, shard.shard).join(chosen, on=["candidate_id", "part"], how="semi")
        for shard in plan.shards
        if shard.shard in needed
    ]
    facts = pl.concat(found).select("candidate_id", "part", *_FACTS, "part_sha256")
    return chosen.join(facts, on=["candidate_id", "part"], how="left", maintain_order="left")


@dataclass(frozen=True)
class Thumbnail:
    """A small WebP as a data URI. `small`: the image itself has so few pixels that enlarging should show them as they are."""

    uri: str
    width: int  # pixels
    height: int  # pixels
    small: bool


def thumbnails(store: Store, rows: pl.DataFrame) -> dict[str, Thumbnail]:
    """The thumbnails of those rows of `with_facts` that have an image, by candidate id; one part is in memory at a time."""
    return {candidate_id: thumbnail(data) for candidate_id, data in read_images(store, rows)}


def thumbnail(data: bytes) -> Thumbnail:
    """The encoded image at most 256 pixels wide and high; small ones keep every pixel, none is over 18 kB."""
    image = Image.fromarray(decode(data))
    small = max(image.size) <= _LOSSLESS_EDGE
    # a fifth of the time of the best compression, for files 3 % larger
    webp = _webp(image, lossless=True, method=1, quality=20) if small else b""
    if not small or len(webp) > _THUMBNAIL_BYTES:
        for edge, quality in _QUALITIES:
            image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
            webp = _webp(image, method=4, quality=quality)
            if len(webp) <= _THUMBNAIL_BYTES:
                break
    uri = "data:image/webp;base64," + base64.b64encode(webp).decode()
    return Thumbnail(uri, image.width, image.height, small)


def _webp(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return buffer.getvalue()
