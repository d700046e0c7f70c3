"""How a training is done: what a person may choose. All of it decides the weights, but for what is said to have no part in them."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# a textual inversion has none of these
LORA_ALONE = ("rank", "alpha", "targets", "dropout", "text_encoder", "text_learning_rate")
SPEED_AND_SAFETY = ("checkpoint_every", "sample_prompts")  # have no part in the weights

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# CLIP's; a denoiser that pools texts has modules of these names, too, which are none of its attention to the image
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
WITHIN_BLOCKS = re.compile(r"(^|\.)(\w*blocks?|layers)\.")


class Settings(BaseModel):
    """A LoRA on the denoiser of attention, unless something else is said."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["lora", "dreambooth", "textual_inversion"] = "lora"
    steps: int = Field(1000, ge=1, le=10_000_000, description="changes of the weights")
    batch_size: int = Field(4, ge=1, le=4096, description="images per batch of a release; a dataset file has its own")
    accumulation: int = Field(1, ge=1, le=4096, description="batches that each step's gradient is the mean of")
    learning_rate: float = Field(1e-4, gt=0, le=10)
    text_learning_rate: float = Field(0, ge=0, le=10, description="of the text encoders; 0: the same")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="how it falls to zero")
    warmup: int = Field(0, ge=0, description="steps in which it rises from zero; a tenth of all steps at most")
    weight_decay: float = Field(0.01, ge=0, le=1)
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: any")
    seed: int = Field(0, ge=0, lt=2**32)

    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(0, ge=0, description="what the LoRA is multiplied by, over its rank; 0: the rank")
    targets: str = Field(
        "attention",
        description="modules: attention; wide (all linear ones and convolutions of blocks); or ends of names: to_q, to_v",
    )
    dropout: float = Field(0, ge=0, lt=1, description="share of the LoRA's inputs that are left out")
    text_encoder: bool = Field(False, description="whether the CLIP text encoders learn, too")

    timesteps: Literal["uniform", "mid"] = Field(
        "uniform", description="mid: mostly those halfway between image and noise (logit-normal)"
    )
    min_snr_gamma: float = Field(
        0, ge=0, description="weighs timesteps by their signal-to-noise ratio; mostly 5; 0: all alike"
    )
    caption_dropout: float = Field(0, ge=0, lt=1, description="share of the captions that are left empty, for guidance")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the frozen weights; auto: float32 on CPU, bfloat16 on GPU"
    )
    checkpointing: bool = Field(False, description="compute activations twice, which saves memory")
    compiled: bool = Field(
        False,
        description="compile the denoiser: a minute or more for each size of images, and faster steps from then on",
    )
    ema: float = Field(
        0, ge=0, lt=1, description="decay of the mean of the weights that is kept; mostly 0.999; 0: none"
    )

    prior_weight: float = Field(1.0, ge=0, le=100, description="of regularisation images in the loss")
    token: str = Field("", description="DreamBooth: the word that means what is learnt, such as sks")
    class_prompt: str = Field("", description="DreamBooth: what it is one of, such as a photo of a dog")
    class_images: int = Field(100, ge=0, le=100_000, description="DreamBooth: images the base model makes of that")

    placeholder: str = Field("<new>", description="textual inversion: the word that is learnt")
    initializer: str = Field("", description="textual inversion: a word that comes near; empty: the mean of all words")
    vectors: int = Field(1, ge=1, le=75, description="textual inversion: vectors that the word stands for")

    checkpoint_every: int = Field(100, ge=1, description="steps")
    sample_prompts: str = Field("", description="images to make at each checkpoint; several prompts with | between")

    @field_validator("placeholder")
    @classmethod
    def _is_one_word(cls, value: str) -> str:
        from tasks.adapters.reading import RESERVED  # here, so that settings load without the store

        if not value or any(letter.isspace() for letter in value):
            raise ValueError("a placeholder is one word, such as <my-style>")
        if value != value.lower():
            raise ValueError(f"CLIP reads words in lower case: write {value.lower()}")
        if value in RESERVED:
            raise ValueError(
                f"files of textual inversions have their own meaning for {value}; choose another, such as <my-style>"
            )
        return value

    @model_validator(mode="after")
    def _goes_together(self) -> "Settings":
        if self.method == "dreambooth" and not self.token:
            raise ValueError("DreamBooth needs the word that means what is learnt: token=sks")
        if self.method == "dreambooth" and self.class_images and not self.class_prompt:
            raise ValueError(
                "DreamBooth needs what it is one of, to make images of that: class_prompt=a photo of a dog; or class_images=0"
            )
        if self.method == "textual_inversion" and self.text_encoder:
            raise ValueError("textual inversion learns a word, and leaves the text encoder alone: text_encoder=false")
        return self

    @property
    def scale(self) -> float:
        """alpha, where it is not given the rank."""
        return self.alpha or float(self.rank)

    @property
    def samples(self) -> list[str]:
        return [prompt.strip() for prompt in self.sample_prompts.split("|") if prompt.strip()]

    def aims_at(self, path: str, attention: tuple[str, ...] = ATTENTION) -> bool:
        """Whether a linear module or convolution is one of the targets, by its path within its component."""
        match self.targets:
            case "attention":
                return path.endswith(attention)
            case "wide":
                return bool(WITHIN_BLOCKS.search(path))
        ends = [end.strip() for end in self.targets.split(",") if end.strip()]
        return any(path == end or path.endswith(f".{end}") for end in ends)

    def rate(self, step: int) -> float:
        """What the learning rates are multiplied by at a step, from 0."""
        import math

        warmup = min(self.warmup, self.steps // 10)  # a short training is not all warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1, self.steps - warmup)
        match self.schedule:
            case "linear":
                return 1 - share
            case "cosine":
                return (1 + math.cos(math.pi * share)) / 2
        return 1.0
