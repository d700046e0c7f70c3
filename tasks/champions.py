"""Which adapter makes the images of a name, since when, and on what evidence: `champions/<name>/_snapshots/<n>.json`.

Every change is a further snapshot, also a rollback, so that it stays known who made the images of which night. Before the first
snapshot the base model makes them, by itself.
"""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from tasks.adapters import AdapterError, load_card
from tasks.adapters.resolving import at_hand, load
from tasks.engines import Adapter, Recipe
from tasks.errors import DarkroomError
from tasks.identity import digest
from tasks.release import check_name
from tasks.store import CorruptObject, Missing, Store, layout, snapshots
from tasks.store.snapshots import SnapshotConflict

TRIES = 50  # of writing the next snapshot, while others do: each lost race is another's success
RESTORE = "restore it from a backup of the store"


class ChampionError(DarkroomError):
    """The adapter cannot be champion, or there is no such champion."""


class ChampionChanged(ChampionError):
    """Another one was crowned since the one that was beaten, or since the one that won."""


@dataclass(frozen=True)
class Champion:
    """A snapshot: from then on, images are made with this adapter, or by the base model alone."""

    name: str
    version: int
    adapter: str | None  # digest; None: the base model
    weight: float  # at which the adapter is worn
    base_digest: str  # of the model it belongs to
    since: str  # UTC
    why: str
    evidence: str | None  # key of the decision that crowned it; None: a person did
    parent: int | None  # the version it replaced; None: it is the first
    restores: int | None = (
        None  # the earlier version that a rollback brought back; 0: the base model, before all of them
    )

    @property
    def in_words(self) -> str:
        return worn_in_words(self.adapter, self.weight)


_SHAPE = TypeAdapter(Champion)


def worn_in_words(adapter: str | None, weight: float = 1.0) -> str:
    if adapter is None:
        return "the base model"
    return f"adapter {adapter[:12]}" + (f" at weight {weight:g}" if weight != 1 else "")


# --- reading -----------------------------------------------------------------------------------------------------------


def history(store: Store, name: str) -> list[Champion]:
    """All champions of a name, the oldest first. Raises CorruptObject."""
    return [_load(store, name, version) for version in snapshots.versions(store, layout.champion(name))]


def current(store: Store, name: str) -> Champion | None:
    """Who is champion now; None: nobody was ever crowned, and the base model makes the images. Raises CorruptObject."""
    versions = snapshots.versions(store, layout.champion(name))
    return _load(store, name, versions[-1]) if versions else None


def standing(store: Store, name: str, edition: str) -> Champion | None:
    """Who was champion when this edition was begun, which is now, the first time this is asked.

    So a night that is started again goes on with the champion that it began with, though a new one was crowned meanwhile.
    `edition` is whatever names the night: all who give the same text get the same champion.
    """
    key = layout.champion_begun(name, digest(edition))
    if not store.exists(key):
        now = current(store, name)
        store.create(key, json.dumps({"edition": edition, "version": now.version if now else 0}).encode())
    version = begun_with(store, key)
    return _load(store, name, version) if version else None


def begun_with(store: Store, key: str) -> int:
    """The champion (0: the base model) that a record of a night (`layout.champion_begun`) names. Raises Missing, CorruptObject."""
    match store.read_json(key):
        case {"version": int(version)} if version >= 0:
            return version
        case found:
            raise CorruptObject(
                f"{store.uri(key)} does not say which champion a night began with: {found!r:.100}", RESTORE
            )


def names(store: Store) -> list[str]:
    """The names that have a champion."""
    keys = (key.split("/") for key in store.list(layout.CHAMPIONS) if snapshots.version_of(key))
    return sorted({parts[1] for parts in keys if len(parts) == 4 and parts[2] == "_snapshots"})


def worn(store: Store, recipe: Recipe, champion: Champion | None) -> Recipe:
    """The recipe with what the champion wears. Raises ChampionError (it belongs to another model), AdapterError."""
    if champion is None or champion.adapter is None:
        return recipe
    if champion.base_digest != recipe.model_digest:
        raise ChampionError(
            f"champion {champion.version} of '{champion.name}' is {champion.in_words}, which belongs to the model with digest "
            f"{champion.base_digest[:12]}, and this run's model {recipe.model} has {recipe.model_digest[:12]}: name that model, "
            f"choose another champion (`darkroom champion set {champion.name} …`), or take another name for the new model"
        )
    return replace(recipe, adapters=(*recipe.adapters, adapter_of(store, champion.adapter, champion.weight)))


def adapter_of(store: Store, adapter: str, weight: float = 1.0) -> Adapter:
    """An adapter of the store, as a recipe names it. Raises ChampionError."""
    base_of(store, adapter)
    return Adapter(store.uri(layout.adapter(adapter)), adapter, weight)


def check_stands(store: Store, champion: Champion) -> None:
    """Raises ChampionChanged where a champion was rolled back or replaced since it was crowned, so that another makes the images."""
    now = current(store, champion.name)
    if now is None or (_wears(now), now.base_digest) == (_wears(champion), champion.base_digest):
        return
    wanted = f"{(champion.adapter or 'base')[:12]}" + (f"={champion.weight:g}" if champion.weight != 1 else "")
    raise ChampionChanged(
        f"the challenger ({champion.in_words}) was crowned by this decision already, as champion {champion.version} of "
        f"'{champion.name}' at {champion.since}, and {'replaced' if now.restores is None else 'rolled back'} since: "
        f"{now.in_words} makes the images now (champion {now.version}, {now.since}: {now.why}). A decision crowns once; "
        f"`darkroom champion set {champion.name} {wanted}` brings it back"
    )


# --- changing ----------------------------------------------------------------------------------------------------------


def crown(
    store: Store,
    name: str,
    adapter: str | None,
    *,
    base_digest: str,
    why: str,
    evidence: str | None = None,
    weight: float = 1.0,
    over: Champion | Literal["anyone"] | None = "anyone",
) -> Champion:
    """Make an adapter (digest; None: the base model) the champion of a name.

    What a decision (`evidence`: its key) crowned once it never crowns again, whoever was crowned since; without evidence, a
    champion that stands already stays as it is. `over` is the champion that was compared with (None: the base model): where another
    one stands by now, nothing is known of that one.

    Raises ChampionError (no such adapter, one of another model, evidence that is not there), ChampionChanged.
    """
    check_name(name)
    check_adapter(store, adapter, base_digest)
    if evidence is not None and not store.exists(evidence):
        raise ChampionError(
            f"{store.uri(evidence)} does not exist, and is to be the evidence of a champion: decide first"
        )
    facts = {"adapter": adapter, "weight": weight, "base_digest": base_digest, "why": why, "evidence": evidence}

    def follow(earlier: list[Champion]) -> dict[str, Any] | Champion:
        now = earlier[-1] if earlier else None
        for champion in reversed(earlier):
            if evidence is not None and champion.evidence == evidence:
                return champion
        if evidence is None and now and (now.adapter, now.weight, now.base_digest) == (adapter, weight, base_digest):
            return now
        if over != "anyone" and _wears(now) != _wears(over):
            raise ChampionChanged(
                f"the challenger ({worn_in_words(adapter, weight)}) beat another champion of '{name}' than the one that stands "
                f"now ({now.in_words if now else 'the base model'}): start it again, it is then compared with that one"
            )
        return facts

    return _next(store, name, follow)


def roll_back(store: Store, name: str, to: int | None = None, why: str = "") -> Champion:
    """Bring an earlier champion back, in a new snapshot: version `to` (0: the base model), or the one before the current.

    Rolling back once more goes one further back. Raises ChampionError (also where the files of its adapter are gone or others),
    CorruptObject.
    """

    def follow(earlier: list[Champion]) -> dict[str, Any] | Champion:
        if not earlier:
            raise ChampionError(f"'{name}' has no champion in {store!r} that could be rolled back{_known(store)}")
        by_version, now = {champion.version: champion for champion in earlier}, earlier[-1]

        def meant(version: int) -> int:
            """The version that was crowned, where `version` only brought it back."""
            while version and by_version[version].restores is not None:
                version = by_version[version].restores or 0
            return version

        stands = meant(now.version)
        if to is None and stands == 0:
            raise ChampionError(f"'{name}' is back at the base model already: there is nothing before it")
        target = meant(by_version[stands].parent or 0) if to is None else to
        if target and target not in by_version:
            raise ChampionError(
                f"'{name}' has no champion {target}: it has {', '.join(map(str, by_version))}, or 0: the base"
            )
        restored = by_version.get(target)
        if restored:
            check_adapter(store, restored.adapter, restored.base_digest)
            _check_files(store, restored)
        return {
            "adapter": restored.adapter if restored else None,
            "weight": restored.weight if restored else 1.0,
            "base_digest": (restored or now).base_digest,
            "why": why or f"rolled back from champion {now.version}",
            "evidence": None,
            "restores": target,
        }

    return _next(store, name, follow)


def _next(store: Store, name: str, follow: Callable[[list[Champion]], dict[str, Any] | Champion]) -> Champion:
    """Commit what `follow` makes of all champions so far; where another writer was faster, of those and his."""
    folder, writer = layout.champion(name), uuid.uuid4().hex
    for _ in range(TRIES):
        earlier = history(store, name)
        facts = follow(earlier)
        if isinstance(facts, Champion):
            return facts
        snapshot = {
            "writer_id": writer,
            **facts,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "parent": earlier[-1].version if earlier else None,
        }
        try:
            version = (snapshot["parent"] or 0) + 1
            return _champion(store, name, version, snapshots.commit(store, folder, version, snapshot))
        except SnapshotConflict:
            continue
    raise ChampionError(f"others changed the champion of '{name}' {TRIES} times in a row meanwhile: try again")


def check_adapter(store: Store, adapter: str | None, base_digest: str) -> None:
    """Raises ChampionError where an adapter (None: none) is not in the store, or was not trained on this model; CorruptObject."""
    if adapter is None:
        return
    belongs = base_of(store, adapter)
    if belongs != base_digest:
        raise ChampionError(
            f"adapter {adapter} was trained on the model with digest {belongs}, and is to be champion of one with {base_digest}: "
            "its numbers mean nothing there; train it on that model"
        )


def base_of(store: Store, adapter: str) -> str:
    """The digest of the model that an adapter of the store was trained on. Raises ChampionError (no such adapter), CorruptObject."""
    try:
        card: Any = load_card(store, adapter)
    except Missing:
        raise ChampionError(
            f"{store!r} has no adapter {adapter}: a champion is an adapter of the store, by its whole digest"
        ) from None
    if not isinstance(card, dict) or not isinstance(card.get("base_digest"), str):
        where = store.uri(layout.adapter_card(adapter))
        raise CorruptObject(f"{where} is no card of an adapter: it does not say of which model (base_digest)", RESTORE)
    return card["base_digest"]


def _check_files(store: Store, champion: Champion) -> None:
    """Raises ChampionError where what the champion wears cannot be put on: the next run would fail."""
    if champion.adapter is None:
        return
    try:
        load(at_hand(adapter_of(store, champion.adapter), store).source, champion.adapter)
    except AdapterError as error:
        raise ChampionError(
            f"champion {champion.version} of '{champion.name}' cannot come back: {error}. Restore "
            f"{store.uri(layout.adapter(champion.adapter))} from a backup of the store, or name another champion (--to)"
        ) from error


def _wears(champion: Champion | None) -> tuple[str, float] | None:
    return (champion.adapter, champion.weight) if champion and champion.adapter else None


def _load(store: Store, name: str, version: int) -> Champion:
    return _champion(store, name, version, snapshots.load(store, layout.champion(name), version))


def _champion(store: Store, name: str, version: int, snapshot: Any) -> Champion:
    """What a snapshot says. Raises CorruptObject where it is none of a champion."""
    try:
        return _SHAPE.validate_python({**snapshot, "name": name} if isinstance(snapshot, dict) else snapshot)
    except ValidationError as error:
        wrong = "; ".join(": ".join([*map(str, found["loc"]), found["msg"]]) for found in error.errors())
        where = store.uri(snapshots.key(layout.champion(name), version))
        raise CorruptObject(f"{where} is no snapshot of a champion: {wrong}", RESTORE) from error


def _known(store: Store) -> str:
    there = names(store)
    return f"; there are champions of {', '.join(there)}" if there else ""
