"""Tensor names as trainers write them, brought back to the names that models know."""

from __future__ import annotations

from collections.abc import Iterable

_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, checkpointing
_WRAPPERS = {"module", "model", "policy", "actor", "state_dict", "app", "model_state_dict"}
# What a causal LM's own names begin with.
_HEADS = {
    "model",
    "transformer",
    "gpt_neox",
    "backbone",
    "lm_head",
    "module",
    "state_dict",
}
_HEAD = "lm_head.weight"


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """{name as a model knows it: name as it stands there}, without wrappers such as "module." or the "model." of a trainer.

    A leading part goes only where a causal LM's own names follow it and none stand beside it; what else stands beside it
    (a trainer's step, random states) is no part of the model and is left out.

    >>> unwrapped(["model.model.norm.weight", "model.lm_head.weight"])
    {'model.norm.weight': 'model.model.norm.weight', 'lm_head.weight': 'model.lm_head.weight'}
    >>> unwrapped(["model.norm.weight"])
    {'model.norm.weight': 'model.norm.weight'}
    """
    out = {}
    for name in names:
        short = name
        for part in _ANYWHERE:
            short = short.replace(part, "")
        out[short] = name
    while (wrapper := _wrapper(out)) is not None:
        out = {name.partition(".")[2]: long for name, long in out.items() if name.split(".")[0] == wrapper}
    return out


def _wrapper(names: Iterable[str]) -> str | None:
    firsts = {name.split(".")[0] for name in names}
    for first in sorted(firsts & _WRAPPERS):
        below = {name.split(".")[1] for name in names if name.startswith(f"{first}.")}
        if below & _HEADS and not (firsts - {first}) & _HEADS:
            return first
    return None


def fitted(names: Iterable[str], known: set[str]) -> dict[str, str] | None:
    """{known name: name as it stands there} by one prefix that all bear, or that all lack; None where no prefix does.

    What lies outside the prefix is no part of the model and is left out; a head may lack where it is tied.

    >>> fitted(["policy.norm.weight", "step"], {"norm.weight"})
    {'norm.weight': 'policy.norm.weight'}
    >>> fitted(["norm.weight"], {"model.norm.weight"})
    {'model.norm.weight': 'norm.weight'}
    """
    there, needed = set(names), known - {_HEAD}
    if not needed:
        return None
    probe = max(needed, key=len)
    for prefix in sorted(name.removesuffix(probe) for name in there if name.endswith(probe)):
        if all(prefix + name in there for name in needed):
            return {name.removeprefix(prefix): name for name in sorted(there) if name.startswith(prefix)}
    lead = probe.split(".")[0] + "."
    if all(name.removeprefix(lead) in there for name in needed):
        short = {name.removeprefix(lead) for name in needed}
        return {name: name.removeprefix(lead) for name in sorted(needed)} | {n: n for n in sorted(there - short)}
    return None
