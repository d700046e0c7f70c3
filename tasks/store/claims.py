"""Who makes a shard just now, so that two runs at once do not make the same images twice.

Claims save work, they do not guard correctness. A holder that was frozen, or cut off from the store, for longer than the
silence loses its claim to another while it may still be at work; then both make the same shard. That is waste and never
wrong: parts and indexes are created only where there are none, and say the same whoever makes them.

The claims of a shard are numbered objects beside its parts, and the highest alone counts. It is made by create-if-absent, so
one of many racers gets it, and rewritten by its holder only. It ends in one of three ways: its holder writes that it has
`ended`; or its process is certainly dead, which only the same machine can know (`alive`); or its `beat`, which the holder
counts up every BEAT_SECONDS, stood still for SILENCE_SECONDS by the observer's own clock: no clock of one machine is compared
with another's. A claim that cannot be read can still fall silent. Who then wants the shard creates the next number, and a
holder who finds a higher number than its own has lost. No number comes twice, so what a frozen holder writes late falls on
its own old object and disturbs nobody. Only when the shard is finished, and nobody needs a claim any more, are they deleted.

    with Claims(store, run) as claims:
        if claim := claims.take(recipe_id, shard):
            with claim:
                ...  # look whether the shard was finished a moment ago, before making it; stop where `claim.lost`
        else:
            ...  # claims.held_by(recipe_id, shard) makes it: come back in some seconds, to the same Claims
"""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from types import TracebackType
from typing import BinaryIO

from tasks.errors import DarkroomError
from tasks.store import alive, layout
from tasks.store.objects import Missing, Store

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
SILENCE_SECONDS = 120.0  # longer than the store's own patience (persistence): a holder may sit an outage out
TURNS = 10  # of `take`: in each, another took, released or finished the shard just then
_NUMBER = re.compile(r".*/(\d+)\.json")


class ForkedClaims(DarkroomError):
    """Claims were used in another process than the one that made them."""


@dataclass(frozen=True)
class Holder:
    """What a claim object says."""

    id: str  # of this claim
    owner: str  # the Claims that took it
    run: str
    host: str
    pid: int
    beat: int
    ended: bool = False

    def __str__(self) -> str:
        return f"run {self.run} (process {self.pid} on {self.host})"

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def parse(data: bytes) -> Holder | None:
    """The holder that a claim object names; None where it is none of ours: torn, damaged, or of another version."""
    try:
        holder = Holder(**json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return None
    whole = all(isinstance(getattr(holder, field.name), field.type) for field in fields(holder))  # type: ignore[arg-type]
    return holder if whole else None


@dataclass(frozen=True)
class _Sight:
    """What an observer saw, and since when by its own clock."""

    key: str
    data: bytes
    since: float


class Claim:
    """A shard that is ours to make, until it is released or lost."""

    def __init__(self, claims: "Claims", recipe_id: str, shard: str, number: int, holder: Holder):
        self.recipe_id, self.shard, self.number = recipe_id, shard, number
        self._claims, self._holder = claims, holder
        self._writing = threading.Lock()
        self._lost = self._over = False

    def __repr__(self) -> str:
        return f"Claim({self.key!r}{', lost' * self._lost})"

    @property
    def key(self) -> str:
        return layout.claim(self.recipe_id, self.shard, self.number)

    @property
    def id(self) -> str:
        return self._holder.id

    @property
    def lost(self) -> bool:
        """Whether another took the shard over, as the last beat saw it: leave the shard to that one."""
        return self._lost

    def beat(self) -> None:
        """Show that the holder lives, or find that the claim is lost. Raises what the store raises."""
        with self._writing:
            if self._over or self._lost:
                return
            self._lost = not self._is_ours()
            if self._lost:
                log.warning("another process took over %s: ours was silent for too long", self.key)
                return
            self._holder = replace(self._holder, beat=self._holder.beat + 1)
            self._claims.store.write(self.key, self._holder.to_bytes())

    def release(self) -> None:
        """Let others have the shard; where it is finished, clear its claims away. Further calls do nothing.

        Never fails: where the store cannot be reached, the claim stays there and falls silent.
        """
        if os.getpid() != self._claims.pid:
            return  # a fork has only a picture of it
        with self._writing:
            if self._over:
                return
            self._over = True
            try:
                if not self._lost and self._is_ours():
                    self._end()
            except Exception as error:  # a network's errors have no common class
                log.warning("%s could not be released (%s): it ends by itself", self.key, error)
            finally:
                self._claims._drop(self)

    def _is_ours(self) -> bool:
        store = self._claims.store
        if max(_numbers(store, self.recipe_id, self.shard), default=-1) != self.number:
            return False
        try:
            holder = parse(store.read(self.key))
        except Missing:
            return False
        return holder is not None and holder.id == self.id

    def _end(self) -> None:
        store = self._claims.store
        if not store.exists(layout.shard_index(self.recipe_id, self.shard)):
            store.write(self.key, replace(self._holder, ended=True).to_bytes())
            return
        for number in _numbers(store, self.recipe_id, self.shard):
            if number <= self.number:  # a higher one would be another's, who has just taken it over
                store.delete(layout.claim(self.recipe_id, self.shard, number))

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Claims:
    """The claims of one process in one store: takes them, shows that it lives, and remembers which others do.

    Each process has its own: they are neither pickled nor used in a fork. One thread beats for all claims that are held, with
    one small list, read and write for each every `beat_seconds`; it ends when none is held. `clock`: seconds, as of
    `time.monotonic`.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        beat_seconds: float = BEAT_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.store, self.run = store, run
        self.owner, self.pid = uuid.uuid4().hex, os.getpid()
        self._beat_seconds, self._silence_seconds, self._clock = beat_seconds, silence_seconds, clock
        self._changed = threading.Condition()  # guards all that follows
        self._ids: set[str] = set()  # of claims that are held or just being taken
        self._held: list[Claim] = []
        self._seen: dict[str, _Sight] = {}  # by the folder of the claims
        self._thread: threading.Thread | None = None
        self._sign: BinaryIO | None = None

    def take(self, recipe_id: str, shard: str) -> Claim | None:
        """The claim of a shard, or None while another (it may be another thread of this process) holds it and may be alive.

        Where only silence tells that a holder is dead, it is this object that has to see it silent: ask the same one again
        every few seconds. Raises ForkedClaims, and what the store raises.
        """
        if os.getpid() != self.pid:
            raise ForkedClaims(
                f"claims of process {self.pid} were used in its fork {os.getpid()}, where nothing keeps them alive: "
                "make Claims anew in each process"
            )
        for _ in range(TURNS):
            number = max(_numbers(self.store, recipe_id, shard), default=-1)
            if number >= 0:
                dead = self._is_dead(recipe_id, shard, number)
                if dead is None:
                    continue
                if not dead:
                    return None
            if claim := self._create(recipe_id, shard, number + 1):
                return claim
        return None

    def held_by(self, recipe_id: str, shard: str) -> Holder | None:
        """Who held the shard when `take` last looked and did not get it; None where the claim does not say, or none did."""
        with self._changed:
            sight = self._seen.get(layout.claims(recipe_id, shard))
        return parse(sight.data) if sight else None

    def close(self) -> None:
        """Release all that is held."""
        for claim in list(self._held):
            claim.release()
        with self._changed:
            sign, self._sign = self._sign, None
        if os.getpid() == self.pid:
            alive.end(self.owner, sign)

    def __enter__(self) -> "Claims":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- taking ------------------------------------------------------------------------------------------------------

    def _create(self, recipe_id: str, shard: str, number: int) -> Claim | None:
        """The claim with that number; None where another has it, or a higher one."""
        holder = Holder(uuid.uuid4().hex, self.owner, self.run, socket.gethostname(), self.pid, beat=0)
        claim = Claim(self, recipe_id, shard, number, holder)
        with self._changed:
            self._ids.add(claim.id)
            self._sign = self._sign or alive.show(self.owner)
        ours = False
        try:
            # Not created may be a repetition of ours, whose first answer was lost on the way; created may be a number that is
            # too low, where claims were deleted during the listing before.
            self.store.create(claim.key, holder.to_bytes())
            ours = claim._is_ours()
        finally:
            with self._changed:
                if ours:
                    self._held.append(claim)
                    self._seen.pop(layout.claims(recipe_id, shard), None)
                    if self._thread is None:
                        self._thread = threading.Thread(target=self._beat_on, name=f"claims {self.owner}", daemon=True)
                        self._thread.start()
                else:
                    self._ids.discard(claim.id)
        return claim if ours else None

    def _is_dead(self, recipe_id: str, shard: str, number: int) -> bool | None:
        """Whether the holder of a claim is dead, or has ended it; None: the claim is gone."""
        folder, key = layout.claims(recipe_id, shard), layout.claim(recipe_id, shard, number)
        before = self._clock()  # were we frozen after reading, the clock would accuse the holder of our own silence
        try:
            data = self.store.read(key)
        except Missing:
            return None
        holder = parse(data)
        with self._changed:
            sight = self._seen.get(folder)
            if sight is None or (sight.key, sight.data) != (key, data):
                self._seen[folder] = sight = _Sight(key, data, self._clock())
            forgotten = holder is not None and holder.owner == self.owner and holder.id not in self._ids
        if holder and (holder.ended or forgotten or alive.certainly_dead(holder.owner)):
            return True
        return before - sight.since >= self._silence_seconds

    # --- beating -----------------------------------------------------------------------------------------------------

    def _beat_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._held, self._beat_seconds)
                if not self._held:
                    self._thread = None
                    return
                held = list(self._held)
            for claim in held:
                try:
                    claim.beat()
                # the store may be back at the next beat; a network's errors have no common class
                except Exception as error:
                    log.warning("no beat of %s could be written: %s", claim.key, error)

    def _drop(self, claim: Claim) -> None:
        with self._changed:
            self._held.remove(claim)
            self._ids.discard(claim.id)
            self._changed.notify_all()


def _numbers(store: Store, recipe_id: str, shard: str) -> list[int]:
    """The numbers of the claims of a shard, rising."""
    matches = map(_NUMBER.fullmatch, store.list(layout.claims(recipe_id, shard)))
    return sorted(int(match[1]) for match in matches if match)
