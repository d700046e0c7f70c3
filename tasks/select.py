"""Which candidates become the dataset: exact, whatever the order, the sharding or the number of threads (DESIGN §6)."""

from pydantic import BaseModel, Field

from tasks.identity import digest


class Policy(BaseModel, frozen=True):
    """What the selection promises."""

    reject: str = Field("0.6", description="rejection rate ρ as a decimal number or a fraction, e.g. 0.6 or 3/5; exact")
    floor: float = Field(-1.0, ge=-1, le=1, description="no image with a raw cosine below this is accepted")
    k_min: int = Field(0, ge=0, description="images to accept per prompt at least, where enough reach the floor")
    k_max: int | None = Field(None, ge=1, description="images to accept per prompt at most; empty: no limit")
    blend: float = Field(0.5, ge=0, le=1, description="λ: 1 compares images within their prompt, 0 across all prompts")
    band_low: float = Field(0.0, ge=0, le=1, description="fail where the rejection rate comes out below this")
    band_high: float = Field(1.0, ge=0, le=1, description="fail where the rejection rate comes out above this")

    @property
    def digest(self) -> str:
        return digest(self.model_dump(mode="json"))
