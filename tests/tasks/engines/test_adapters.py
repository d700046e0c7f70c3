"""What images are like with adapters: those of plain diffusers, of either file, and without them the model's own again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.adapters import ChangesNothing, DoesNotFit, Embeddings, Lora, NotAnAdapter, resolve
from tasks.adapters.cards import forms
from tasks.adapters.errors import AdapterError
from tasks.engines import Order, Recipe
from tasks.engines.diffusers import DiffusersEngine, default_recipe
from tests.tasks.adapters.loras import facts, random_lora

BATCH = 2
SIZE = {"width": 16, "height": 16}
ORDERS = [Order("a large red circle", "", 1), Order("two blue squares", "grey", 2)]
ARCHITECTURES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}
DENOISER = {"sd15": "unet", "sdxl": "unet", "flux": "transformer", "sd3": "transformer"}
CLIP = {"sd15": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2"), "flux": ("text_encoder",)}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "q_proj", "v_proj", "fc1")

Models = Callable[[str], str]

pytestmark = pytest.mark.usefixtures("one_thread")


def pipeline_of(model: str) -> Any:
    from diffusers import AutoPipelineForText2Image

    return AutoPipelineForText2Image.from_pretrained(model)


def save(lora: Lora | Embeddings, shape: str, folder: Path) -> dict[str, Path]:
    """Both files of an adapter, by name."""
    paths = {}
    for name, data in forms(lora, facts(architecture=ARCHITECTURES[shape])).items():
        paths[name] = folder / name
        paths[name].write_bytes(data)
    return paths


def worn(recipe: Recipe, *named: str | Path) -> Recipe:
    return replace(recipe, adapters=tuple(resolve(str(name)) for name in named))


def small(shape: str, model: str) -> Recipe:
    return default_recipe(model, sampler="euler" if shape in ("flux", "sd3") else "ddim", steps=2, **SIZE)


@pytest.fixture(scope="module")
def engine(tiny: Models) -> DiffusersEngine:
    return DiffusersEngine(tiny("sd15"), "float32", BATCH)


@pytest.fixture(scope="module")
def recipe(tiny: Models) -> Recipe:
    return small("sd15", tiny("sd15"))


@pytest.fixture
def lora(tiny: Models, tmp_path: Path) -> Path:
    """On all of the UNet and the text encoder of the tiny Stable Diffusion."""
    lora = random_lora(pipeline_of(tiny("sd15")), ("unet", "text_encoder"), only=ATTENTION)
    return save(lora, "sd15", tmp_path)["adapter.safetensors"]


# --- both files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ARCHITECTURES)
def test_both_files_make_the_same_pixels(tiny: Models, tmp_path: Path, shape: str) -> None:
    model = tiny(shape)
    lora = random_lora(pipeline_of(model), (DENOISER[shape], *CLIP[shape]))
    ours, theirs = save(lora, shape, tmp_path).values()
    engine, recipe = DiffusersEngine(model, "float32", BATCH), small(shape, model)
    base = engine.generate(ORDERS, recipe).pixels
    made = engine.generate(ORDERS, worn(recipe, ours)).pixels
    assert (made != base).any(axis=(1, 2, 3)).all()
    assert worn(recipe, ours).recipe_id == worn(recipe, theirs).recipe_id
    assert np.array_equal(DiffusersEngine(model, "float32", BATCH).generate(ORDERS, worn(recipe, theirs)).pixels, made)
    assert np.array_equal(engine.generate(ORDERS, recipe).pixels, base)


@pytest.mark.parametrize("form", ["adapter.safetensors", "kohya.safetensors"])
@pytest.mark.parametrize("shape", ARCHITECTURES)
def test_plain_diffusers_makes_the_same_images(tiny: Models, tmp_path: Path, shape: str, form: str) -> None:
    model = tiny(shape)
    pipeline = pipeline_of(model)
    # of Kohya's names, diffusers reads one alpha for all modules, and of Flux's modules those of attention
    lora = random_lora(pipeline, (DENOISER[shape],), only=ATTENTION[:4] if shape == "flux" else ATTENTION)
    if form == "kohya.safetensors":
        lora = Lora(lora.tensors, dict.fromkeys(lora.alphas, 1.3))
    file = save(lora, shape, tmp_path)[form]
    recipe = worn(small(shape, model), file)
    wanted = [replace(order, negative_prompt="") for order in ORDERS]
    made = DiffusersEngine(model, "float32", BATCH).generate(wanted, recipe).pixels

    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    plain = pipeline(
        [order.prompt for order in wanted],
        generator=[torch.Generator().manual_seed(order.seed) for order in wanted],
        num_inference_steps=2,
        guidance_scale=recipe.guidance,
        output_type="np",
        **SIZE,
    ).images
    assert np.abs(made - plain * 255).max() < 0.51


def test_what_a_lora_adds_is_alpha_by_rank(
    tiny: Models, engine: DiffusersEngine, recipe: Recipe, tmp_path: Path
) -> None:
    """Against weights to which the product was added by hand: alpha and rank differ, and vary from module to module."""
    pipeline = pipeline_of(tiny("sd15"))
    lora = random_lora(pipeline, ("unet", "text_encoder"), only=ATTENTION)
    for module in lora.modules:
        component, _, path = module.partition(".")
        weight = getattr(pipeline, component).get_submodule(path).weight
        up, down = lora.tensors[f"{module}.lora_B.weight"], lora.tensors[f"{module}.lora_A.weight"]
        weight.data += lora.alphas[module] / lora.rank(module) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    pipeline.save_pretrained(tmp_path / "merged")
    merged = DiffusersEngine(str(tmp_path / "merged"), "float32", BATCH)
    by_hand = merged.generate(ORDERS, replace(recipe, model_digest=merged.digest)).pixels
    made = engine.generate(ORDERS, worn(recipe, save(lora, "sd15", tmp_path)["kohya.safetensors"])).pixels
    assert np.abs(made.astype(int) - by_hand).max() <= 1  # summed in another order


def add_as_kohyas_tools_do(file: Path, pipeline: Any, prefixes: dict[str, str]) -> list[str]:
    """Add alpha / rank · up · down to the modules that a file names; returns the keys that name none."""
    tensors = load_file(file)
    for component, prefix in prefixes.items():
        for path, module in getattr(pipeline, component).named_modules():
            old = path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"
            name = f"{prefix}_{old.replace('.', '_')}"
            if f"{name}.lora_up.weight" in tensors:
                up, down = (tensors.pop(f"{name}.lora_{part}.weight") for part in ("up", "down"))
                scale = float(tensors.pop(f"{name}.alpha")) / down.shape[0]
                module.weight.data += scale * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    return list(tensors)


@pytest.mark.parametrize(
    ("shape", "prefixes"),
    [
        ("sd15", {"unet": "lora_unet", "text_encoder": "lora_te"}),
        ("sdxl", {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}),
    ],
)
def test_kohyas_tools_make_the_same_images(tiny: Models, tmp_path: Path, shape: str, prefixes: dict[str, str]) -> None:
    model = tiny(shape)
    pipeline = pipeline_of(model)
    lora = random_lora(pipeline, ("unet", *CLIP[shape]), only=ATTENTION)
    files = save(lora, shape, tmp_path)
    assert add_as_kohyas_tools_do(files["kohya.safetensors"], pipeline, prefixes) == []
    pipeline.save_pretrained(tmp_path / "merged")
    merged = DiffusersEngine(str(tmp_path / "merged"), "float32", BATCH)
    recipe = small(shape, model)
    theirs = merged.generate(ORDERS, replace(recipe, model_digest=merged.digest)).pixels
    engine = DiffusersEngine(model, "float32", BATCH)
    made = engine.generate(ORDERS, worn(recipe, files["adapter.safetensors"])).pixels
    assert np.abs(made.astype(int) - theirs).max() <= 1  # summed in another order
    assert (made != engine.generate(ORDERS, recipe).pixels).any()


# --- on and off ------------------------------------------------------------------------------------------------------


def test_the_base_is_bit_equal_after_taking_off(engine: DiffusersEngine, recipe: Recipe, lora: Path) -> None:
    pixels = engine.generate(ORDERS, recipe).pixels
    components = (engine._pipeline.unet, engine._pipeline.text_encoder)
    before = [{name: t.clone() for name, t in part.state_dict().items()} for part in components]
    names = [[name for name, _ in part.named_modules()] for part in components]
    engine.generate(ORDERS, worn(recipe, lora))
    assert np.array_equal(engine.generate(ORDERS, recipe).pixels, pixels)
    assert [[name for name, _ in part.named_modules()] for part in components] == names
    for part, tensors in zip(components, before, strict=True):
        after = part.state_dict()
        assert after.keys() == tensors.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


def test_the_weight_scales_what_is_added(engine: DiffusersEngine, recipe: Recipe, lora: Path) -> None:
    half, whole = (engine.generate(ORDERS, worn(recipe, f"{lora}={weight}")).pixels for weight in (0.5, 1))
    assert (half != whole).any()
    tensors = load_file(lora)
    save_file(
        {name: tensor * 0.5 if "lora_B" in name else tensor for name, tensor in tensors.items()},
        lora.with_name("half.safetensors"),
        _metadata(lora),
    )
    by_file = engine.generate(ORDERS, worn(recipe, lora.with_name("half.safetensors"))).pixels
    assert np.abs(by_file.astype(int) - half).max() <= 1


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_several_adapters_add_up(tiny: Models, engine: DiffusersEngine, recipe: Recipe, tmp_path: Path) -> None:
    """One on the UNet and one on both, against one LoRA whose rank is both ranks together."""
    pipeline = pipeline_of(tiny("sd15"))
    first = random_lora(pipeline, ("unet",), only=("to_q", "to_k"), seed=1)
    second = random_lora(pipeline, ("unet", "text_encoder"), only=("to_k", "to_v", "q_proj"), seed=2)
    tensors, alphas = {}, {}
    for module in {*first.modules, *second.modules}:
        parts = [(one, weight) for one, weight in ((first, 1.0), (second, 0.5)) if module in one.alphas]
        downs = [one.tensors[f"{module}.lora_A.weight"] for one, _ in parts]
        ups = [one.tensors[f"{module}.lora_B.weight"] * w * one.alphas[module] / one.rank(module) for one, w in parts]
        tensors |= {f"{module}.lora_A.weight": torch.cat(downs), f"{module}.lora_B.weight": torch.cat(ups, 1)}
        alphas[module] = float(sum(map(len, downs)))
    paths = []
    for name, one in (("first", first), ("second", second), ("both", Lora(tensors, alphas))):
        (tmp_path / name).mkdir()
        paths.append(save(one, "sd15", tmp_path / name)["adapter.safetensors"])
    both = engine.generate(ORDERS, worn(recipe, paths[0], f"{paths[1]}=0.5")).pixels
    as_one = engine.generate(ORDERS, worn(recipe, paths[2])).pixels
    assert np.abs(both.astype(int) - as_one).max() <= 1
    assert (both != engine.generate(ORDERS, worn(recipe, paths[0])).pixels).any()


def test_recipes_that_alternate_do_not_disturb_each_other(engine: DiffusersEngine, recipe: Recipe, lora: Path) -> None:
    recipes = [recipe, worn(recipe, lora), worn(recipe, f"{lora}=0.5"), worn(recipe, f"{lora}=-1")]
    first = [engine.generate(ORDERS, one).pixels for one in recipes]
    assert len({pixels.tobytes() for pixels in first}) == len(recipes)
    for _ in range(2):
        for one, pixels in zip(recipes, first, strict=True):
            engine.prepare([(order.prompt, order.negative_prompt) for order in ORDERS], one.adapters)
            assert np.array_equal(engine.generate(ORDERS, one).pixels, pixels)


def test_two_that_alternate_are_read_once(engine: DiffusersEngine, recipe: Recipe, lora: Path) -> None:
    """A champion and its challenger."""
    two = [worn(recipe, f"{lora}={weight}") for weight in (0.9, 0.4)]
    first = [engine.generate(ORDERS, one).pixels for one in two]
    lora.unlink()
    for _ in range(2):
        for one, pixels in zip(two, first, strict=True):
            assert np.array_equal(engine.generate(ORDERS, one).pixels, pixels)


def test_a_recipe_without_adapters_keeps_its_id(recipe: Recipe, lora: Path) -> None:
    assert "adapters" not in recipe.identity()
    assert recipe.recipe_id != worn(recipe, lora).recipe_id != worn(recipe, f"{lora}=0.5").recipe_id


# --- files of others -------------------------------------------------------------------------------------------------


def test_a_foreign_kohya_lora_is_worn(tiny: Models, engine: DiffusersEngine, recipe: Recipe, tmp_path: Path) -> None:
    """On convolutions of all sizes, with attention's 1×1 ones as linear modules, without alpha in some modules."""
    lora = random_lora(pipeline_of(tiny("sd15")), ("unet", "text_encoder"))
    tensors = load_file(save(lora, "sd15", tmp_path)["kohya.safetensors"])
    foreign = {
        name: tensor.squeeze() if "proj_in" in name and "lora" in name and tensor.dim() == 4 else tensor
        for name, tensor in tensors.items()
        if not name.endswith("conv1.alpha")
    }
    foreign = {name: t.reshape(-1, 1) if t.dim() == 1 and "up" in name else t for name, t in foreign.items()}
    foreign = {name: t.reshape(1, -1) if t.dim() == 1 and "down" in name else t for name, t in foreign.items()}
    save_file({name: tensor.contiguous() for name, tensor in foreign.items()}, tmp_path / "foreign.safetensors")
    expected = Lora(
        lora.tensors, {m: float(lora.rank(m)) if m.endswith("conv1") else alpha for m, alpha in lora.alphas.items()}
    )
    (tmp_path / "expected").mkdir()
    files = save(expected, "sd15", tmp_path / "expected")
    assert np.array_equal(
        engine.generate(ORDERS, worn(recipe, tmp_path / "foreign.safetensors")).pixels,
        engine.generate(ORDERS, worn(recipe, files["adapter.safetensors"])).pixels,
    )


# --- what does not work ----------------------------------------------------------------------------------------------


def test_an_adapter_for_another_width_names_both_shapes(tiny: Models, tmp_path: Path) -> None:
    lora = random_lora(pipeline_of(tiny("sd15")), ("unet",), only=("attn2.to_k",))
    file = save(lora, "sd15", tmp_path)["adapter.safetensors"]
    adapters = (resolve(str(file)),)
    with pytest.raises(DoesNotFit, match=r"attn2.to_k of 32×32, where the model's is 32×64"):
        default_recipe(tiny("sdxl"), adapters=adapters)
    recipe = replace(small("sdxl", tiny("sdxl")), adapters=adapters)
    with pytest.raises(DoesNotFit, match=r"attn2.to_k of 32×32, where the model's is 32×64"):
        DiffusersEngine(tiny("sdxl"), "float32", BATCH).generate(ORDERS, recipe)


def test_an_adapter_for_another_architecture_names_its_modules(tiny: Models, tmp_path: Path) -> None:
    lora = random_lora(pipeline_of(tiny("flux")), ("transformer",), only=("attn.to_q",))
    adapters = (resolve(str(save(lora, "flux", tmp_path)["kohya.safetensors"])),)
    with pytest.raises(DoesNotFit, match=r"2 of its 2 modules are not there \(transformer\.single_trans"):
        default_recipe(tiny("sd15"), adapters=adapters)


def test_a_single_key_that_does_not_match_is_an_error(
    tiny: Models, lora: Path, engine: DiffusersEngine, recipe: Recipe
) -> None:
    tensors = load_file(lora)
    key = next(name for name in tensors if name.endswith("attn2.to_k.lora_A.weight"))
    for part in ("lora_A", "lora_B"):
        tensors[key.replace("to_k.lora_A", f"to_j.{part}")] = tensors[key.replace("lora_A", part)].clone()
    save_file(tensors, lora.with_name("more.safetensors"))
    with pytest.raises(DoesNotFit, match=r"1 of its \d+ modules are not there \(unet.*attn2.to_j\)"):
        engine.generate(ORDERS, worn(recipe, lora.with_name("more.safetensors")))
    engine.generate(ORDERS, recipe)


def test_a_lora_on_a_table_of_vectors_is_an_error(tiny: Models, tmp_path: Path) -> None:
    module = "text_encoder.embeddings.token_embedding"
    rows, width = pipeline_of(tiny("sd15")).text_encoder.get_input_embeddings().weight.shape
    tensors = {f"{module}.lora_A.weight": torch.ones(2, width), f"{module}.lora_B.weight": torch.ones(rows, 2)}
    file = save(Lora(tensors, {module: 1.0}), "sd15", tmp_path)["kohya.safetensors"]
    with pytest.raises(DoesNotFit, match=rf"1 of its 1 modules are tables of vectors \({module}\)"):
        default_recipe(tiny("sd15"), adapters=(resolve(str(file)),))


@pytest.mark.parametrize("shapes", [((0, 32), (32, 0)), ((2, 32), (32, 2, 3, 3)), ((2, 32), (32, 2, 2, 2))])
def test_what_no_module_can_wear_is_refused_before_any_shard(
    lora: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    tensors = load_file(lora)
    key = next(name for name in tensors if name.endswith("attn2.to_q.lora_A.weight"))
    tensors[key], tensors[key.replace("lora_A", "lora_B")] = (torch.ones(shape) for shape in shapes)
    save_file(tensors, lora, _metadata(lora))
    with pytest.raises(NotAnAdapter, match=r"attn2.to_q.lora_[AB].weight .*has shape"):
        resolve(str(lora))


def test_an_adapter_that_changes_nothing_is_an_error(lora: Path) -> None:
    save_file(
        {n: t * 0 if "lora_B" in n else t for n, t in load_file(lora).items()}, lora.with_name("zero.safetensors")
    )
    with pytest.raises(ChangesNothing, match=r"zero.safetensors' changes nothing: .*lora_B"):
        resolve(str(lora.with_name("zero.safetensors")))


def test_a_file_that_changed_after_planning_is_an_error(engine: DiffusersEngine, recipe: Recipe, lora: Path) -> None:
    planned = worn(recipe, lora)
    save_file({name: tensor + 1 for name, tensor in load_file(lora).items()}, lora, _metadata(lora))
    with pytest.raises(AdapterError, match=r"has digest [0-9a-f]{32}, the recipe asks for [0-9a-f]{32}"):
        engine.generate(ORDERS, planned)


# --- textual inversion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["sd15", "sdxl", "flux"])
def test_a_textual_inversion_is_read_as_diffusers_reads_it(tiny: Models, tmp_path: Path, shape: str) -> None:
    model = tiny(shape)
    torch.manual_seed(0)
    learned = Embeddings({"<c1>": [torch.randn(3, 32) for _ in CLIP[shape]]})
    files = save(learned, shape, tmp_path)
    engine, recipe = DiffusersEngine(model, "float32", BATCH), small(shape, model)
    wanted = [Order("a <c1> in red", "", 1), Order("a <c1>", "", 2)]
    base = engine.generate(wanted, recipe).pixels
    made = [engine.generate(wanted, worn(recipe, file)).pixels for file in files.values()]
    assert np.array_equal(*made)
    assert (made[0] != base).any()
    assert np.array_equal(engine.generate(wanted, recipe).pixels, base)

    pipeline = pipeline_of(model)
    for number, component in enumerate(CLIP[shape]):
        pipeline.load_textual_inversion(
            learned.tokens["<c1>"][number],
            token="<c1>",
            text_encoder=getattr(pipeline, component),
            tokenizer=getattr(pipeline, component.replace("text_encoder", "tokenizer")),
        )
    plain = pipeline(
        [order.prompt for order in wanted],
        generator=[torch.Generator().manual_seed(order.seed) for order in wanted],
        num_inference_steps=2,
        guidance_scale=recipe.guidance,
        output_type="np",
        **SIZE,
    ).images
    assert np.abs(made[0] - plain * 255).max() < 0.51


def test_a_textual_inversion_of_another_width_or_name_is_an_error(
    tiny: Models, engine: DiffusersEngine, recipe: Recipe, tmp_path: Path
) -> None:
    save_file({"<wide>": torch.ones(2, 48)}, tmp_path / "wide.safetensors")
    with pytest.raises(DoesNotFit, match=r"vectors of width 48, the model's text encoders read vectors of width 32"):
        default_recipe(tiny("sd15"), adapters=(resolve(str(tmp_path / "wide.safetensors")),))
    save_file({"a</w>": torch.ones(2, 32)}, tmp_path / "known.safetensors")
    with pytest.raises(AdapterError, match=r"'a</w>' is a word that text encoder of the model knows already"):
        engine.generate(ORDERS, worn(recipe, tmp_path / "known.safetensors"))
    with pytest.raises(AdapterError, match="has no weight"):
        resolve(f"{tmp_path / 'wide.safetensors'}=0.5")
