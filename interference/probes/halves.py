"""Two halves of a domain's prompts: what changes between them is sampling noise."""

from __future__ import annotations

import numpy as np

from interference.domain import Domain
from interference.errors import InputError


def prompt_halves(domain: Domain, seed: int = 0) -> tuple[Domain, Domain]:
    """A random half of the prompts, with all their responses, and the other half (one prompt less where they are odd).

    Raises InputError for a domain with a single prompt.
    """
    prompts = list(dict.fromkeys(domain.prompt_ids))
    if len(prompts) < 2:
        raise InputError(
            got=f"domain {domain.name!r} with a single prompt",
            expected="at least two prompts, since half of them is compared with the other half",
            remedy="add rows with other prompts (and another `prompt_id`)",
        )
    order = np.random.default_rng(seed).permutation(len(prompts))
    first = {prompts[i] for i in order[: (len(prompts) + 1) // 2]}
    parts = [tuple(s for s in domain.sequences if (s.prompt_id in first) == wanted) for wanted in (True, False)]
    return Domain(domain.name, parts[0]), Domain(domain.name, parts[1])
