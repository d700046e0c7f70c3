"""Who makes pixels: one file an engine, one small protocol.

Another engine is another file here with a class that has `Engine`'s members, and a line in `open_engine`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from tasks.errors import DarkroomError
from tasks.model_thread import on_model_thread

if TYPE_CHECKING:
    import numpy as np

SAMPLERS = ("ddpm", "ddim", "dpm++", "plms", "euler", "euler_a", "unipc", "lcm")
# sdpa is torch's own choice; the others are diffusers' names for kernels that compute attention in another way. Those that
# diffusers would fetch from a hub (`…_hub`) are left out: their code could change under a recipe's id.
ATTENTION = (
    "sdpa",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "flash",
    "_flash_3",
    "sage",
    "xformers",
)


# fields of Recipe that are part of its id when they are not at default
OPTIONS = ("guidance_until", "compiled", "attention", "adapters")


class EngineError(DarkroomError):
    """The engine cannot be opened or cannot do what the recipe asks for."""


class DeviceFailed(EngineError):
    """The device failed: this process can compute nothing on it any more, another one perhaps can."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA or a textual inversion that a model wears. Its tensors count, by their digest; not where its file is."""

    source: str  # path or URL of its folder or file, for whoever loads it; not part of a recipe's id
    digest: str  # 32 hexadecimal digits over its tensors
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything that changes pixels besides prompt and seed. Weights count by the digest of their files, never by a name."""

    model: str  # path or hub name, for people; not part of the id
    model_digest: str  # 32 hexadecimal digits over the files the pipeline loads
    sampler: str  # one of SAMPLERS
    steps: int
    guidance: float
    width: int  # pixels
    height: int  # pixels
    dtype: str  # float32, bfloat16, float16
    engine: str = "diffusers"
    guidance_until: float = 1.0  # share of the steps (0–1) after which guidance is switched off; 1: never
    compiled: bool = False  # whether the model's repeated blocks are compiled: faster, and rounded otherwise
    attention: str = "sdpa"  # one of ATTENTION
    adapters: tuple[Adapter, ...] = ()  # worn together, in this order

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Recipe":
        """The recipe that `asdict` made this of, by way of JSON."""
        return cls(**{**fields, "adapters": tuple(Adapter(**adapter) for adapter in fields.get("adapters", ()))})

    def identity(self) -> dict[str, Any]:
        """The part of the recipe that decides pixels. Options that came later count only where they are used: ids stay."""
        unused = {
            field.name for field in fields(self) if field.name in OPTIONS and getattr(self, field.name) == field.default
        }
        known = {name: value for name, value in asdict(self).items() if name != "model" and name not in unused}
        if self.adapters:
            known["adapters"] = [[adapter.digest, adapter.weight] for adapter in self.adapters]
        return known

    @property
    def more_in_words(self) -> str:
        """What it has beside model, sampler, steps, guidance, size and type; mostly nothing."""
        parts = [f"adapter {adapter.digest[:12]} at {adapter.weight:g}" for adapter in self.adapters]
        parts += [f"guided for {self.guidance_until:.0%} of the steps"] if self.guidance_until < 1 else []
        parts += ["compiled"] if self.compiled else []
        parts += [f"attention {self.attention}"] if self.attention != "sdpa" else []
        return ", ".join(parts)

    @property
    def recipe_id(self) -> str:
        from tasks.identity import digest  # here, so that an engine also runs where there is no polars

        return digest(self.identity())


@dataclass(frozen=True)
class Order:
    """One candidate to be made, as an engine sees it."""

    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True)
class Images:
    """What an engine made: `pixels` uint8 [n, height, width, 3]; `finite` bool [n], False where NaN or Inf became pixels.

    The seconds are wall-clock time of this call: until the last latents were there, and from then to the pixels. `batch` is
    how many images the model was called with, fillers included: less than the engine's batch size where memory ran out.
    """

    pixels: "np.ndarray"
    finite: "np.ndarray"
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    batch: int = 0


class Engine(Protocol):
    """A loaded model. Held once per process and used for all its shards."""

    model: str
    digest: str
    batch_size: int
    device: str  # "cpu", "cuda: NVIDIA H100 80GB HBM3"
    load_seconds: float  # that opening it took

    def prepare(self, prompts: Sequence[tuple[str, str]], adapters: Sequence[Adapter] = ()) -> None:
        """Encode the distinct (prompt, negative prompt) pairs a shard needs, once; forget those no longer needed.

        `adapters`: those of the recipe, some of which change what a text's embedding is."""

    def generate(self, orders: Sequence[Order], recipe: Recipe) -> Images:
        """Make 1 … batch_size images in one call. An image depends on its own order and the recipe alone."""


@dataclass(frozen=True)
class TokenLimit:
    """How many tokens an encoder can read; `count` gives the tokens of each prompt, begin and end included."""

    encoder: str  # as named in messages: "text encoder of tiny-sd", "scorer tiny-clip-filter"
    limit: int
    count: Any  # Callable[[Sequence[str]], list[int]]
    negatives: bool = True  # whether negative prompts go through it too (through a scorer they never do)


@on_model_thread
def open_engine(model: str, dtype: str, batch_size: int) -> Engine:
    """The engine for a model, loaded at the first call and held: a process keeps one, that of its latest call.

    `dtype`: float32, bfloat16, float16 or auto. Threads may share it. Raises EngineError.
    """
    return _open(model, dtype, batch_size)


@on_model_thread
def close_engine() -> None:
    """Let go of the engine that is held, and of its memory."""
    from tasks.engines.memory import free_memory

    _open.cache_clear()
    free_memory()


@lru_cache(maxsize=1)
def _open(model: str, dtype: str, batch_size: int) -> Engine:
    from tasks.engines.diffusers import DiffusersEngine

    return DiffusersEngine(model, dtype, batch_size)
