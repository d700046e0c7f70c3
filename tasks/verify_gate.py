"""What `verify` checks of champions and of the duels that made them."""

from typing import TYPE_CHECKING, Any

import polars as pl

from tasks import tables
from tasks.adapters import load_card
from tasks.champions import Champion, begun_with, history, names
from tasks.duel_rules import by_prompt
from tasks.identity import digest, sha256
from tasks.store import Store, layout, snapshots

if TYPE_CHECKING:
    from tasks.verify import Report

RESTORE = "restore it from a backup of the store"
DECIDE_AGAIN = "delete the files of this folder and promote again with the same command: the images are found, and it is decided anew"
SAME = 1e-6  # the pairs' cosines are float32


def check_champions(store: Store, report: "Report") -> None:
    """Each champion follows on the one before, is an adapter of the store for that model, and has its evidence."""
    for name in names(store):
        folder = layout.champion(name)
        with report.about(folder, RESTORE):
            versions = snapshots.versions(store, folder)
            champions = history(store, name)
            if versions != list(range(1, len(versions) + 1)):
                report.say(folder, f"has the champions {versions}: some are missing", RESTORE)
            for number, champion in enumerate(champions):
                report.checked["champions"] += 1
                _check_champion(store, champion, champions[:number], report)
        for key in store.list(f"{folder}/begun"):
            with report.about(key, RESTORE):
                version = begun_with(store, key)
                if version and version not in versions:
                    report.say(key, f"names champion {version}, which '{name}' has not", RESTORE)


def _check_champion(store: Store, champion: Champion, earlier: list[Champion], report: "Report") -> None:
    key = snapshots.key(layout.champion(champion.name), champion.version)
    parent = earlier[-1].version if earlier else None
    if champion.parent != parent:
        report.say(key, f"follows on champion {champion.parent}, and {parent} is the one before it", RESTORE)
    if champion.restores and champion.restores not in [one.version for one in earlier]:
        report.say(key, f"brings back champion {champion.restores}, which is none before it", RESTORE)
    if champion.adapter:
        card = layout.adapter_card(champion.adapter)
        with report.about(card, RESTORE):
            belongs = load_card(store, champion.adapter)["base_digest"]
            if belongs != champion.base_digest:
                report.say(key, f"is of model {champion.base_digest}, its adapter of {belongs}", RESTORE)
    if champion.evidence and not store.exists(champion.evidence):
        report.say(champion.evidence, f"does not exist, but is why champion {champion.version} was crowned", RESTORE)


def check_promotions(store: Store, report: "Report") -> None:
    """Each decision is about what its place says, agrees with its findings and pairs, and its evidence is whole."""
    for key in store.list(layout.PROMOTIONS):
        if key.endswith("/decision.json"):
            report.checked["decisions"] += 1
            with report.about(key, DECIDE_AGAIN):
                _check_decision(store, key, store.read_json(key), report)


def _check_decision(store: Store, key: str, facts: dict[str, Any], report: "Report") -> None:
    duel = key.split("/")[1]
    if not facts["duel"] == digest(facts["asked"]) == duel:
        report.say(key, "is about another duel than its place says", DECIDE_AGAIN)
    if facts["promoted"] != all(finding["held"] for finding in facts["findings"]):
        report.say(key, f"says promoted: {facts['promoted']}, and its findings say otherwise", DECIDE_AGAIN)
    manifest = layout.manifest(facts["asked"]["manifest"])
    if not store.exists(manifest):
        report.say(manifest, f"does not exist, but {key} was decided with its prompts", RESTORE)
    for file in facts["files"]:
        report.checked["files"] += 1
        with report.about(file["key"], DECIDE_AGAIN):
            data = store.read(file["key"])
            if (len(data), sha256(data)) != (file["bytes"], file["sha256"]):
                report.say(
                    file["key"], "is not the file that was decided with: it was changed or damaged", DECIDE_AGAIN
                )
    with report.about(layout.duel_pairs(duel), DECIDE_AGAIN):
        pairs = pl.DataFrame(tables.DUEL.conform(store.read_table(layout.duel_pairs(duel))))
        _check_pairs(store, key, facts, pairs, report)


def _check_pairs(store: Store, key: str, facts: dict[str, Any], pairs: pl.DataFrame, report: "Report") -> None:
    said = facts["numbers"].get("cosine")
    if said:
        whole = pairs.filter(
            pl.all_horizontal(pl.col("champion_cosine", "challenger_cosine").is_finite().fill_null(False))
        )
        means = by_prompt(whole)
        if any(abs(means[side].mean() - value) > SAME for side, value in said.items()):  # type: ignore[operator]
            report.say(key, "has other means than its pairs come to", DECIDE_AGAIN)
    parts = pl.concat([pairs["champion_part"], pairs["challenger_part"]]).unique().sort()
    if lost := [part for part in parts if not store.exists(part)]:
        report.say(lost[0], f"does not exist, nor do {len(lost) - 1} others, but {key} compares images in it", RESTORE)
