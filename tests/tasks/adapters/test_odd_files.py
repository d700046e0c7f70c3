"""Files made by hand, or damaged: each is refused with what is wrong with which key."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tasks.adapters import AdapterError, Embeddings, Lora, NotAnAdapter, cards, read_adapter, write_adapter
from tasks.adapters.cards import forms
from tasks.adapters.reading import RESERVED
from tasks.learn import SettingsError, settings_for
from tasks.store import Store
from tests.tasks.adapters.loras import facts, small_lora

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
WHERE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
OTHER = "lora_unet_mid_block_attentions_0_proj_in"


def file(folder: Path, header: dict[str, str] | None = None, **parts: torch.Tensor) -> Path:
    """A LoRA of one sound module and one with these tensors instead of its own."""
    tensors = {}
    for name, own in ((MODULE, parts), (OTHER, {})):
        whole = {"lora_down": torch.ones(2, 6), "lora_up": torch.ones(5, 2), "alpha": torch.tensor(1.0), **own}
        tensors |= {f"{name}.{part}" + ".weight" * (part != "alpha"): tensor for part, tensor in whole.items()}
    if header:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}
    save_file(tensors, folder / "odd.safetensors", header)
    return folder / "odd.safetensors"


ALPHA = rf"{MODULE}\.alpha is"
ODD: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "alpha is NaN": ({"alpha": torch.tensor(math.nan)}, rf"{ALPHA} nan; expected one finite number"),
    "alpha is infinite": ({"alpha": torch.tensor(-math.inf)}, rf"{ALPHA} -inf; expected one finite"),
    "two alphas": ({"alpha": torch.tensor([1.0, 2.0])}, rf"{ALPHA} \[1.0, 2.0\]; expected one finite"),
    "many alphas": ({"alpha": torch.ones(1000)}, rf"{ALPHA} \[1.0, .*…; expected one finite"),
    "no alpha in its tensor": ({"alpha": torch.ones(0)}, rf"{ALPHA} \[\]; expected one finite"),
    "up is a number": ({"lora_up": torch.tensor(1.0)}, rf"{MODULE}.lora_up.weight has shape \(\)"),
    "down is a number": ({"lora_down": torch.tensor(1.0)}, rf"{MODULE}.lora_down.weight has shape \(\)"),
    "up is a row": ({"lora_up": torch.ones(5)}, rf"{MODULE}.lora_up.weight has shape \(5,\)"),
    "down is a row": ({"lora_down": torch.ones(2)}, rf"{MODULE}.lora_down.weight has shape \(2,\)"),
    "rank 0": (
        {"lora_up": torch.ones(5, 0), "lora_down": torch.ones(0, 6)},
        rf"{MODULE}.lora_\w+.weight has shape \([05], .*none of size zero",
    ),
    "up with a kernel": ({"lora_up": torch.ones(5, 2, 3, 3)}, rf"{WHERE}.lora_B.weight \(lora_up\) has shape .*kernel"),
    "up with an even kernel": ({"lora_up": torch.ones(5, 2, 2, 2)}, r"has shape \(5, 2, 2, 2\); expected \[out, rank"),
    "quantised": ({"lora_up": torch.ones(5, 2, dtype=torch.int8)}, rf"{MODULE}.lora_up.weight holds torch.int8"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_tensors_are_named(tmp_path: Path, case: str) -> None:
    parts, said = ODD[case]
    with pytest.raises(NotAnAdapter, match=rf"adapter .*odd.safetensors: .*{said}"):
        read_adapter(file(tmp_path, **parts))


def test_an_alpha_without_weights_is_not_dropped(tmp_path: Path) -> None:
    tensors = {f"{MODULE}.lora_down.weight": torch.ones(2, 6), f"{MODULE}.lora_up.weight": torch.ones(5, 2)}
    save_file({**tensors, f"{OTHER}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(
        NotAnAdapter, match=r"of its modules, 1 have an alpha and no weights \(unet.mid_block.*proj_in\)"
    ):
        read_adapter(tmp_path / "a.safetensors")


def test_a_module_that_is_there_twice_is_not_read_half(tmp_path: Path) -> None:
    """As two tools name it: the later of the two would be worn in silence, or halves of both."""
    tensors = {f"{MODULE}.lora_down.weight": torch.ones(2, 6), f"{MODULE}.lora_up.weight": torch.ones(5, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    (module,) = read_adapter(tmp_path / "a.safetensors").modules
    for again in (f"{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"):
        like = tensors[f"{MODULE}.lora_{'down' if 'A' in again else 'up'}.weight"].clone()
        save_file({**tensors, again: like}, tmp_path / "a.safetensors")
        with pytest.raises(
            NotAnAdapter, match=r"weight is of unet\..*, as another of its tensors is: .*take them apart"
        ):
            read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("configuration", "said"),
    [
        ("[1,2]", r"lora_adapter_metadata\) is \[1, 2\]; expected a JSON object"),
        ('[["r", 2]]', "expected a JSON object"),
        ("5", r"is 5; expected a JSON object"),
        ("null", r"is None; expected a JSON object"),
        ("[" * 200_000, "is not readable JSON"),
        ('{"lora_alpha": NaN}', "lora_alpha in its configuration is nan; expected one finite"),
        ('{"lora_alpha": -Infinity}', "lora_alpha .* is -inf"),
        (f'{{"lora_alpha": {"9" * 400}}}', "lora_alpha .* is 999.*…; expected one finite"),
        ('{"unet.lora_alpha": "many"}', "lora_alpha .* is 'many'"),
        ('{"lora_alpha": [8]}', r"lora_alpha .* is \[8\]"),
        ('{"alpha_pattern": ["to_k"]}', r"alpha_pattern .* is \['to_k'\]; expected names with their alphas"),
        ('{"alpha_pattern": {"to_k(": 5}}', r"alpha_pattern .* has 'to_k\(', which is no regular expression"),
        ('{"alpha_pattern": {"a{99999999999}": 5}}', "alpha_pattern .* which is no regular expression"),
        ('{"alpha_pattern": {"attn2.to_k": "x"}}', "alpha_pattern of 'attn2.to_k' .* is 'x'"),
    ],
)
def test_an_odd_configuration_is_named(tmp_path: Path, configuration: str, said: str) -> None:
    with pytest.raises(NotAnAdapter, match=rf"adapter .*odd.safetensors: .*{said}"):
        read_adapter(file(tmp_path, {"lora_adapter_metadata": configuration}))


def test_an_alpha_that_is_no_number_makes_no_lora() -> None:
    lora = small_lora()
    for alpha in (math.nan, math.inf):
        with pytest.raises(NotAnAdapter, match=rf"alpha of {WHERE} is {alpha}"):
            Lora(lora.tensors, {**lora.alphas, WHERE: alpha})


def test_a_kernel_of_one_is_none(tmp_path: Path) -> None:
    read = read_adapter(file(tmp_path, lora_up=torch.ones(5, 2, 1, 1), alpha=torch.ones(1)))
    assert isinstance(read, Lora) and read.alphas[WHERE] == 1


@pytest.mark.parametrize("vectors", [torch.tensor(1.0), torch.ones(0, 8), torch.ones(2, 8, dtype=torch.int32)])
def test_odd_vectors_are_named(tmp_path: Path, vectors: torch.Tensor) -> None:
    save_file({"<cat>": vectors}, tmp_path / "a.safetensors")
    with pytest.raises(NotAnAdapter, match=r"placeholder '<cat>' has vectors of .*expected"):
        read_adapter(tmp_path / "a.safetensors")


# --- what a word may be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["<style.v2>", "style.v2", "sks.alpha", "unet.conv_in.lora_A.weight", "größe"])
@pytest.mark.parametrize("encoders", [1, 2])
def test_a_placeholder_that_looks_like_a_module_is_read_again(tmp_path: Path, word: str, encoders: int) -> None:
    learned = Embeddings({word: [torch.ones(2, 8)] * encoders})
    for name, data in forms(learned, facts(kind="textual_inversion")).items():
        (tmp_path / name).write_bytes(data)
        assert read_adapter(tmp_path / name).digest == learned.digest
    assert write_adapter(Store(tmp_path / "store"), learned, facts()) == learned.digest


def test_a_marked_placeholder_of_others_may_have_a_dot(tmp_path: Path) -> None:
    save_file({"<style.v2>": torch.ones(2, 8)}, tmp_path / "learned_embeds.safetensors")
    read = read_adapter(tmp_path)
    assert isinstance(read, Embeddings) and read.tokens.keys() == {"<style.v2>"}


@pytest.mark.parametrize("word", RESERVED)
def test_a_word_that_files_use_is_no_placeholder(tmp_path: Path, word: str) -> None:
    for encoders in (1, 2):
        with pytest.raises(AdapterError, match=rf"placeholder '{word}' means something else .*<my-style>"):
            write_adapter(Store(tmp_path), Embeddings({word: [torch.ones(2, 8)] * encoders}), facts())
    assert not Store(tmp_path).list("")
    with pytest.raises(SettingsError, match=rf"placeholder: .*{word}; choose another, such as <my-style>"):
        settings_for("data/models/tiny-sd", f"method=textual_inversion, text_encoder=false, placeholder={word}")


@pytest.mark.parametrize("broken", [{"a.weight": torch.ones(2)}, None])
def test_what_would_not_be_read_again_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: dict[str, Any] | None
) -> None:
    """None: in the other tools' form its module gets another name, since nobody knows where its words end."""
    lora = small_lora()
    if broken:
        monkeypatch.setattr(cards, "_lora_kohya", lambda *_: broken)
    else:
        tensors = {name.replace("attn2.to_k", "my_own.part"): tensor for name, tensor in lora.tensors.items()}
        lora = Lora(tensors, {name.replace("attn2.to_k", "my_own.part"): alpha for name, alpha in lora.alphas.items()})
    with pytest.raises(
        AdapterError, match=r"was not stored: its kohya.safetensors would be read (not at all|as adapter)"
    ):
        write_adapter(Store(tmp_path), lora, facts())
    assert not Store(tmp_path).list("")


def test_a_file_that_is_not_whole_is_none_in_memory() -> None:
    from tasks.adapters.reading import adapter_in

    data = forms(small_lora(), facts())["adapter.safetensors"]
    assert adapter_in(data, "a.safetensors").digest == small_lora().digest
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    with pytest.raises(NotAnAdapter, match=r"a.safetensors \(\d+ bytes\) is no safetensors file"):
        adapter_in(data[:-1], "a.safetensors")
