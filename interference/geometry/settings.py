"""What a survey of weight-space geometry computes, validated."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """What a survey computes.

    projections: random projections, each with a seed of its own; 0 leaves them out. spectra: how matrices are decomposed, "svd",
    "gram", "randomized" (see `subspaces.top_subspaces`), "auto" (by the smaller side: svd up to `svd_up_to`, gram up to
    `gram_up_to`, randomized beyond), or "none". k: dimensions of the subspaces
    that are compared. alpha: share of the base's weights in the masks of principal and of low-magnitude weights. top: shares of
    channels and heads in the top sets. seed: of everything random.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    projections: int = Field(4, ge=0)
    spectra: Literal["auto", "svd", "gram", "randomized", "none"] = "auto"
    svd_up_to: int = Field(512, ge=1)
    gram_up_to: int = Field(2048, ge=1)
    k: int = Field(16, ge=1)
    alpha: float = Field(0.1, gt=0, lt=1)
    top: tuple[float, ...] = (0.05, 0.1, 0.2)
    seed: int = Field(0, ge=0)
