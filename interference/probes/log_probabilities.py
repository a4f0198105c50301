"""Token log-probabilities of given responses, and the exact divergence at every state that they visit, cached on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from interference import domain as data
from interference import measurement, records
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import check_domain
from interference.model import Model

Array = NDArray[np.float64]
PerToken = tuple[Array, ...]
_CHUNK = 1024  # distinct sequences in a file


def token_log_probabilities(
    model: Model, domain: Domain, *, cache: str | os.PathLike[str] | None = None, batch_tokens: int = 16384
) -> PerToken:
    """log p(y_t | x, y_<t) of every response token: one array (T,) per sequence of the domain, float64.

    Equal sequences are computed once. With `cache`, a folder, results are kept in safetensors files named by the digest of
    the model's weights, its dtype and the sequences; an interrupted call goes on with the file that is missing.

    Raises:
        InputError: sequences that the model has no room for, and a damaged cache file.
    """
    return _per_token([model], domain, "logps", _label_log_probabilities, cache, batch_tokens)


def state_divergences(
    policy: Model,
    reference: Model,
    domain: Domain,
    *,
    cache: str | os.PathLike[str] | None = None,
    batch_tokens: int = 16384,
) -> PerToken:
    """KL(policy(. | x, y_<t) || reference(. | x, y_<t)) at every visited prefix: one array (T,) per sequence, float64.

    The sum over the vocabulary takes the place of the sampled token (Rao-Blackwell): same mean over the policy's own
    responses as log-ratios of sampled tokens, less variance; never negative but for rounding, exactly 0 for equal models.
    Cached like `token_log_probabilities`.

    Raises:
        InputError: vocabularies of different size, sequences without room, and a damaged cache file.
    """
    return _per_token([policy, reference], domain, "kl", _divergence, cache, batch_tokens)


def _label_log_probabilities(models: Sequence[Model], batch: data.Batch) -> Tensor:
    labels = batch.input_ids[batch.targets][:, None]
    return measurement.log_probabilities(models[0], batch).gather(-1, labels)[:, 0]


def _divergence(models: Sequence[Model], batch: data.Batch) -> Tensor:
    p, q = (measurement.log_probabilities(m, batch.to(m.device)).to(batch.input_ids.device) for m in models)
    if p.shape != q.shape:
        raise InputError(
            got=f"vocabularies of {p.shape[-1]} and {q.shape[-1]} tokens",
            expected="policies over one vocabulary",
            remedy="compare models that share a tokenizer",
        )
    p, q = p.double(), q.double()
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def _per_token(
    models: Sequence[Model],
    domain: Domain,
    what: str,
    compute: Callable[[Sequence[Model], data.Batch], Tensor],
    cache: str | os.PathLike[str] | None,
    batch_tokens: int,
) -> PerToken:
    for model in models:
        check_domain(model, domain, "nll")
    distinct, where = domain.distinct()
    of = [[m.checksum(), str(m.dtype)] for m in models] if cache is not None else []
    found: list[Array] = []
    for start in range(0, len(distinct), _CHUNK):
        chunk = distinct[start : start + _CHUNK]
        path = None
        if cache is not None:
            key = records.digest([what, of, [[s.prompt, s.response] for s in chunk]])
            path = Path(cache) / f"{what}-{key}.safetensors"
        if path is None or not path.is_file():
            values = _computed(models, chunk, compute, batch_tokens)
            if path is not None:
                _write(path, values)
        else:
            values = _read(path, [len(s.response) for s in chunk])
        found += values
    return tuple(found[i] for i in where)


def _computed(
    models: Sequence[Model],
    sequences: Sequence[data.Sequence],
    compute: Callable[[Sequence[Model], data.Batch], Tensor],
    batch_tokens: int,
) -> list[Array]:
    out: list[Array] = [np.zeros(0)] * len(sequences)
    for batch in data.batches(sequences, models[0].pad, min(m.fit_tokens(batch_tokens) for m in models)):
        flat = compute(models, batch.to(models[0].device)).double().cpu().numpy()
        lengths = batch.targets.sum(1).numpy()
        for place, values in zip(batch.index, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
            out[place] = values
    return out


def _write(path: Path, values: Sequence[Array]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    lengths = np.array([len(v) for v in values], dtype=np.int64)
    save_file({"values": np.concatenate(values), "lengths": lengths}, part)
    part.replace(path)


def _read(path: Path, lengths: Sequence[int]) -> list[Array]:
    try:
        stored = load_file(path)
        whole = stored["lengths"].tolist() == list(lengths) and len(stored["values"]) == sum(lengths)
    except (SafetensorError, KeyError, OSError) as error:
        raise _damaged(path) from error
    if not whole:
        raise _damaged(path)
    return list(np.split(stored["values"], np.cumsum(lengths)[:-1]))


def _damaged(path: Path) -> InputError:
    return InputError(
        got=f"{path}, which is damaged",
        expected="a cache file as this package wrote it",
        remedy="delete that file and run again",
    )
