"""The form a person fills in to start a run: what the Prefect UI shows and what the command line takes."""

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, Field

from tasks.select import Policy


class Sampler(StrEnum):
    ddpm = "ddpm"
    ddim = "ddim"
    dpmpp = "dpm++"
    plms = "plms"
    euler = "euler"
    euler_a = "euler_a"
    unipc = "unipc"
    lcm = "lcm"


class Generation(BaseModel):
    """How candidates are made. A manifest's own columns (steps, guidance, …) go before these."""

    model: str = Field("data/models/tiny-sd", description="diffusers folder or hub name")
    candidates: int = Field(5, ge=1, le=10_000, description="images to make per prompt (1–10,000)")
    sampler: Sampler | None = Field(None, description="empty: dpm++")
    steps: int | None = Field(
        None, ge=1, le=1000, description="sampling steps (1–1000); empty: the model's own default"
    )
    guidance: float | None = Field(
        None, ge=0, le=100, description="guidance scale (0–100); empty: the model's own default"
    )
    width: int | None = Field(None, ge=8, le=8192, description="pixels, a multiple of 8; empty: the model's own size")
    height: int | None = Field(None, ge=8, le=8192, description="pixels, a multiple of 8; empty: the model's own size")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU, bfloat16 on GPU"
    )
    batch_size: int = Field(8, ge=1, le=1024, description="images per call of the model (1–1024)")
    shard_size: int = Field(64, ge=1, le=100_000, description="images per task (1–100,000)")


class Scoring(BaseModel):
    """Who judges the candidates."""

    scorer: str = Field("data/models/tiny-clip-filter", description="OpenCLIP folder or hub name")
    batch_size: int = Field(64, ge=1, le=4096, description="images per call of the scorer (1–4096)")


__all__ = ["Generation", "Policy", "Sampler", "Scoring"]
