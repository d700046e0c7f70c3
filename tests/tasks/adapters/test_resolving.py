"""From what a person types to an adapter: a file, an id, a URL, with a weight or without."""

from dataclasses import replace
from pathlib import Path

import pytest

from tasks.adapters import AdapterError, AdapterNotFound, NotAnAdapter, resolve, resolve_all, write_adapter
from tasks.adapters.cards import forms
from tasks.adapters.resolving import at_hand, load
from tasks.store import Store, layout
from tests.tasks.adapters.loras import facts, small_lora


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA in the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "style.safetensors"
    path.write_bytes(forms(small_lora(), facts())["kohya.safetensors"])
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies from stores that are no folders go here."""
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("typed", "weight"), [("", 1.0), ("=0.8", 0.8), ("=-1", -1.0), ("=1e-1", 0.1)])
def test_a_file_is_meant_wherever_the_worker_begins(file: Path, typed: str, weight: float) -> None:
    found = resolve(f"style.safetensors{typed}")
    assert (found.source, found.weight, found.digest) == (str(file), weight, small_lora().digest)


def test_an_equals_sign_in_a_name_is_no_weight(file: Path) -> None:
    file.rename(file.with_name("lr=high.safetensors"))
    assert resolve("lr=high.safetensors").weight == 1
    assert resolve("lr=high.safetensors=0.5").weight == 0.5


@pytest.mark.usefixtures("cache")
def test_an_adapter_of_the_store_is_meant_by_its_id_or_url(any_store: Store) -> None:
    digest = write_adapter(any_store, small_lora(), facts())
    for named in (digest, digest[:8], digest[:10].upper(), any_store.uri(layout.adapter(digest))):
        found = resolve(f"{named}=0.5", any_store)
        assert (found.digest, found.weight) == (digest, 0.5)
        assert load(found.source, digest).digest == digest
    by_file = resolve(any_store.uri(f"{layout.adapter(digest)}/kohya.safetensors"))
    assert by_file.digest == digest


def test_an_id_that_fits_none_or_several_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for end in "12":
        store.create(layout.adapter_card("abcdef12" + end * 24), b"{}")
    with pytest.raises(AdapterNotFound, match=r"beginning of 2 id in .*: abcdef12111.*give more digits"):
        resolve("abcdef12", store)
    with pytest.raises(AdapterNotFound, match=r"beginning of no id .* among its 2"):
        resolve("0123456789", store)
    with pytest.raises(AdapterNotFound, match="no store was named"):
        resolve("0123456789")
    with pytest.raises(AdapterNotFound, match=r"no file or folder .*style.pt"):
        resolve("style.pt", store)


def test_a_list_is_worn_in_its_order(file: Path) -> None:
    other = file.with_name("other.safetensors")
    other.write_bytes(forms(small_lora(alpha=1), facts())["adapter.safetensors"])
    assert [adapter.weight for adapter in resolve_all("other.safetensors=0.3, style.safetensors", None)] == [0.3, 1.0]
    assert resolve_all(" ", None) == ()
    with pytest.raises(AdapterError, match="named more than once"):
        resolve_all("style.safetensors, style.safetensors=0.5", None)


def test_a_comma_is_a_names_where_a_file_is_called_so(file: Path) -> None:
    data = {alpha: forms(small_lora(alpha=alpha), facts())["adapter.safetensors"] for alpha in (1, 2)}
    for name, alpha in (("a,b.safetensors", 1), ("red, blue, grey.safetensors", 2)):
        file.with_name(name).write_bytes(data[alpha])
    (file.parent / "one, two").mkdir()
    (file.parent / "one, two" / "adapter.safetensors").write_bytes(data[1])

    def named(text: str) -> list[tuple[str, float]]:
        return [(Path(adapter.source).name, adapter.weight) for adapter in resolve_all(text, None)]

    assert named("a,b.safetensors") == [("a,b.safetensors", 1)]
    assert named("style.safetensors=2, a,b.safetensors=0.5 ,red, blue, grey.safetensors=-1") == [
        ("style.safetensors", 2),
        ("a,b.safetensors", 0.5),
        ("red, blue, grey.safetensors", -1),
    ]
    assert named(f"{file.parent}/one, two=0.3,, style.safetensors") == [("one, two", 0.3), ("style.safetensors", 1)]
    with pytest.raises(AdapterNotFound, match="adapter 'a': there is no file"):
        resolve_all("a,c.safetensors", None)


@pytest.mark.parametrize("weight", ["abc", "", "0.8x", "strong"])
def test_what_is_no_weight_is_told(file: Path, weight: str) -> None:
    store = Store(file.parent / "store")
    digest = write_adapter(store, small_lora(), facts())
    for name in ("style.safetensors", digest, digest[:8], f"file://{file}"):
        with pytest.raises(AdapterError, match=rf"'{weight}' is no weight of adapter '{name}': .*{name}=0.8"):
            resolve(f"{name}={weight}", store)
    with pytest.raises(AdapterNotFound, match=r"no file or folder .*/nowhere=abc"):
        resolve("nowhere=abc", store)


@pytest.mark.parametrize("weight", ["1e300", "-10.001", "11"])
def test_a_weight_beyond_all_reason_is_refused(file: Path, weight: str) -> None:
    with pytest.raises(AdapterError, match=f"weight {weight} would leave nothing of the image; use one from -10 to 10"):
        resolve(f"style.safetensors={weight}")
    assert resolve("style.safetensors=-10").weight == -10


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("place", [-1, -200])
def test_an_id_whose_file_was_damaged_is_not_worn_as_another(any_store: Store, place: int) -> None:
    digest = write_adapter(any_store, small_lora(), facts())
    key = f"{layout.adapter(digest)}/adapter.safetensors"
    data = bytearray(any_store.read(key))
    data[place] ^= 1
    any_store.write(key, bytes(data))
    for named in (digest, f"{digest[:8]}=0.5"):
        with pytest.raises(AdapterError, match=rf"{digest} .*other weights, of digest .* backup .*`darkroom verify`"):
            resolve(named, any_store)


@pytest.mark.parametrize("weight", ["0", "-0.0", "nan", "inf"])
def test_a_weight_that_changes_nothing_or_all_is_refused(file: Path, weight: str) -> None:
    with pytest.raises(AdapterError, match=f"weight {weight} changes nothing, or all to nothing"):
        resolve(f"style.safetensors={weight}")


def test_pickled_adapters_are_refused_by_their_beginning(file: Path) -> None:
    file.write_bytes(b"PK" + b"\0" * 100)
    with pytest.raises(NotAnAdapter, match="can run any program"):
        resolve("style.safetensors")


def test_a_store_that_moved_still_has_its_adapters(tmp_path: Path) -> None:
    digest = write_adapter(Store(tmp_path / "before"), small_lora(), facts())
    recorded = resolve(digest, Store(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(AdapterNotFound):
        load(recorded.source)
    found = at_hand(recorded, Store(tmp_path / "after"))
    assert load(found.source, digest).digest == digest and replace(found, source="") == replace(recorded, source="")
    assert at_hand(recorded, Store(tmp_path / "other")) == recorded
