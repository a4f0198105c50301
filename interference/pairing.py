"""Pairing: do two checkpoints belong together as base and tuned model? Told from headers and configuration; no weight is read.

Findings come in three grades. Fatal: numbers would mean nothing, so the work stops. Warning: numbers are right for what was
compared, which may not be what was meant. Note: worth knowing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from interference.checkpoint import Checkpoint
from interference.errors import InputError

_MAY_DIFFER = {  # what config.json says about the file or about generation, not about the function of the weights
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "attn_implementation",
    "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "model_type",
}  # fmt: skip
_VOCABULARY = re.compile(r"(embed_tokens|wte|embed_in|lm_head|embed_out|word_embeddings)\.weight$")
FATAL, WARNING, NOTE = "fatal", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """What an audit of a pair found. `tensor` is empty where it is about the whole; got, expected, remedy as in InputError."""

    check: str
    severity: str
    got: str
    expected: str
    remedy: str
    tensor: str = ""

    @property
    def message(self) -> str:
        """All three in one line."""
        return f"{self.got}; expected {self.expected}; {self.remedy}"


def stop_at_fatal(findings: Iterable[Finding]) -> None:
    """Raise InputError for the first fatal finding."""
    for f in findings:
        if f.severity == FATAL:
            raise InputError(got=f.got, expected=f.expected, remedy=f.remedy)


def compare(base: Checkpoint, tuned: Checkpoint) -> list[Finding]:
    """Everything that headers, configurations and tokenizers say about a pair, fatal findings first."""
    found = [*_family(base, tuned), *_names(base, tuned), *_shapes(base, tuned)]
    if not found:  # of one family: the rest can be asked
        found += [*_configuration(base, tuned), *_tokenizers(base, tuned)]
    found += [*_dtypes(base, tuned), *_heads(base, tuned), *_swapped(base, tuned)]
    order = (FATAL, WARNING, NOTE)
    return sorted(found, key=lambda f: order.index(f.severity))


def shared_names(base: Checkpoint, tuned: Iterable[Checkpoint]) -> list[str]:
    """The tensors that all have, in the base's order."""
    others = [set(t.names()) for t in tuned]
    return [n for n in base.names() if all(n in names for names in others)]


def _family(base: Checkpoint, tuned: Checkpoint) -> Iterator[Finding]:
    kinds = base.config.get("model_type"), tuned.config.get("model_type")
    if kinds[0] != kinds[1]:
        yield Finding(
            "family",
            FATAL,
            f"a base of type {kinds[0]!r} and {tuned.path} of type {kinds[1]!r}",
            "checkpoints of one architecture",
            "give the base that this checkpoint was trained from",
        )
    sizes = base.config.get("vocab_size"), tuned.config.get("vocab_size")
    if sizes[0] != sizes[1]:
        yield Finding(
            "vocabulary",
            FATAL,
            f"vocabularies of {sizes[0]} (base) and {sizes[1]} tokens ({tuned.path})",
            "one vocabulary",
            "give the base that this checkpoint was trained from, before tokens were added or padded",
        )


def _names(base: Checkpoint, tuned: Checkpoint) -> Iterator[Finding]:
    left, right = set(base.names()), set(tuned.names())
    if left == right:
        return
    name = sorted(left ^ right)[0]
    prefix = _renaming(left, right)
    yield Finding(
        "names",
        FATAL,
        f"tensor {name!r}, which only the {'base' if name in left else 'tuned'} checkpoint ({tuned.path}) has"
        + (f" (the others differ by the prefix {prefix!r})" if prefix else f" (one of {len(left ^ right)})"),
        "the same tensors in both",
        "give the base that this checkpoint was trained from, both saved by the same library",
        name,
    )


def _renaming(left: set[str], right: set[str]) -> str:
    """A prefix by which all names differ, if that is all."""
    for short, long in ((left, right), (right, left)):
        one = min(short, default="")
        for other in long:
            if one and other.endswith(f".{one}"):
                prefix = other.removesuffix(one)
                if {f"{prefix}{n}" for n in short} == long:
                    return prefix
    return ""


def _shapes(base: Checkpoint, tuned: Checkpoint) -> Iterator[Finding]:
    for name in base.names():
        if name not in tuned.shapes or base.shapes[name] == tuned.shapes[name]:
            continue
        rows = base.shapes[name][:1], tuned.shapes[name][:1]
        padded = _VOCABULARY.search(name) and base.shapes[name][1:] == tuned.shapes[name][1:]
        yield Finding(
            "vocabulary padding" if padded else "shapes",
            FATAL,
            f"{name} of shape {base.shapes[name]} (base) and {tuned.shapes[name]} ({tuned.path})",
            f"one shape{f': {rows[0][0]} and {rows[1][0]} rows are one vocabulary padded differently' if padded else ''}",
            "resize both to one size: model.resize_token_embeddings(n), then save_pretrained"
            if padded
            else "give the base that this checkpoint was trained from",
            name,
        )
        return


def _configuration(base: Checkpoint, tuned: Checkpoint) -> Iterator[Finding]:
    for key in sorted(base.config.keys() & tuned.config.keys() - _MAY_DIFFER):
        if base.config[key] != tuned.config[key]:
            yield Finding(
                "configuration",
                FATAL,
                f"{key} {base.config[key]!r} (base) and {tuned.config[key]!r} ({tuned.path}) in config.json",
                "one configuration: weights that another architecture reads mean something else",
                "give the base that this checkpoint was trained from",
            )


def _tokenizers(base: Checkpoint, tuned: Checkpoint) -> Iterator[Finding]:
    files = [c.path / "tokenizer.json" for c in (base, tuned)]
    if not all(f.is_file() for f in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    vocabularies = [c.tokenizer().get_vocab() for c in (base, tuned)]
    if vocabularies[0] != vocabularies[1]:
        odd = sorted(vocabularies[0].items() ^ vocabularies[1].items())[0]
        yield Finding(
            "tokenizer",
            FATAL,
            f"tokenizers that disagree, first about {odd[0]!r}, in {base.path} and {tuned.path}",
            "one vocabulary",
            "give the base that this checkpoint was trained from",
        )


def _dtypes(base: Checkpoint, tuned: Checkpoint) -> Iterator[Finding]:
    changed = Counter(
        (base.dtypes[n], tuned.dtypes[n])
        for n in base.names()
        if n in tuned.dtypes and base.dtypes[n] != tuned.dtypes[n]
    )
    for (before, after), count in changed.items():
        yield Finding(
            "dtype",
            WARNING,
            f"{count} tensors stored in {before} (base) and {after} ({tuned.path})",
            "one dtype in both",
            "rounding from one to the other looks like a change: compare in the lower precision, or read sparsity with care",
        )


def _heads(base: Checkpoint, tuned: Checkpoint) -> Iterator[Finding]:
    for which, c in (("base", base), ("tuned", tuned)):
        if c.tied_duplicate:
            yield Finding(
                "tied head",
                NOTE,
                f"{c.path} ({which}), which ties its head to the embedding and stores it a second time",
                "one copy of tied weights",
                "the copy is left out, as transformers does",
                "lm_head.weight",
            )


def _swapped(base: Checkpoint, tuned: Checkpoint) -> Iterator[Finding]:
    """The base's own config.json names the tuned model as what it was made from."""
    origin = str(base.config.get("_name_or_path") or "").rstrip("/")
    if origin and origin in {str(tuned.path), str(tuned.path.resolve())} and tuned.path != base.path:
        yield Finding(
            "swapped",
            WARNING,
            f"{base.path} (base), whose config.json says it was made from {tuned.path} (tuned)",
            "the base first, the tuned model second",
            "swap the two if that is so",
        )
