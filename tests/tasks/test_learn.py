"""The files of an adapter, copied out of the store."""

from pathlib import Path

import pytest

from tasks.adapters import read_adapter
from tasks.learn import copy_files
from tasks.release import ReleaseError
from tasks.store import CorruptObject, Store, layout
from tests.tasks.adapters.loras import small_lora, trained


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_adapters_of_one_name_lie_beside_each_other(any_store: Store, tmp_path: Path) -> None:
    to = tmp_path / "to"
    one, two = (trained(any_store, {}, small_lora(alpha=alpha), name="a/b") for alpha in (1, 2))
    copied = [Path(path) for adapter in (one, two) for path in copy_files(any_store, adapter, str(to), "my-style")]
    forms = ("adapter", "kohya")
    assert [path.name for path in copied] == [
        f"my-style-{a[:8]}-{form}.safetensors" for a in (one, two) for form in forms
    ]
    assert [read_adapter(path).digest for path in copied] == [one, one, two, two]
    assert names(to) == sorted(path.name for path in copied)  # and nothing temporary


def test_without_a_name_files_are_called_after_the_adapter(tmp_path: Path) -> None:
    """Whatever its card calls it: what was once a bad name stays there for ever."""
    store = Store(tmp_path / "store")
    adapter = trained(store, {}, name="../elsewhere")
    copied = copy_files(store, adapter, str(tmp_path / "to"))
    assert names(tmp_path / "to") == [Path(path).name for path in copied]
    assert names(tmp_path / "to") == [f"{adapter[:12]}-{form}.safetensors" for form in ("adapter", "kohya")]


@pytest.mark.parametrize("name", ["../x", "a/b", "x" * 300, "/x", ".x"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(ReleaseError, match=r"adapter name .* is not usable"):
        copy_files(store, trained(store, {}), str(tmp_path / "to"), name)
    assert not (tmp_path / "to").exists()


def test_a_damaged_file_is_not_copied_and_what_was_there_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    adapter = trained(store, {})
    first, _ = map(Path, copy_files(store, adapter, str(tmp_path / "to"), "good"))
    before, there = first.read_bytes(), names(tmp_path / "to")
    store.write(f"{layout.adapter(adapter)}/adapter.safetensors", b"cut off")
    with pytest.raises(CorruptObject):
        copy_files(store, adapter, str(tmp_path / "to"), "good")
    assert first.read_bytes() == before and names(tmp_path / "to") == there
