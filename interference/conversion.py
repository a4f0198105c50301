"""A checkpoint's tensors under the names of the model's parameters, where the two differ (fused experts and the like).

transformers stores some models otherwise than it runs them: a mixture of experts has one tensor per expert on disk and one
fused three-dimensional parameter in the model. The rules are transformers' own (`conversion_mapping`), which `from_pretrained`
follows; they rearrange tensors (stack, concatenate, split, transpose), so they are linear and carry over to differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interference.checkpoint import Checkpoint
from interference.errors import InputError
from interference.formats import first_line


@dataclass(frozen=True)
class Group:
    """Tensors on disk that a converter makes parameters of; sources: (name on disk, the pattern it matched)."""

    first: str
    converter: Any
    sources: list[tuple[str, str]]


@dataclass(frozen=True)
class Parameters:
    """A checkpoint read under its model's parameter names.

    plain : {parameter: name on disk}.  fused : {parameter: (the group that makes it, its shape)}.
    """

    checkpoint: Checkpoint
    module: nn.Module | None
    plain: dict[str, str]
    fused: dict[str, tuple[Group, tuple[int, ...]]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Parameter names; what the model does not know keeps its name on disk."""
        return [*self.plain, *self.fused]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return self.fused[name][1] if name in self.fused else self.checkpoint.shapes[self.plain[name]]

    def dtype(self, name: str) -> str:
        """The dtype a parameter is stored in, as safetensors calls it."""
        stored = self.fused[name][0].sources[0][0] if name in self.fused else self.plain[name]
        return self.checkpoint.dtypes[stored]

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """A function that gives rows start:stop of a parameter's first dimension; one that is converted is held meanwhile."""
        if name not in self.fused:
            return lambda start, stop: self.checkpoint.block(self.plain[name], start, stop)
        whole = self.tensor(name)
        return lambda start, stop: whole[start:stop]

    def tensor(self, name: str) -> Tensor:
        """A parameter in its stored dtype."""
        if name not in self.fused:
            return self.checkpoint.tensor(self.plain[name])
        group = self.fused[name][0]
        found = _convert(group, {n: self.checkpoint.tensor(n) for n, _ in group.sources}, self.module)
        return found[name]


class Conversion:
    """How the architecture of a checkpoint stores its parameters."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base

    @cached_property
    def module(self) -> nn.Module | None:
        """The model without weights (on the meta device); None where transformers does not know it."""
        return _skeleton(self.base.home)

    @cached_property
    def rules(self) -> list[Any]:
        """transformers' conversions for this model; none for most."""
        if not _has_rules(self.base.config):
            return []
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(get_model_conversion_mapping(self.module)) if self.module is not None else []

    def read(self, checkpoint: Checkpoint) -> Parameters:
        """A checkpoint of this architecture under its parameter names.

        Raises InputError for tensors that do not convert (such as experts that are missing).
        """
        if not self.rules or self.module is None:
            return Parameters(checkpoint, None, {name: name for name in checkpoint.names()})
        plain: dict[str, str] = {}
        groups: dict[str, Group] = {}
        for name, target, pattern, converter in _targets(checkpoint.names(), self.module, deepcopy(self.rules)):
            if converter is None:
                plain[target] = name
            else:
                groups.setdefault(target, Group(target, converter, [])).sources.append((name, pattern))
        fused, wanted = {}, self.module.state_dict()
        for group in groups.values():
            _check_linear(group, checkpoint)
            empty = {n: torch.empty(checkpoint.shapes[n], device="meta") for n, _ in group.sources}
            try:
                made = _convert(group, empty, self.module)
            except Exception as error:  # torch and transformers raise many types for tensors that do not fit
                raise _unfit(checkpoint, group, first_line(error)) from error
            for name, tensor in made.items():
                if name not in wanted or wanted[name].shape != tensor.shape:
                    raise _unfit(checkpoint, group, f"{name} of shape {tuple(tensor.shape)}")
                fused[name] = group, tuple(tensor.shape)
        return Parameters(checkpoint, self.module, plain, fused)


def _targets(names: list[str], module: nn.Module, rules: list[Any]) -> Iterator[tuple[str, str, str, Any]]:
    """(name on disk, parameter, pattern, converter or None), by the rules and in the order of transformers' own loader."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known = getattr(module, "base_model_prefix", ""), module.state_dict()
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:  # a tensor that the model does not have; it matters only if it changed
            yield name, name, "", None
        else:
            yield name, target, pattern or "", by_pattern[pattern] if pattern is not None else None


def _convert(group: Group, tensors: dict[str, Tensor], module: nn.Module | None) -> dict[str, Tensor]:
    converter = deepcopy(group.converter)  # it collects tensors in itself
    for name, pattern in group.sources:
        converter.add_tensor(group.first, name, pattern, tensors[name])
    made = converter.convert(group.first, model=module, config=getattr(module, "config", None))
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _check_linear(group: Group, checkpoint: Checkpoint) -> None:
    """transformers' plain operations move numbers about; those of quantizers compute, and do not carry over to differences."""
    odd = [op for op in group.converter.operations if type(op).__module__ != "transformers.core_model_loading"]
    if odd:
        raise _unfit(checkpoint, group, f"stored by way of {type(odd[0]).__name__}")


def _unfit(checkpoint: Checkpoint, group: Group, why: str) -> InputError:
    return InputError(
        got=f"{checkpoint.path} whose tensors {group.sources[0][0]!r} and {len(group.sources) - 1} more "
        f"do not make {group.first} ({why})",
        expected="all tensors of the model, as transformers saves them",
        remedy="load and save the model with transformers: from_pretrained(...).save_pretrained(path)",
    )


def _has_rules(config: dict[str, Any]) -> bool:
    """Whether transformers has conversions for this model or a part of it."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers before conversions
        return False
    return any(get_checkpoint_conversion_mapping(kind) is not None for kind in _kinds(config))


def _kinds(config: dict[str, Any]) -> Iterator[str]:
    """The model types and architectures that a configuration names, those of its parts included."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _kinds(value)
        elif key == "model_type" and isinstance(value, str):
            yield value
        elif key == "architectures" and isinstance(value, list):
            yield from (name for name in value if isinstance(name, str))


def _skeleton(home: Path | None) -> nn.Module | None:
    from transformers import AutoConfig, AutoModelForCausalLM

    if home is None:
        return None
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(home, trust_remote_code=False)
            module: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError):
        return None
    return module
