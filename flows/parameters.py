"""The form a person fills in to start a run: what the Prefect UI shows and what the command line takes."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from tasks.budget import Budget
from tasks.exam import Exam
from tasks.scorers.forms import Form
from tasks.select import Policy


class Sampler(StrEnum):
    auto = "auto"
    ddpm = "ddpm"
    ddim = "ddim"
    dpmpp = "dpm++"
    plms = "plms"
    euler = "euler"
    euler_a = "euler_a"
    unipc = "unipc"
    lcm = "lcm"


class Generation(BaseModel, frozen=True):
    """How candidates are made. A manifest's own columns (steps, guidance, …) go before these."""

    model: str = Field("data/models/tiny-sd", description="diffusers folder or hub name")
    champion: bool = Field(True, description="make images with the champion of the dataset, where it has one")
    candidates: int = Field(5, ge=1, le=10_000, description="images to make per prompt (1–10,000)")
    sampler: Sampler = Field(Sampler.auto, description="auto: the model's own, mostly dpm++")
    steps: int = Field(0, ge=0, le=1000, description="sampling steps (1–1000); 0: the model's own")
    guidance: float = Field(-1, ge=-1, le=100, description="guidance scale (0–100); -1: the model's own")
    width: int = Field(0, ge=0, le=8192, description="pixels, a multiple of 8 (8–8192); 0: the model's own")
    height: int = Field(0, ge=0, le=8192, description="pixels, a multiple of 8 (8–8192); 0: the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU, bfloat16 on GPU"
    )
    guidance_until: float = Field(
        1,
        gt=0,
        le=1,
        description="share of the steps that are guided, above 0 and up to 1: less is faster and changes images; 1: all",
    )
    compiled: bool = Field(
        False, description="compile the model's blocks: faster after minutes of waiting; for large runs"
    )
    attention: Literal[
        "sdpa",
        "_native_cudnn",
        "_native_efficient",
        "_native_flash",
        "_native_math",
        "flash",
        "_flash_3",
        "sage",
        "xformers",
    ] = Field("sdpa", description="kernel that computes attention; Flux only, elsewhere sdpa (torch's fastest)")
    adapters: str = Field(
        "",
        description="LoRAs and textual inversions to wear, comma-separated, each as a file, URL or id of the store, with its weight "
        "where that is not 1: a.safetensors=0.8, 3f9a41c2",
    )
    batch_size: int = Field(8, ge=1, le=1024, description="images per call of the model (1–1024)")
    shard_size: int = Field(128, ge=1, le=100_000, description="images per task (1–100,000)")

    @field_validator("guidance")
    @classmethod
    def _is_a_scale(cls, value: float) -> float:
        if -1 < value < 0:
            raise ValueError(f"guidance {value} lies between -1 and 0: use 0 to 100, or -1 for the model's own")
        return value

    def chosen(self) -> dict[str, Any]:
        """What was chosen of all that makes a recipe but its adapters; what is the model's own, or the usual, is left out.

        The form shows an optional number as a switch between types, so a number that means nothing stands for "none".
        """
        own = {"sampler": "auto", "steps": 0, "guidance": -1, "width": 0, "height": 0}
        own |= {"guidance_until": 1, "compiled": False, "attention": "sdpa"}
        given = self.model_dump(mode="json", include={*own, "dtype"})
        return {name: value for name, value in given.items() if name not in own or value != own[name]}


class Learning(BaseModel, frozen=True):
    """What a training learns from, and how. What it learnt makes images only once the gate lets it."""

    options: str = Field(
        "",
        description="settings of the training that differ from the model's own, such as: rank=8, steps=300; or each in a line of its "
        "own, where commas are part of the values",
    )
    releases: int = Field(0, ge=0, le=10_000, description="learn from the latest so many releases; 0: from all")
    held_out: float = Field(
        0.2, ge=0, le=0.9, description="share of the prompts that are never learnt from, for the gate to ask (0–0.9)"
    )
    exam_manifest: str = Field(
        "", description="manifest of prompts for the gate to ask instead of that share; none of them is learnt from"
    )
    anchors: str = Field(
        "", description="Kohya dataset TOML of pictures that no model made, to be learnt along; empty: none"
    )
    anchor_share: float = Field(0.25, ge=0, lt=1, description="share of these in what is seen (0 to below 1)")
    most_generations: int = Field(
        3, ge=1, le=100, description="an adapter is at most so many trainings on generated images away from the base"
    )


class Workers(BaseModel, frozen=True):
    """Who makes and scores the candidates. Has no part in what comes out."""

    runner: Literal["local", "ray"] = Field(
        "local", description="local: processes on this machine; ray: an existing Ray cluster"
    )
    workers: int = Field(
        0,
        ge=0,
        le=10_000,
        description="how many at once; 0: one for each GPU, and without any one in the flow's own process",
    )
    address: str = Field("auto", description="of the Ray cluster, as host:port; auto: what RAY_ADDRESS says")
    gpus: float = Field(
        1, ge=0, le=1, description="Ray: share of a GPU that a worker holds, up to 1; 0: it holds a CPU instead"
    )


class Scoring(BaseModel, frozen=True):
    """Who judges the candidates."""

    scorer: str = Field("data/models/tiny-clip-filter", description="OpenCLIP folder or hub name")
    batch_size: int = Field(64, ge=1, le=4096, description="images per call of the scorer (1–4096)")
    calibrated_floor: bool = Field(False, description="use the floor that `darkroom calibrate` measured for the scorer")
    judge: str = Field(
        "", description="held-out OpenCLIP of another family, to tell whether the filter helps; empty: none"
    )
    on_no_lift: Literal["warn", "fail"] = Field(
        "warn", description="where the judge sees no lift: warn that the filter selects noise, or fail"
    )
    safety: str = Field(
        "", description="JSON file of concepts that must not be seen (tasks/gates/safety.py); empty: none"
    )
    form: Form = Field(
        "cosine",
        description="what images are compared by: the cosine, the cosine corrected for its prompt's bias, or contrastive, "
        "against other prompts; the last two need `darkroom calibrate` first",
    )

    @model_validator(mode="after")
    def _can_tell(self) -> "Scoring":
        if self.on_no_lift == "fail" and not self.judge:
            raise ValueError(
                "on_no_lift 'fail' needs a judge, a held-out OpenCLIP model that tells whether the filter helps"
            )
        return self


__all__ = ["Budget", "Exam", "Generation", "Learning", "Policy", "Sampler", "Scoring", "Workers"]
