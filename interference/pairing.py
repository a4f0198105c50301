"""Pairing: do two checkpoints belong together as base and tuned model? Told from headers and configuration; of the
weights only a head that is stored beside the embedding it is tied to is read, to see whether it is a copy.

Findings come in three grades. Fatal: numbers would mean nothing, so the work stops. Warning: numbers are right for what was
compared, which may not be what was meant. Note: worth knowing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from interference.adapter import adapter_changes
from interference.checkpoint import Checkpoint
from interference.configurations import differing
from interference.conversion import Conversion, Parameters
from interference.errors import InputError
from interference.tied import TiedHead
from interference.tree import Change

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


@dataclass(frozen=True)
class Pair:
    """A tuned model beside its base, both under the names of the model's parameters.

    after : the tuned model's tensors; None for an adapter, whose changes are made by `terms`, {parameter: maker}.
    findings : of the audit, fatal ones first.
    """

    before: Parameters
    after: Parameters | None
    findings: tuple[Finding, ...]
    terms: Mapping[str, Callable[[], Change]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The parameters that may have changed."""
        return list(self.terms) if self.after is None else self.before.names()

    def change(self, name: str) -> Change:
        """tuned - base of one parameter in float32; an adapter's LoRA by its factors."""
        if self.after is None:
            return self.terms[name]()
        return self.after.tensor(name).float() - self.before.tensor(name).float()


@dataclass(frozen=True)
class Base:
    """A base model, opened to be compared with tuned ones."""

    conversion: Conversion
    parameters: Parameters

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Base:
        """Raises InputError for an adapter, quantized weights, and tensors that make no model."""
        if checkpoint.adapter is not None:
            raise InputError(
                got=f"{checkpoint.path}, an adapter, as the base",
                expected="a model",
                remedy="give the model that the adapter was trained on",
            )
        _refuse_quantized(checkpoint)
        conversion = Conversion(checkpoint)
        return cls(conversion, conversion.read(checkpoint))

    def pair(self, tuned: Checkpoint) -> Pair:
        """A tuned model in any format that Checkpoint opens, or an adapter of this base, with the findings of its audit.

        Raises InputError for an adapter that is no change of this base's weights.
        """
        base = self.parameters.checkpoint
        if tuned.adapter is not None:
            found = [*_tokenizers(base, tuned)]
            terms = adapter_changes(self.parameters, tuned, TiedHead.of(self.parameters, self.conversion.module))
            return Pair(self.parameters, None, tuple(found), terms)
        fitted = tuned.like(base, self.parameters.names())
        after = self.conversion.read(fitted)
        found = compare(self.parameters, after)
        if fitted.store is not tuned.store:
            found.append(
                Finding(
                    "names",
                    NOTE,
                    f"{tuned.path}, whose tensors bear another prefix ({next(iter(tuned.shapes))!r})",
                    "the base's names",
                    "they are read without it",
                )
            )
        return Pair(self.parameters, after, tuple(found))


def _refuse_quantized(base: Checkpoint) -> None:
    settings = base.config.get("quantization_config")
    if settings:
        raise InputError(
            got=f"{base.path}, whose weights are quantized ({str(settings)[:100]})",
            expected="weights in bf16, fp16, float32 or float64",
            remedy="load the model dequantized and save it: from_pretrained(path, dtype='bfloat16'), dequantize(), "
            "save_pretrained(path)",
        )


def compare(before: Parameters, after: Parameters) -> list[Finding]:
    """Everything that headers, configurations and tokenizers say about a pair, fatal findings first."""
    base, tuned = before.checkpoint, after.checkpoint
    found = [*_family(base, tuned), *_names(before, after), *_shapes(before, after)]
    if not found:  # of one family: the rest can be asked
        found += [*_configuration(base, tuned), *_tokenizers(base, tuned)]
    found += [*_dtypes(base, tuned), *_heads(base, tuned), *_swapped(base, tuned)]
    order = (FATAL, WARNING, NOTE)
    return sorted(found, key=lambda f: order.index(f.severity))


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


def _names(before: Parameters, after: Parameters) -> Iterator[Finding]:
    left, right, tuned = set(before.names()), set(after.names()), after.checkpoint
    if left == right:
        return
    name = sorted(left ^ right)[0]
    yield Finding(
        "names",
        FATAL,
        f"tensor {name!r}, which only the {'base' if name in left else 'tuned'} checkpoint ({tuned.path}) has"
        f" (one of {len(left ^ right)})",
        "the same tensors in both",
        "give the base that this checkpoint was trained from, both saved by the same library",
        name,
    )


def _shapes(before: Parameters, after: Parameters) -> Iterator[Finding]:
    tuned, known = after.checkpoint, set(after.names())
    for name in before.names():
        if name not in known or before.shape(name) == after.shape(name):
            continue
        (rows, *rest), (others, *more) = before.shape(name), after.shape(name)
        padded = _VOCABULARY.search(name) and rest == more
        yield Finding(
            "vocabulary padding" if padded else "shapes",
            FATAL,
            f"{name} of shape {before.shape(name)} (base) and {after.shape(name)} ({tuned.path})",
            f"one shape{f': {rows} and {others} rows are one vocabulary padded differently' if padded else ''}",
            "resize both to one size: model.resize_token_embeddings(n), then save_pretrained"
            if padded
            else "give the base that this checkpoint was trained from",
            name,
        )
        return


def _configuration(base: Checkpoint, tuned: Checkpoint) -> Iterator[Finding]:
    changing, harmless = differing(base.config, tuned.config)
    for key in changing:
        yield Finding(
            "configuration",
            FATAL,
            f"{key} {base.config[key]!r} (base) and {tuned.config[key]!r} ({tuned.path}) in config.json",
            "one configuration: weights that another architecture reads mean something else",
            "give the base that this checkpoint was trained from",
        )
    if harmless:
        told = ", ".join(f"{key} {base.config[key]!r} and {tuned.config[key]!r}" for key in harmless)
        yield Finding(
            "configuration",
            WARNING,
            f"config.json of the base and of {tuned.path} that differ in {told}",
            "one configuration",
            "nothing need be done: these do not change what the weights compute; the base's are used",
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
                "the copy, which equals the embedding, is left out, as transformers does",
                "lm_head.weight",
            )
        elif c.untied_head:
            yield Finding(
                "tied head",
                WARNING,
                f"{c.path} ({which}), whose config.json ties the head to the embedding while its files hold a head that differs",
                "one weight, or tie_word_embeddings false",
                "the head is taken as a weight of its own, as transformers does; say so in config.json if it is meant",
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
