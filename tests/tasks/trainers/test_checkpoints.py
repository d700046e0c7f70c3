import torch

from tasks.store import Store, layout
from tasks.trainers.checkpoints import KEPT, Record, load, save


def at(step: int) -> tuple[Record, dict[str, torch.Tensor]]:
    return Record(step, 1.5 * step, [0.5], [0.25]), {"weight/a": torch.full((2,), float(step))}


def test_the_latest_is_found_as_it_was_and_old_ones_go(any_store: Store) -> None:
    assert load(any_store, "t") is None
    for step in (3, 6, 9, 12):
        save(any_store, "t", *at(step))
    record, tensors = load(any_store, "t") or (None, None)
    assert record == at(12)[0] and tensors is not None and tensors["weight/a"].tolist() == [12.0, 12.0]
    assert len(any_store.list(layout.checkpoints("t"))) == KEPT


def test_a_damaged_one_is_left_out(any_store: Store) -> None:
    for step in (3, 6):
        save(any_store, "t", *at(step))
    last = any_store.list(layout.checkpoints("t"))[-1]
    any_store.write(last, any_store.read(last)[:-3] + b"abc")
    found = load(any_store, "t")
    assert found and found[0].step == 3


def test_who_is_behind_deletes_nothing_of_who_is_ahead(any_store: Store) -> None:
    for step in (30, 33, 3):
        save(any_store, "t", *at(step))
    found = load(any_store, "t")
    assert found and found[0].step == 33
