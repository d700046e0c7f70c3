"""How many images of a release show what their prompt says, before and after filtering, by the ground truth.

The ground truth (`truth.check`) is geometry: no learned part, and nothing that selection or training ever sees.

    python data/models/ground_truth.py --store out/store --name demo
"""

import argparse
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
import truth

from tasks.store import Store, layout, snapshots
from tasks.store.images import decode
from tasks.store.shards import read_images


@dataclass(frozen=True)
class MatchRate:
    """Of `images`, so many match their whole prompt."""

    images: int
    matches: int

    @property
    def rate(self) -> float:
        return self.matches / self.images

    @property
    def half_width(self) -> float:
        """Half of the 95 % Wald interval, 1.96·√(p(1−p)/n)."""
        return 1.96 * (self.rate * (1 - self.rate) / self.images) ** 0.5


def check_run(store: Store, run: str) -> pl.DataFrame:
    """candidate_id, prompt, verdict, score, match and malformed of every image of a finished run, in ledger order."""
    ledger = store.read_frame(layout.ledger(run))
    # the index of a shard stands beside its parts
    indexes = pl.concat(store.read_frame(f"{part.rsplit('/', 1)[0]}/index.parquet") for part in _shards(ledger))
    made = indexes.join(ledger, on=["candidate_id", "part"], how="semi")  # by part: one may have been made twice
    prompts = dict(made.select("candidate_id", "prompt").iter_rows())
    ids, pixels = zip(*((i, decode(data)) for i, data in read_images(store, made)), strict=True)
    findings = truth.check(torch.from_numpy(np.stack(pixels)), [prompts[i] for i in ids])
    found = pl.DataFrame(
        {
            "candidate_id": ids,
            "prompt": [prompts[i] for i in ids],
            "match": [finding.match for finding in findings],
            "malformed": [finding.malformed for finding in findings],
        }
    )
    return ledger.select("candidate_id", "verdict", "score").join(found, on="candidate_id", maintain_order="left")


def match_rate(checked: pl.DataFrame) -> MatchRate:
    """Of these rows of `check_run`; there must be one."""
    return MatchRate(len(checked), int(checked["match"].sum()))


def _shards(ledger: pl.DataFrame) -> list[str]:
    """One part of each shard of a ledger."""
    return ledger.unique(pl.col("part").str.replace(r"/[^/]*$", ""), maintain_order=True)["part"].to_list()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="out/store")
    parser.add_argument("--name", default="demo", help="the dataset; its latest release is looked at")
    options = parser.parse_args()

    store = Store(options.store)
    versions = snapshots.versions(store, layout.dataset(options.name))
    if not versions:
        parser.error(f"{store} holds no release of '{options.name}': `make demo` makes one")
    checked = check_run(store, snapshots.load(store, layout.dataset(options.name), versions[-1])["run"])
    print("Ground truth (geometry; selection never sees it): images that show all their prompt says")
    for title, rows in (
        ("before filtering", checked),
        ("after filtering", checked.filter(pl.col("verdict") == "accepted")),
    ):
        found = match_rate(rows)
        print(f"  {title:<17} {found.rate:6.1%} ± {found.half_width:.1%}  ({found.matches} of {found.images})")


if __name__ == "__main__":
    main()
