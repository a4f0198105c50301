"""Fresh rollouts of a causal language model, and the verifiers that score them."""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from interference.errors import InputError, nearest

Verifier = Callable[..., Sequence[float]]


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    prompt_index: position of its prompt in the sequence given to `sample`.
    prompt_token_ids: the prompt's ids, without padding.
    response_token_ids: the sampled ids; the end token is the last of them if it was generated, else it is absent.
    response: the response's text, special tokens stripped.
    eos: whether the response ended itself (false: cut at `max_new_tokens`).
    """

    prompt_index: int
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    response: str
    eos: bool


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Rollout]:
    """Sample `samples` responses to every prompt, y ~ softmax(z / temperature) over the whole vocabulary.

    No top-k, no top-p, no penalties: whatever the checkpoint's own generation defaults say is set aside, because an
    expectation over the policy needs draws from the policy itself. Prompts are text, or token ids to be used as they
    are. They run through transformers' `generate`, shortest first, in left-padded batches of `batch_size` sequences.

    The draws depend on `seed`, `batch_size`, the prompts and the device, and on nothing else: every batch seeds
    torch's generators with a hash of (seed, batch number), and the callers' generator states are put back afterwards.

    Args:
        model: a transformers causal language model; its training mode and generation defaults are restored.
        tokenizer: its tokenizer; needs an end token, or the model's generation configuration does.
        samples: responses per prompt.
        max_new_tokens: longest response in tokens, end token included.
        temperature: divides the logits; 1 samples the policy itself.
        batch_size: sequences (not prompts) per call of `generate`.
        progress: called with (sequences done, sequences in all) after each batch.

    Returns:
        `len(prompts) * samples` rollouts, ordered by prompt, then by sample.

    Raises:
        InputError: no prompts, an empty prompt, a non-positive setting, or no end token.
    """
    settings = {
        "samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size,
    }  # fmt: skip
    for name, number in settings.items():
        if not number > 0:
            raise InputError(got=f"{name}: {number}", expected="a positive number", remedy=f"give a positive {name}")
    ids = [_prompt_ids(tokenizer, prompt, index) for index, prompt in enumerate(prompts)]
    if not ids:
        raise InputError(got="no prompts", expected="at least one prompt", remedy="give prompts to sample from")
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    config = GenerationConfig(
        do_sample=True, temperature=float(temperature), top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends), pad_token_id=pad, use_cache=True,
    )  # fmt: skip
    # Equal lengths side by side keep the padding small; the sort is stable, so the order is reproducible.
    order = sorted((i for i in range(len(ids)) for _ in range(samples)), key=lambda i: len(ids[i]))
    found: list[list[Rollout]] = [[] for _ in ids]
    with _sampling(model, config):
        for number, start in enumerate(range(0, len(order), batch_size)):
            indices = order[start : start + batch_size]
            torch.manual_seed(_derive(seed, number))
            responses = _generate(model, [ids[i] for i in indices], pad, config)
            for index, response in zip(indices, responses, strict=True):
                found[index].append(_rollout(tokenizer, index, ids[index], response, ends))
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return [rollout for group in found for rollout in group]


def score(
    verifier: Verifier,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """The verifier's reward for every completion.

    The verifier is called once, as TRL calls a reward function: `f(prompts=..., completions=..., **columns)`, every
    argument a list with one entry per completion: text, or lists of messages where the prompts are chats.

    Raises:
        InputError: the verifier raises, returns another number of rewards, or a reward that is None, not a number or not finite.

    >>> score(lambda prompts, completions, answer: [float(c == a) for c, a in zip(completions, answer)],
    ...       ["1 + 1 =", "1 + 2 ="], ["2", "4"], {"answer": ["2", "3"]})
    [1.0, 0.0]
    """
    name = getattr(verifier, "__qualname__", repr(verifier))
    lists = {key: list(column) for key, column in columns.items() if key not in ("prompts", "completions")}
    for key, column in {"completions": completions, **lists}.items():
        if len(column) != len(prompts):
            raise InputError(
                got=f"{len(column)} entries in column '{key}' for {len(prompts)} prompts",
                expected="one entry per completion in every column",
                remedy="repeat each prompt's columns for each of its completions",
            )
    try:
        rewards = verifier(prompts=list(prompts), completions=list(completions), **lists)
    except Exception as error:  # the user's code can raise anything
        raise InputError(
            got=f"verifier {name}, which raises {type(error).__name__} ({_first_line(error)})",
            expected="a reward for every completion",
            remedy="mend the verifier, then run the same command again: what was sampled is kept",
        ) from error
    if not hasattr(rewards, "__len__") or len(rewards) != len(completions):
        size = len(rewards) if hasattr(rewards, "__len__") else type(rewards).__name__
        raise InputError(
            got=f"{size} rewards from verifier {name} for {len(completions)} completions",
            expected="a list with one reward per completion",
            remedy="return a list of floats as long as `completions`",
        )
    return [_reward(name, index, reward) for index, reward in enumerate(rewards)]


def load_verifier(name: str, search_path: str | Path | Sequence[str | Path] = ()) -> Verifier:
    """The function that `module:function` names, the module looked up on Python's path and then in `search_path`.

    Raises:
        InputError: the name has another form, the module or the function does not exist, or it is not callable.

    >>> load_verifier("math:fsum").__name__
    'fsum'
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(
            got=f"verifier: {name}",
            expected="module:function",
            remedy="name it as in my_package.verifiers:math",
        )
    folders = [search_path] if isinstance(search_path, (str, Path)) else list(search_path)
    module = _import(module_name, [str(Path(folder).resolve()) for folder in folders])
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key in vars(module) if callable(getattr(module, key)) and not key.startswith("_")]
        raise InputError(
            got=f"verifier: {name}",
            expected=f"a function '{function_name}' in {getattr(module, '__file__', module_name)}",
            remedy=f"define it, or correct the name ({nearest(function_name, known)})",
        )
    verifier: Verifier = function
    return verifier


def _prompt_ids(tokenizer: Any, prompt: str | Sequence[int], index: int) -> tuple[int, ...]:
    ids = tuple(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else tuple(prompt)
    if not ids:
        raise InputError(
            got=f"prompt {index} with no tokens",
            expected="prompts of at least one token",
            remedy="remove the prompt, or begin it with the tokenizer's start token",
        )
    return ids


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a response: the tokenizer's and the model's own."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = declared if isinstance(declared, (list, tuple)) else [declared]
    ends = {int(end) for end in (*own, tokenizer.eos_token_id) if end is not None}
    if not ends:
        raise InputError(
            got="a tokenizer and a model without an end token",
            expected="an eos_token",
            remedy="set tokenizer.eos_token, else no response can end",
        )
    return ends


def _derive(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"rollouts {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


@contextmanager
def _sampling(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode and `config` as the model's only generation defaults; random states restored on leaving."""
    # `generate` fills what a configuration leaves unset from the model's own (a repetition penalty, a typical_p).
    defaults, training = model.generation_config, model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.generation_config = config
            model.eval()
            yield
    finally:
        model.generation_config = defaults
        model.train(training)


def _generate(model: Any, prompts: list[tuple[int, ...]], pad: int, config: GenerationConfig) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    responses: list[list[int]] = output[:, width:].tolist()
    return responses


def _rollout(tokenizer: Any, index: int, prompt: tuple[int, ...], response: list[int], ends: set[int]) -> Rollout:
    # Cut at the first end token: what follows is padding, and the pad token may itself be an end token.
    stop = next((place for place, token in enumerate(response) if token in ends), None)
    kept = response if stop is None else response[: stop + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Rollout(index, prompt, tuple(kept), text, stop is not None)


def _reward(name: str, index: int, reward: Any) -> float:
    try:
        number = float(reward)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            got=f"reward {reward!r} for completion {index} from verifier {name}",
            expected="a finite number for every completion",
            remedy="return 0.0 where the completion cannot be judged, or leave such prompts out",
        )
    return number


def _import(module_name: str, folders: list[str]) -> Any:
    before = list(sys.path)
    sys.path.extend(folder for folder in folders if folder not in before)
    try:
        importlib.invalidate_caches()
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        looked = ", ".join(folders) or "Python's path"
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InputError(
                got=f"verifier module '{module_name}', which is not found in {looked}",
                expected="an importable module",
                remedy="correct the name, or put the file beside RUN.yaml or on PYTHONPATH",
            ) from error
        raise InputError(
            got=f"verifier module '{module_name}', which imports '{error.name}', not installed",
            expected="a module whose own imports work",
            remedy=f"install '{error.name}', or remove the import",
        ) from error
    except Exception as error:  # importing runs the user's code, which can raise anything
        raise InputError(
            got=f"verifier module '{module_name}', which raises {type(error).__name__} on import ({_first_line(error)})",
            expected="an importable module",
            remedy="mend the module",
        ) from error
    finally:
        sys.path[:] = before


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]
