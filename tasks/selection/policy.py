"""What a person asks of the selection, checked as far as it can be checked without any candidate."""

from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from tasks.errors import DarkroomError
from tasks.identity import digest


class SelectionError(DarkroomError):
    """The policy cannot be kept with these candidates, or the candidates are not all there."""


class Policy(BaseModel, frozen=True):
    """What the selection promises.

    Mode `rate` rejects exactly ρ of the candidates that can be judged, or more where floor and caps leave too few; mode
    `count` accepts exactly so many images; mode `threshold` accepts all that floor and caps allow. The band guards each.
    """

    mode: Literal["rate", "count", "threshold"] = Field(
        "rate",
        description="what decides how many are accepted: rate (reject), count, or threshold (floor and k_max only)",
    )
    reject: str = Field("0.6", description="rejection rate ρ as a decimal number or a fraction, e.g. 0.6 or 3/5; exact")
    count: int = Field(0, ge=0, description="images to accept in mode count; 0 in the others")
    floor: float = Field(-1.0, ge=-1, le=1, description="no image with a raw cosine below this is accepted")
    k_min: int = Field(0, ge=0, description="images to accept per prompt at least, where enough reach the floor")
    k_max: int = Field(0, ge=0, description="images to accept per prompt at most; 0: no limit")
    quotas: dict[str, str] = Field(
        {},
        description='stratum → its share of the set ("0.4", "2/5") or number of images ("200"); the others share the rest',
    )
    duplicate_cosine: float = Field(
        0, ge=0, le=1, description="reject an image whose embedding is so near a better one's of its prompt; 0: none"
    )
    duplicate_bits: int = Field(
        -1,
        ge=-1,
        le=8,
        description="reject an image whose perceptual hash differs by so few bits from a better one's; -1: none",
    )
    blend: float = Field(0.5, ge=0, le=1, description="λ: 1 compares images within their prompt, 0 across all prompts")
    band_low: float = Field(0.0, ge=0, le=1, description="fail where the rejection rate comes out below this")
    band_high: float = Field(1.0, ge=0, le=1, description="fail where the rejection rate comes out above this")

    @field_validator("reject", mode="before")
    @classmethod
    def _is_a_rate(cls, value: object) -> str:
        text = str(value).strip()
        try:
            rate = Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise ValueError(
                f"'{text}' is no rejection rate: write a decimal number or a fraction, such as 0.6 or 3/5"
            ) from None
        if not 0 <= rate <= 1:
            raise ValueError(f"rejection rate {text} does not lie between 0 and 1; for 60 percent write 0.6")
        return text

    @field_validator("quotas", mode="before")
    @classmethod
    def _are_quotas(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        quotas = {str(stratum): str(quota).strip() for stratum, quota in value.items()}
        for stratum, text in quotas.items():
            if _is_number(text):
                continue
            try:
                share = Fraction(text)
            except (ValueError, ZeroDivisionError):
                raise ValueError(
                    f"'{text}' is no quota (stratum '{stratum}'): write a share of the set, such as 0.4 or 2/5, or a whole "
                    "number of images"
                ) from None
            if not 0 <= share <= 1:
                raise ValueError(
                    f"quota {text} of stratum '{stratum}' does not lie between 0 and 1; for 40 percent of the set write 0.4, "
                    "for a number of images a whole number"
                )
        return quotas

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Policy":
        if self.k_max and self.k_min > self.k_max:
            raise ValueError(f"k_min {self.k_min} is above k_max {self.k_max}: lower one or raise the other")
        if self.band_low > self.band_high:
            raise ValueError(f"band_low {self.band_low} is above band_high {self.band_high}: swap them")
        if self.mode == "rate" and self.rate > exact(self.band_high):
            raise ValueError(
                f"reject {self.reject} is above band_high {self.band_high}, so every run would fail: lower one or raise the other"
            )
        if (self.mode == "count") != bool(self.count):
            raise ValueError(
                f"mode {self.mode} with count {self.count}: give mode count a number of images, or leave count at 0"
            )
        if self.mode == "threshold" and self.quotas:
            raise ValueError(
                "mode threshold accepts what floor and k_max allow, whatever its stratum: use quotas with rate or count"
            )
        if (sum_of_shares := sum(self.shares.values(), Fraction(0))) > 1:
            raise ValueError(
                f"the quotas add up to {sum_of_shares} ({float(sum_of_shares):.4g}) of the set, more than all of it: lower them "
                f"by {sum_of_shares - 1} together"
            )
        return self

    @property
    def rate(self) -> Fraction:
        """ρ, exact."""
        return Fraction(self.reject)

    @property
    def shares(self) -> dict[str, Fraction]:
        """The quotas that are shares of the set, exact: those not written as a whole number."""
        return {stratum: Fraction(text) for stratum, text in self.quotas.items() if not _is_number(text)}

    @property
    def numbers(self) -> dict[str, int]:
        """The quotas that are numbers of images."""
        return {stratum: int(text) for stratum, text in self.quotas.items() if _is_number(text)}

    @property
    def digest(self) -> str:
        return digest(self.model_dump(mode="json"))


def exact(decimal: float) -> Fraction:
    """The number as it was written, not as it is stored in binary."""
    return Fraction(str(decimal))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
