"""Adapters as files: both forms say the same, and files of other tools are read."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tasks.adapters import (
    AdapterError,
    AdapterNotFound,
    ChangesNothing,
    Embeddings,
    Lora,
    NotAnAdapter,
    load_card,
    read_adapter,
    write_adapter,
)
from tasks.adapters.cards import forms
from tasks.identity import sha256
from tasks.store import Missing, Store, layout
from tests.tasks.adapters.loras import facts, small_lora


def read_form(files: dict[str, bytes], name: str, folder: Path) -> Any:
    (folder / name).write_bytes(files[name])
    return read_adapter(folder / name)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# --- both forms ------------------------------------------------------------------------------------------------------

paths = st.sampled_from(
    [
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "unet.up_blocks.1.attentions.2.proj_in",
        "unet.up_blocks.2.resnets.0.time_emb_proj",
        "text_encoder.encoder.layers.3.self_attn.out_proj",
        "text_encoder_2.text_model.encoder.layers.11.mlp.fc1",
        "transformer.transformer_blocks.2.attn.add_q_proj",
        "transformer.single_transformer_blocks.17.proj_out",
        "transformer.proj_out",
    ]
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def loras(draw: st.DrawFn) -> Lora:
    torch.manual_seed(draw(st.integers(0, 1000)))
    tensors, alphas, dtype = {}, {}, draw(dtypes)
    for module in draw(st.lists(paths, min_size=1, max_size=5, unique=True)):
        rank, kernel = draw(st.integers(1, 9)), draw(st.sampled_from([(), (1, 1), (3, 3)]))
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 6, *kernel, dtype=dtype)
        tensors[f"{module}.lora_B.weight"] = torch.randn(5, rank, *(1 for _ in kernel), dtype=dtype)
        alphas[module] = draw(st.floats(1e-3, 1e3))
    return Lora(tensors, alphas)


@given(
    lora=loras(), architecture=st.sampled_from(["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"])
)
def test_both_forms_of_any_lora_read_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, lora: Lora, architecture: str
) -> None:
    folder = tmp_path_factory.mktemp("forms")
    for name, data in forms(lora, facts(architecture=architecture)).items():
        (folder / name).write_bytes(data)
        read = read_adapter(folder / name)
        assert read.alphas == lora.alphas
        assert read.tensors.keys() == lora.tensors.keys()
        assert all(torch.equal(tensor, lora.tensors[key]) for key, tensor in read.tensors.items())
        assert read.digest == lora.digest


def test_a_digest_tells_every_tensor_and_alpha_apart() -> None:
    lora = small_lora()
    seen = {lora.digest}
    for name, tensor in lora.tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1e-6
        seen.add(Lora({**lora.tensors, name: changed}, lora.alphas).digest)
    for module in lora.modules:
        seen.add(Lora(lora.tensors, {**lora.alphas, module: math.nextafter(lora.alphas[module], 99)}).digest)
    assert len(seen) == 1 + len(lora.tensors) + len(lora.alphas)
    assert Lora(dict(reversed(lora.tensors.items())), lora.alphas).digest == lora.digest


def test_old_and_new_names_of_a_text_encoder_are_one_adapter() -> None:
    old, new = (
        small_lora(text=f"text_encoder.{nested}encoder.layers.0.self_attn.q_proj") for nested in ("text_model.", "")
    )
    assert old.digest == new.digest
    assert "text_encoder.encoder.layers.0.self_attn.q_proj" in old.modules


@pytest.mark.parametrize("encoders", [1, 2])
def test_both_forms_of_a_textual_inversion_read_as_the_same(tmp_path: Path, encoders: int) -> None:
    learned = Embeddings({"<c1>": [torch.randn(3, 8 * (i + 1)) for i in range(encoders)]})
    files = forms(learned, facts(kind="textual_inversion", trigger="<c1>"))
    assert {read_form(files, name, tmp_path).digest for name in files} == {learned.digest}
    assert read_form(files, "emb_params.safetensors", tmp_path).tokens.keys() == {"<c1>"}


# --- in the store ----------------------------------------------------------------------------------------------------


def test_an_adapter_is_there_when_its_card_is(any_store: Store) -> None:
    lora = small_lora()
    learned_from = [{"dataset": "demo", "version": 3, "images": 12}]
    digest = write_adapter(any_store, lora, facts(learned_from=learned_from, generation_depth=2))
    card = load_card(any_store, digest)
    assert digest == card["digest"] == lora.digest
    assert (card["learned_from"], card["generation_depth"]) == (learned_from, 2)
    assert [file["key"].rsplit("/")[-1] for file in card["files"]] == ["adapter.safetensors", "kohya.safetensors"]
    for file in card["files"]:
        assert any_store.read(file["key"], file["sha256"])
    assert write_adapter(any_store, lora, facts(seconds=99)) == digest
    assert load_card(any_store, digest) == card


def test_a_writer_that_was_killed_before_its_card_is_finished_by_another(tmp_path: Path) -> None:
    store, lora = Store(tmp_path), small_lora()
    digest = write_adapter(store, lora, facts(training="first"))
    store.delete(layout.adapter_card(digest))
    store.delete(f"{layout.adapter(digest)}/kohya.safetensors")
    with pytest.raises(Missing):
        load_card(store, digest)
    write_adapter(store, lora, facts(training="second"))
    assert all(store.read(file["key"], file["sha256"]) for file in load_card(store, digest)["files"])


def test_headers_say_what_other_tools_show(tmp_path: Path) -> None:
    lora = small_lora(rank=4, alpha=2.5)
    store = Store(tmp_path)
    write_adapter(
        store,
        lora,
        facts(
            settings={"learning_rate": 1e-4, "min_snr_gamma": 5.0, "dtype": "bfloat16"},
            header={"ss_bucket_info": {"0": 1}},
        ),
    )
    folder = tmp_path / layout.adapter(lora.digest)
    kohya = header(folder / "kohya.safetensors")
    assert kohya["ss_network_module"] == "networks.lora"
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"]) == ("4", "2.5")
    assert (kohya["ss_learning_rate"], kohya["ss_min_snr_gamma"]) == ("0.0001", "5.0")
    assert json.loads(kohya["ss_bucket_info"]) == {"0": 1}
    assert kohya["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (kohya["ss_v2"], kohya["ss_mixed_precision"]) == ("False", "bf16")
    assert kohya["modelspec.prediction_type"] == "v"
    assert kohya["modelspec.trigger_phrase"] == "a photo of sks"
    data = (folder / "kohya.safetensors").read_bytes()
    begin = int.from_bytes(data[:8], "little") + 8
    assert kohya["sshs_model_hash"] == sha256(data[begin:])
    assert len(kohya["sshs_legacy_hash"]) == 8
    for name in ("adapter.safetensors", "kohya.safetensors"):
        ours = header(folder / name)
        assert ours["darkroom.digest"] == lora.digest
        assert ours["darkroom.base_digest"] == "b" * 32
        assert json.loads(ours["darkroom.learned_from"])[0]["dataset"] == "demo"


@pytest.mark.parametrize(
    ("architecture", "width", "prediction", "named"),
    [
        ("StableDiffusionPipeline", 768, "epsilon", "stable-diffusion-v1"),
        ("StableDiffusionPipeline", 1024, "epsilon", "stable-diffusion-v2-512"),
        ("StableDiffusionPipeline", 1024, "v_prediction", "stable-diffusion-v2-768-v"),
        ("StableDiffusionXLPipeline", 2048, "epsilon", "stable-diffusion-xl-v1-base"),
        ("FluxPipeline", 4096, "flow_prediction", "flux-1-dev"),
    ],
)
def test_the_base_model_is_named_as_others_name_it(
    tmp_path: Path, architecture: str, width: int, prediction: str, named: str
) -> None:
    files = forms(small_lora(width=width), facts(architecture=architecture, prediction_type=prediction))
    (tmp_path / "a.safetensors").write_bytes(files["kohya.safetensors"])
    assert header(tmp_path / "a.safetensors")["modelspec.architecture"] == f"{named}/lora"


# --- files of others -------------------------------------------------------------------------------------------------

MODULE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
DOWN, UP = torch.arange(12.0).reshape(2, 6), torch.arange(10.0).reshape(5, 2)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"),
        (f"{MODULE}.lora.down.weight", f"{MODULE}.lora.up.weight"),
        (f"{MODULE}.lora_A.default.weight", f"{MODULE}.lora_B.default.weight"),
        (
            f"{MODULE.replace('attn2.', 'attn2.processor.')}_lora.down.weight",
            f"{MODULE.replace('attn2.', 'attn2.processor.')}_lora.up.weight",
        ),
        (f"base_model.model.{MODULE[5:]}.lora_A.weight", f"base_model.model.{MODULE[5:]}.lora_B.weight"),
        (f"{MODULE[5:]}.lora_A.weight", f"{MODULE[5:]}.lora_B.weight"),
        (
            f"lora_unet_{MODULE[5:].replace('.', '_')}.lora_down.weight",
            f"lora_unet_{MODULE[5:].replace('.', '_')}.lora_up.weight",
        ),
        (
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_up.weight",
        ),
    ],
)
def test_a_module_is_known_by_all_its_names(tmp_path: Path, down: str, up: str) -> None:
    save_file({down: DOWN, up: UP}, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    assert isinstance(read, Lora)
    assert read.alphas == {MODULE: 2.0}  # no alpha in the file: the rank
    assert torch.equal(read.tensors[f"{MODULE}.lora_A.weight"], DOWN)
    assert torch.equal(read.tensors[f"{MODULE}.lora_B.weight"], UP)


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.{}.weight",
        "text_encoder.encoder.layers.0.self_attn.q_proj.{}.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.{}.weight",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.{}.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.{}.weight",
    ],
)
def test_text_encoders_are_known_by_old_and_new_names(tmp_path: Path, key: str) -> None:
    down, up = ("down", "up") if "linear_layer" in key else ("lora_down", "lora_up")
    save_file({key.format(down): DOWN, key.format(up): UP}, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").alphas == {"text_encoder.encoder.layers.0.self_attn.q_proj": 2.0}


@pytest.mark.parametrize(
    ("configuration", "alpha"),
    [
        ({"r": 2, "lora_alpha": 16}, 16.0),
        ({"unet.r": 2, "unet.lora_alpha": 3}, 3.0),
        ({"lora_alpha": 16, "alpha_pattern": {"attn2.to_k": 5}}, 5.0),
        ({"lora_alpha": 16, "alpha_pattern": {"attn1.to_k": 5}}, 16.0),
        ({"lora_alpha": 16, "use_rslora": True}, 16 * math.sqrt(2)),
    ],
)
def test_alpha_is_what_pefts_configuration_says(tmp_path: Path, configuration: dict[str, Any], alpha: float) -> None:
    tensors = {f"{MODULE}.lora_A.weight": DOWN, f"{MODULE}.lora_B.weight": UP}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(configuration)})
    assert read_adapter(tmp_path / "a.safetensors").alphas == {MODULE: alpha}


def test_pefts_folder_is_read_with_its_configuration(tmp_path: Path) -> None:
    bare = MODULE.removeprefix("unet.")
    tensors = {f"base_model.model.{bare}.lora_A.weight": DOWN, f"base_model.model.{bare}.lora_B.weight": UP}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 7}))
    assert read_adapter(tmp_path).alphas == {MODULE: 7.0}


def test_kohyas_flux_keeps_q_k_and_v_in_one_tensor(tmp_path: Path) -> None:
    fused = torch.arange(14.0)[:, None] * torch.ones(1, 2)
    save_file(
        {
            "lora_unet_single_blocks_3_linear1.lora_down.weight": DOWN,
            "lora_unet_single_blocks_3_linear1.lora_up.weight": fused,
            "lora_unet_single_blocks_3_linear1.alpha": torch.tensor(1.0),
            "lora_unet_double_blocks_0_txt_attn_qkv.lora_down.weight": DOWN.clone(),
            "lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight": fused[:6].clone(),
        },
        tmp_path / "flux.safetensors",
    )
    read = read_adapter(tmp_path / "flux.safetensors")
    single, double = "transformer.single_transformer_blocks.3", "transformer.transformer_blocks.0.attn"
    assert read.alphas == {
        **{f"{single}.{part}": 1.0 for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
        **{f"{double}.add_{part}_proj": 2.0 for part in "qkv"},
    }
    assert torch.equal(read.tensors[f"{single}.attn.to_v.lora_B.weight"], fused[4:6])
    assert torch.equal(read.tensors[f"{single}.proj_mlp.lora_B.weight"], fused[6:])
    assert torch.equal(read.tensors[f"{double}.add_k_proj.lora_B.weight"], fused[2:4])
    assert (
        read_form(forms(read, facts(architecture="FluxPipeline")), "kohya.safetensors", tmp_path).digest == read.digest
    )


def test_textual_inversions_of_others_are_known_by_their_files_name(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 8)}, tmp_path / "pencil.safetensors")
    save_file({"clip_g": torch.ones(2, 9), "clip_l": torch.zeros(2, 8)}, tmp_path / "ink.safetensors")
    save_file({"<cat>": torch.ones(8)}, tmp_path / "learned_embeds.safetensors")
    shapes = {
        token: [tuple(vector.shape) for vector in vectors]
        for file in tmp_path.iterdir()
        for token, vectors in read_adapter(file).tokens.items()
    }
    assert shapes == {"pencil": [(2, 8)], "ink": [(2, 8), (2, 9)], "<cat>": [(1, 8)]}


# --- what is no adapter ----------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    tensors = {f"{MODULE}.lora_A.weight": DOWN, f"{MODULE}.lora_B.weight": UP}
    for name in ("a.bin", "renamed.safetensors"):
        torch.save(tensors, tmp_path / name)
        with pytest.raises(NotAnAdapter, match=r"is pickled: .* allow_pickle=True"):
            read_adapter(tmp_path / name)
        assert read_adapter(tmp_path / name, allow_pickle=True).alphas == {MODULE: 2.0}


def test_a_safetensors_file_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    """A header of 640, 896, 1152 … bytes makes it begin as a pickle does."""
    tensors = {f"{MODULE}.lora_A.weight": DOWN, f"{MODULE}.lora_B.weight": UP}
    begins = set()
    for length in range(0, 1200, 8):
        save_file(tensors, tmp_path / "a.safetensors", {"note": "x" * length})
        begins.add((tmp_path / "a.safetensors").read_bytes()[:2])
        assert read_adapter(tmp_path / "a.safetensors").alphas == {MODULE: 2.0}
    assert {b"\x80\x02", b"\x80\x03", b"\x80\x04"} <= begins


def test_no_program_runs_from_a_pickle_that_is_allowed(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Program()}, tmp_path / "a.pt")
    with pytest.raises(NotAnAdapter, match="does not unpickle to tensors"):
        read_adapter(tmp_path / "a.pt", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named_with_its_size(tmp_path: Path, keep: int) -> None:
    whole = forms(small_lora(), facts())["kohya.safetensors"]
    (tmp_path / "a.safetensors").write_bytes(whole[:keep])
    with pytest.raises(
        NotAnAdapter, match=rf"a.safetensors \({len(whole[:keep])} bytes\) is no whole safetensors file"
    ):
        read_adapter(tmp_path / "a.safetensors")


Tensors = dict[str, torch.Tensor]
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another key": (lambda t: {**t, "unet.conv_in.weight": DOWN}, r"1 of its 9 tensors .*unet.conv_in.weight"),
    "DoRA": (lambda t: {**t, f"{MODULE}.dora_scale": DOWN}, "this is DoRA"),
    "LoHa": (lambda t: {f"{MODULE}.hada_w1_a": DOWN}, "this is LoHa"),
    "one half": (lambda t: dict(list(t.items())[1:]), "have no counterpart"),
    "ranks": (lambda t: {k: v[:1] if "lora_A" in k else v for k, v in t.items()}, "contradict each other"),
    "unknown module": (
        lambda t: {"what.is.this.lora_A.weight": DOWN, "what.is.this.lora_B.weight": UP},
        "what.is.this",
    ),
    "whole weights": (lambda t: {"unet.conv_in.weight": DOWN}, "not a LoRA's"),
    "nothing": (lambda t: {}, "0 of its 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_lora_is_named(tmp_path: Path, case: str) -> None:
    change, said = BROKEN[case]
    save_file(change(small_lora().tensors), tmp_path / "a.safetensors")
    with pytest.raises(NotAnAdapter, match=said):
        read_adapter(tmp_path / "a.safetensors")


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(AdapterNotFound, match=str(path)):
            read_adapter(path)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "alpha", "nan"])
def test_an_adapter_that_changes_nothing_is_not_stored(tmp_path: Path, part: str) -> None:
    lora = small_lora()
    tensors = {key: tensor * 0 if part in key else tensor for key, tensor in lora.tensors.items()}
    if part == "nan":
        tensors = {key: tensor * float("nan") for key, tensor in tensors.items()}
    useless = Lora(tensors, dict.fromkeys(lora.alphas, 0.0) if part == "alpha" else lora.alphas)
    with pytest.raises(ChangesNothing, match="NaN or infinity" if part == "nan" else "changes nothing: .*to_k"):
        write_adapter(Store(tmp_path), useless, facts())
    assert not Store(tmp_path).list("")


def test_textual_inversions_are_stored_one_by_one(tmp_path: Path) -> None:
    two = Embeddings({"<a>": [torch.ones(1, 4)], "<b>": [torch.ones(1, 4)]})
    with pytest.raises(AdapterError, match="one by one"):
        write_adapter(Store(tmp_path), two, facts())
