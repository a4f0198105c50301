"""What a survey of weight-space geometry computes, validated."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """What a survey computes.

    projections: random projections, each with a seed of its own; 0 leaves them out. spectra: "auto" (exact up to `exact_up_to`
    rows or columns, whichever are fewer, randomized beyond), "exact", "randomized" or "none". k: dimensions of the subspaces
    that are compared. alpha: share of the base's weights in the masks of principal and of low-magnitude weights. top: shares of
    channels and heads in the top sets. seed: of everything random.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    projections: int = Field(4, ge=0)
    spectra: Literal["auto", "exact", "randomized", "none"] = "auto"
    exact_up_to: int = Field(1024, ge=1)
    k: int = Field(16, ge=1)
    alpha: float = Field(0.1, gt=0, lt=1)
    top: tuple[float, ...] = (0.05, 0.1, 0.2)
    seed: int = Field(0, ge=0)
