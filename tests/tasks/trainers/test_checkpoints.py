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


def test_a_damaged_one_does_not_keep_a_whole_one_from_being_kept(any_store: Store) -> None:
    for step in (3, 6):
        save(any_store, "t", *at(step))
    last = any_store.list(layout.checkpoints("t"))[-1]
    any_store.write(last, b"cut off")
    assert load(any_store, "t")
    save(any_store, "t", *at(5))  # with another checkpoint_every
    assert [key.rpartition("/")[2][:8] for key in any_store.list(layout.checkpoints("t"))] == ["00000003", "00000005"]


def test_other_files_are_left_alone_and_do_not_count(any_store: Store) -> None:
    folder, strangers = layout.checkpoints("t"), ("00000099.safetensors", "._0001", "notes.txt", "zz-0.safetensors")
    for name in strangers:
        any_store.write(f"{folder}/{name}", b"mine")
    assert load(any_store, "t") is None
    for step in (3, 6, 9):
        save(any_store, "t", *at(step))
    found = load(any_store, "t")
    assert found and found[0].step == 9
    there = [key.rpartition("/")[2] for key in any_store.list(folder)]
    assert set(strangers) < set(there) and len(there) == len(strangers) + KEPT


def test_who_is_behind_deletes_nothing_of_who_is_ahead(any_store: Store) -> None:
    for step in (30, 33, 3):
        save(any_store, "t", *at(step))
    found = load(any_store, "t")
    assert found and found[0].step == 33
