"""Truncated Taylor coefficients of a causal LM's token log-probabilities, forward only (`taylor_jets`)."""

from interference.taylor.head import TokenTerms
from interference.taylor.run import taylor_jets

__all__ = ["TokenTerms", "taylor_jets"]
