"""What can be known of a diffusers model from its folder alone, without torch and in well under a second."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.engines import ATTENTION, Adapter, EngineError, Recipe, TokenLimit
from tasks.engines.samplers import check_sampler

if TYPE_CHECKING:
    from tasks.wordwise import Counter

TEXT_SUFFIXES = (".json", ".txt", ".model")
DEFAULTS_FILE = (
    "darkroom.json"  # beside model_index.json: {"steps": …, "guidance": …, "sampler": …, "training": {…}}, any of them
)
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# the checker blackens images in place; the others serve it
NOT_LOADED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Defaults:
    """How the makers of a model sample from it."""

    steps: int
    guidance: float
    sampler: str


@dataclass(frozen=True)
class Family:
    """A pipeline class: its published defaults (model cards, else the pipeline's own), and what differs in calling it."""

    defaults: Defaults
    negative: bool = True  # whether a negative prompt has an effect
    max_t5_tokens: int = 0  # 0: has no T5
    # whether its attention goes through diffusers' dispatcher; elsewhere a choice has no effect
    chooses_attention: bool = False


FAMILIES = {
    "StableDiffusionPipeline": Family(Defaults(30, 7.5, "dpm++")),
    "StableDiffusionXLPipeline": Family(Defaults(30, 5.0, "dpm++")),
    "StableDiffusion3Pipeline": Family(Defaults(28, 7.0, "euler"), max_t5_tokens=256),
    "FluxPipeline": Family(Defaults(28, 3.5, "euler"), negative=False, max_t5_tokens=512, chooses_attention=True),
}
FLUX_SCHNELL = Family(Defaults(4, 0.0, "euler"), negative=False, max_t5_tokens=256, chooses_attention=True)


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers model folder, read lazily. Opening one that is none, or of a family that is not known, raises EngineError."""

    path: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        return self.config("model_index.json")

    def config(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EngineError(
                f"{file} cannot be read ({error}): the engine takes folders as diffusers' `save_pretrained` writes "
                "them, with model_index.json and one folder a component"
            ) from error

    @property
    def components(self) -> list[str]:
        """The folders whose files decide pixels."""
        used = (name for name, entry in self.index.items() if isinstance(entry, list) and entry[0] is not None)
        return sorted(name for name in used if name not in NOT_LOADED)

    @cached_property
    def family(self) -> Family:
        name = self.index.get("_class_name")
        if name not in FAMILIES:
            raise EngineError(
                f"{self.path} holds a pipeline of class {name}; the diffusers engine takes {', '.join(FAMILIES)}"
            )
        if name == "FluxPipeline" and not self.config("transformer/config.json").get("guidance_embeds"):
            return FLUX_SCHNELL
        return FAMILIES[name]

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        return self.config("scheduler/scheduler_config.json")

    @property
    def defaults(self) -> Defaults:
        """The folder's own (`darkroom.json`), else the published ones of its family."""
        published = self._distilled or self.family.defaults
        if not (self.path / DEFAULTS_FILE).exists():
            return published
        own = {name: value for name, value in self.config(DEFAULTS_FILE).items() if name != "training"}
        try:
            return Defaults(**{**vars(published), **own})
        except TypeError as error:
            raise EngineError(
                f"{self.path / DEFAULTS_FILE}: {error}; it may hold steps, guidance, sampler and training, nothing else"
            ) from error

    @property
    def training(self) -> dict[str, Any]:
        """How the makers of the model fine-tune it: settings of a trainer by name, from the folder's `darkroom.json`."""
        if not (self.path / DEFAULTS_FILE).exists():
            return {}
        return self.config(DEFAULTS_FILE).get("training", {})

    @property
    def pipeline(self) -> str:
        """The class of its pipeline, StableDiffusionPipeline …"""
        return str(self.index["_class_name"])

    @property
    def _distilled(self) -> Defaults | None:
        """Few-step models. SD Turbo, SDXL Turbo and SDXL Lightning ship an Euler sampler with trailing spacing, and latent
        consistency models (LCM) their own; no other published model does."""
        euler = {"EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler_a"}
        config = self.scheduler
        if config["_class_name"] == "LCMScheduler":
            return Defaults(4, 8.0 if self.embeds_guidance else 1.0, "lcm")
        trailing = config.get("timestep_spacing") == "trailing"
        if trailing and config["_class_name"] in euler and config.get("prediction_type", "epsilon") == "epsilon":
            return Defaults(4, 0.0, euler[config["_class_name"]])
        return None

    @property
    def embeds_guidance(self) -> bool:
        """Whether the model is told the guidance scale, as distilled ones are, so that a step is one call without guidance."""
        if "unet" in self.index:
            return self.config("unet/config.json").get("time_cond_proj_dim") is not None
        return not self.family.negative

    @property
    def denoiser(self) -> str:
        """The component that predicts: unet or transformer."""
        return "unet" if "unet" in self.index else "transformer"

    @property
    def _vae_factor(self) -> int:
        """Pixels a latent cell is wide: each level of the VAE but the last halves the image."""
        return 2 ** (len(self.config("vae/config.json")["block_out_channels"]) - 1)

    @property
    def size(self) -> tuple[int, int]:
        """The (width, height) the model was trained for, in pixels."""
        if "unet" in self.index:
            cells = self.config("unet/config.json")["sample_size"]
        else:  # Flux has none written down; its pipeline takes 128
            cells = self.config("transformer/config.json").get("sample_size", 128)
        height, width = (cells, cells) if isinstance(cells, int) else cells
        return width * self._vae_factor, height * self._vae_factor

    @cached_property
    def multiple(self) -> int:
        """What width and height must be multiples of, in pixels."""
        if "unet" in self.index:
            return 8  # the pipelines ask for it, whatever the VAE's factor
        if self.index["_class_name"] == "FluxPipeline":
            return 2 * self._vae_factor  # latents are packed two by two
        return self.config("transformer/config.json")["patch_size"] * self._vae_factor

    def files(self) -> list[Path]:
        """The files that loading the pipeline reads: its configurations, tokenizers and weights."""
        found = [self.path / "model_index.json"]
        for component in self.components:
            everything = sorted(file for file in (self.path / component).rglob("*") if file.is_file())
            found += [file for file in everything if file.suffix in TEXT_SUFFIXES]
            # A second dot marks a variant (`model.fp16.safetensors`), which is only loaded on request.
            weights = [file for file in everything if file.name.count(".") == 1]
            safe = [file for file in weights if file.suffix == ".safetensors"]
            found += safe or [file for file in weights if file.suffix == ".bin"]
        return found


def locate(model: str) -> Path:
    """The folder of a model: a local folder as given; an object store's URL, else a model hub's name, from the local cache or
    downloaded.

    Raises EngineError: none of these is there, or the folder is not a diffusers pipeline of a known family.
    """
    if "://" in model:
        path = _from_store(model)
        _ = ModelFolder(path).family
        return path
    folder = Path(model).expanduser()
    if not folder.is_dir() and not HUB_NAME.fullmatch(model):
        raise EngineError(
            f"model '{model}': there is no folder {folder.absolute()}, and a name of the model hub would look like org/name; "
            "check the path"
        )
    path = folder if folder.is_dir() else _from_hub(model)
    _ = ModelFolder(path).family
    return path


def _from_store(url: str) -> Path:
    from tasks.weights import WeightsError, fetch

    try:
        return fetch(url, _loaded_of)
    except WeightsError as error:
        raise EngineError(f"model {error}") from error


def _loaded_of(names: Sequence[str]) -> list[str]:
    """Of the names of all files of a model, those that a pipeline may load: `ModelFolder.files` before the index is read.

    Published models carry the same weights several times: as one file beside the components, in half precision, as .bin.
    """
    inner = [name for name in names if "/" in name and name.partition("/")[0] not in NOT_LOADED]
    single = [name for name in inner if name.rpartition("/")[2].count(".") == 1]
    safe = [name for name in single if name.endswith(".safetensors")]
    have_safe = {name.partition("/")[0] for name in safe}
    old = [name for name in single if name.endswith(".bin") and name.partition("/")[0] not in have_safe]
    outer = [name for name in names if name in ("model_index.json", DEFAULTS_FILE)]
    return [*outer, *(name for name in inner if name.endswith(TEXT_SUFFIXES)), *safe, *old]


@lru_cache  # a process keeps to the revision it found first, and asks the network once
def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        index = ModelFolder(Path(hf_hub_download(model, "model_index.json")).parent)
        # Hubs keep single-file copies of the same weights beside the components: ask for these by name only.
        suffixes = (*(f"*{suffix}" for suffix in TEXT_SUFFIXES), "*.safetensors")
        wanted = [f"{component}/{suffix}" for component in index.components for suffix in suffixes]
        return Path(snapshot_download(model, allow_patterns=["model_index.json", DEFAULTS_FILE, *wanted]))
    except (HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineError(
            f"model '{model}': there is no folder {Path(model).absolute()}, and the model hub has no such model or "
            f"cannot be reached ({reason}). Give the path of a diffusers folder, or check the name and the network; "
            "gated models need `hf auth login`, and with HF_HUB_OFFLINE=1 only downloaded models are looked for"
        ) from error


def model_digest(folder: Path) -> str:
    """The id of a model's weights: 32 hexadecimal digits over the names and the sha256 of the files a pipeline loads."""
    from tasks.identity import digest, sha256_file_once  # here, so that an engine also runs where there is no polars

    files = ModelFolder(folder).files()
    return digest(sorted([file.relative_to(folder).as_posix(), sha256_file_once(file)] for file in files))


def default_recipe(
    model: str,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    dtype: str = "auto",
    guidance_until: float = 1.0,
    compiled: bool = False,
    attention: str = "sdpa",
    adapters: Sequence[Adapter] = (),
) -> Recipe:
    """The recipe for a model, with its own defaults for what is not given; `width` and `height` in pixels.

    Raises EngineError: the model is not there, or it cannot be sampled with that sampler, at that size or with those options;
    AdapterError: an adapter is not there, or is not for this model.
    """
    folder = ModelFolder(locate(model))
    own, (own_width, own_height) = folder.defaults, folder.size
    recipe = Recipe(
        model=model,
        model_digest=model_digest(folder.path),
        sampler=own.sampler if sampler is None else sampler,
        steps=own.steps if steps is None else steps,
        guidance=float(own.guidance if guidance is None else guidance),
        width=own_width if width is None else width,
        height=own_height if height is None else height,
        dtype=resolve_dtype(dtype),
        guidance_until=float(guidance_until),
        compiled=compiled,
        attention=attention,
        adapters=tuple(adapters),
    )
    check_recipe(recipe, folder)
    if adapters:
        from tasks.adapters.fitting import check_adapters  # here, since it reads them with torch

        check_adapters(recipe, folder)
    return recipe


def check_recipe(recipe: Recipe, folder: ModelFolder) -> None:
    """Raises EngineError where the model cannot do what the recipe asks for."""
    check_sampler(recipe.sampler, folder.scheduler, recipe.model)
    if recipe.width % folder.multiple or recipe.height % folder.multiple:
        raise EngineError(
            f"model '{recipe.model}' cannot make images of {recipe.width}×{recipe.height} pixels: width and height "
            f"must be multiples of {folder.multiple}"
        )
    _check_guidance_until(recipe, folder)
    if recipe.attention not in ATTENTION:
        raise EngineError(f"attention '{recipe.attention}' is not known; these are: {', '.join(ATTENTION)}")
    if recipe.attention != "sdpa" and not folder.family.chooses_attention:
        takers = ", ".join(name for name, family in FAMILIES.items() if family.chooses_attention)
        raise EngineError(
            f"attention '{recipe.attention}' has no effect on model '{recipe.model}' ({folder.index['_class_name']}), only on "
            f"{takers}: leave it at sdpa, which takes torch's fastest"
        )


def guided_steps(steps: int, guidance_until: float) -> int:
    """How many of the steps are guided: at least that share of them."""
    return math.ceil(round(steps * guidance_until, 6))  # 0.07 · 100 is 7.000000000000001


def _check_guidance_until(recipe: Recipe, folder: ModelFolder) -> None:
    until = recipe.guidance_until
    if until == 1:
        return
    if not 0 < until < 1:
        raise EngineError(
            f"guidance_until {until} is no share of the steps: use more than 0, up to 1 (guidance to the end)"
        )
    reason = ""
    if folder.embeds_guidance:
        reason = "needs one call a step anyway"
    elif recipe.guidance <= 1:
        reason = f"is not guided at guidance {recipe.guidance:g}"
    elif guided_steps(recipe.steps, until) >= recipe.steps:
        reason = f"would be guided in all of its {recipe.steps} steps all the same"
    if reason:
        raise EngineError(
            f"guidance_until {until:g} has no effect: model '{recipe.model}' {reason}; leave it at 1, or change steps or guidance"
        )


def resolve_dtype(dtype: str) -> str:
    """`auto` becomes bfloat16 where torch will find a CUDA device, else float32; anything else stays."""
    if dtype != "auto":
        return dtype
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    device = any(Path("/dev").glob("nvidia[0-9]*"))
    return "bfloat16" if device and not hidden and not version("torch").endswith("+cpu") else "float32"


def token_limits(model: str) -> list[TokenLimit]:
    """How many tokens each text encoder of the model reads, and how many a prompt has for it."""
    folder = ModelFolder(locate(model))
    limits = []
    for name in (component for component in folder.components if component.startswith("tokenizer")):
        t5 = folder.index[name][1].startswith("T5")
        limit = (
            folder.family.max_t5_tokens if t5 else folder.config(f"{name}/tokenizer_config.json")["model_max_length"]
        )
        encoder = name.replace("tokenizer", "text encoder").replace("_", " ")
        limits.append(TokenLimit(f"{encoder} of {Path(model).name}", limit, _token_counter(folder.path / name)))
    return limits


def _token_counter(folder: Path) -> "Counter":
    if not (folder / "tokenizer.json").exists():
        return _slow_token_counter(folder)
    from tokenizers import Tokenizer

    from tasks.wordwise import wordwise

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return wordwise(
        tokenizer, lambda prompts: [len(encoding) for encoding in tokenizer.encode_batch_fast(list(prompts))]
    )


def _slow_token_counter(folder: Path) -> "Counter":
    """For older folders, which have their vocabulary in other files: transformers knows them all, but loads slowly."""
    from transformers import AutoTokenizer

    from tasks.wordwise import wordwise

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def count(prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]

    return wordwise(tokenizer.backend_tokenizer, count) if tokenizer.is_fast else count
