"""Weight-space geometry: how far, how sparsely and in which directions models moved from their base, beside chance.

    from interference import Checkpoint, geometry

    survey = geometry.Survey.of(base, {"math": Checkpoint.open("rl_math"), "code": Checkpoint.open("rl_code")})
    tables = survey.tables(folder)      # {"norms": ..., "masks": ..., ...}; `interference.records.GEOMETRY` has the columns

`Survey` streams the checkpoints tensor by tensor. The measures themselves are functions of tensors and counts, in `masks`,
`subspaces`, `spectra`, `neurons`, `projection` and `nulls`.
"""

from interference.geometry.settings import Settings
from interference.geometry.survey import Survey

__all__ = ["Settings", "Survey"]
