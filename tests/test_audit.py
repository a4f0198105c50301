"""audit: right models pass by far, every planted bug is found and blamed on the mode that has it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_expansion import opened
from test_jets import directions, ragged
from test_numerics_traps import WithFunction, bound_early, gpt2, left_pad, per_batch_means, without_layer_norm
from tiny import qwen3, save
from torch import Tensor, nn
from toy import ToyConfig, ToyOutput, ToyTransformer
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from interference import Checkpoint, Domain, audit, expand
from interference import domain as data
from interference.checks import Audit, Check
from interference.checks.probe import make_probe, pad_token
from interference.checks.result import judge
from interference.cli import app
from interference.config import RunConfig
from interference.diagnose import diagnose
from interference.errors import InputError
from interference.model import Model, prepare
from interference.records import Run
from interference.taylor import attention, basis

TRUSTED = {"taylor": "trusted", "nested": "trusted", "reverse": "trusted"}


def refused(found: Audit) -> set[str]:
    return {mode for mode, verdict in found.verdicts.items() if verdict != "trusted"}


def test_a_true_float64_model_passes_by_orders_of_magnitude(toy: Model) -> None:
    found = audit(toy)
    table = found.to_frame()
    assert found.verdicts == TRUSTED
    assert found.ok
    assert table["passed"].all()
    assert found.notes == ()
    exact = table[~table["against"].str.startswith("differences")]
    assert exact["agreement"].max() < 1e-12
    assert table["agreement"].max() < 1e-6  # second differences of 104 tokens
    assert set(exact.loc[exact["check"] == "first order", "tolerance"]) == {1e-9}
    assert set(exact.loc[exact["check"] == "second order", "tolerance"]) == {1e-7}
    assert set(table["check"]) == {
        "first order", "second order", "value", "linearity", "padding and batches", "pairs and diagonal", "determinism",
        "symmetry", "weights",
    }  # fmt: skip
    assert {(r.mode, r.against) for r in found.rows if r.name == "second order"} >= {
        ("taylor", "nested"), ("taylor", "reverse"), ("nested", "reverse"), ("taylor", "differences of values"),
        ("nested", "differences of jvp"), ("reverse", "differences of values"),
    }  # fmt: skip
    found.raise_if_failed()


def test_a_checkpoint_passes_along_its_own_updates_and_sequences(checkpoints: Path) -> None:
    base, updates, domains = opened(checkpoints)
    found = audit(base, sequences=domains["a"], updates=updates, device="cpu")
    assert found.verdicts == TRUSTED
    assert found.dtype == "float32"
    assert (
        found.to_frame().query("check == 'first order' and against in ('nested', 'reverse')")["agreement"].max() < 1e-5
    )
    # A float64 Qwen3 has steps in float32: that is measured and said, and the tolerances follow.
    wide = audit(base, sequences=domains["a"], updates=updates, dtype=torch.float64, device="cpu")
    assert wide.ok
    assert any("float32 inside" in note for note in wide.notes)
    assert wide.rows[0].tolerance == 1e-5


def test_the_quick_part_passes_and_is_a_part(toy: Model) -> None:
    found = audit(toy, level="quick", engine="nested", updates={"u": directions(toy, 1)[0]}, sequences=ragged())
    assert found.verdicts == {"nested": "trusted", "reverse": "trusted"}
    assert {r.name for r in found.rows} == {"first order", "second order", "value", "padding and batches", "weights"}
    assert max(r.agreement for r in found.rows) < 1e-12
    assert found.summary.startswith("derivatives checked on 3 sequences")
    json.dumps(found.to_dict(), allow_nan=False)


def untied(padding: int | None) -> Model:
    module = ToyTransformer.seeded(0, ToyConfig(tie_word_embeddings=False))
    model = prepare(module)
    module.embed.padding_idx = padding
    return model


class Random(nn.Module):
    """The toy with noise that it draws in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ToyTransformer.seeded(0)
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> ToyOutput:
        logits = self.inner(input_ids).logits
        return ToyOutput(logits * (1 + 1e-3 * torch.rand(())))


class Writer(Random):
    """The toy that moves a weight, a little, whenever it runs."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> ToyOutput:
        self.inner.layers[0].norm1.weight.data.add_(1e-12)
        out: ToyOutput = self.inner(input_ids)
        return out


def drop_cross(patch: pytest.MonkeyPatch) -> Model:
    patch.setattr("interference.taylor.basis._cross", lambda basis, y, a, b: None)
    return prepare(ToyTransformer.seeded(0))


def drop_cross_where(patch: pytest.MonkeyPatch, diagonal: bool) -> Model:
    """The bug in one mode only, and only where there are several updates."""
    right = basis._cross

    def cross(b: basis.Basis, y: Tensor, a1: Tensor, b1: Tensor) -> None:
        if b.updates == 1 or b.diagonal is not diagonal:
            right(b, y, a1, b1)

    patch.setattr(basis, "_cross", cross)
    return prepare(ToyTransformer.seeded(0))


def short_sighted(patch: pytest.MonkeyPatch) -> Model:
    """Queries of a long sequence that miss their own key."""
    right = attention._limits

    def limits(steps: Any, T: int, S: int) -> list[int]:
        return [max(1, n - 1) if T > 96 else n for n in right(steps, T, S)]

    patch.setattr(attention, "_limits", limits)
    return prepare(ToyTransformer.seeded(0))


def native_layer_norm(patch: pytest.MonkeyPatch) -> Model:
    without_layer_norm(patch)
    return gpt2()


def per_batch(patch: pytest.MonkeyPatch) -> Model:
    patch.setattr("interference.derivatives.objective_gradient", per_batch_means)
    return prepare(ToyTransformer.seeded(0))


def padded_left(patch: pytest.MonkeyPatch) -> Model:
    patch.setattr("interference.domain._pad", left_pad)
    return prepare(ToyTransformer.seeded(0))


EVERY = {"taylor", "nested", "reverse"}
PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], Model], set[str], str]] = {
    "native layer norm": (native_layer_norm, {"nested"}, "second order of"),
    "custom Function": (lambda patch: prepare(WithFunction(bound_early)), EVERY, "Cube, a custom autograd.Function"),
    "left padding": (padded_left, EVERY, "padding and batches of"),
    "padding_idx": (lambda patch: untied(0), {"reverse"}, "first order of"),
    "per-batch means": (per_batch, {"reverse"}, "padding and batches of reverse against the loss'"),
    "dropped cross term": (drop_cross, {"taylor"}, "second order of"),
    "dropped cross term, pairs": (lambda patch: drop_cross_where(patch, False), {"taylor"}, "second order"),
    "dropped cross term, diagonal": (lambda patch: drop_cross_where(patch, True), {"taylor"}, "pairs and diagonal of"),
    "blocks of queries": (short_sighted, {"taylor"}, "order of"),
    "randomness": (lambda patch: prepare(Random()), EVERY, "relative error"),
    "weights written to": (lambda patch: prepare(Writer()), EVERY, "their checksum before"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_and_blamed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, guilty, words = PLANTED[bug]
    found = audit(plant(monkeypatch))
    assert refused(found) == guilty
    assert any(words in found.verdicts[mode] for mode in guilty)
    failed = [r for r in found.rows if not r.passed]
    assert failed
    assert all(r.remedy for r in failed)
    with pytest.raises(InputError, match=r"fail their audit.*Remedy: "):
        found.raise_if_failed()
    found.raise_if_failed([m for m in found.verdicts if m not in guilty])


def test_without_the_bugs_the_same_models_pass() -> None:
    for model in (gpt2(), untied(None), prepare(WithFunction(lambda z: z**3))):
        assert audit(model).verdicts == TRUSTED


def test_where_reverse_mode_raises_another_mode_must_confirm(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*args: Any) -> Any:
        raise NotImplementedError("derivative not implemented")

    monkeypatch.setattr("interference.derivatives.hvp", raising)
    found = audit(toy, level="quick")
    assert refused(found) == {"reverse"}
    assert "derivative not implemented" in found.verdicts["reverse"]
    assert any("compared with nested" in note for note in found.notes)
    assert audit(toy).verdicts["taylor"] == "trusted"


def test_rounding_is_excused_tenfold_and_said_but_a_small_error_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes in float64 was rounding; a derivative that is wrong by as little is wrong there, too."""
    from interference.checks import evidence, routes

    model = prepare(ToyTransformer.seeded(0, dtype=torch.float32))
    reached = audit(model, level="quick").rows[0].agreement
    strict = evidence.Tolerances(reached / 5, 1e-3, 1e-3, 2e-2)
    monkeypatch.setattr(evidence, "NARROW", strict)
    found = audit(model, level="quick")
    assert found.ok
    assert found.rows[0].tolerance == pytest.approx(10 * strict.first)
    assert "rounding of float32" in found.notes[-1]
    exact = routes.forward_terms

    def off(*args: Any, **kwargs: Any) -> routes.Terms:
        terms = exact(*args, **kwargs)
        return routes.Terms(terms.value, terms.first * (1 + 5e-5), terms.second)

    monkeypatch.setattr(evidence, "NARROW", evidence.Tolerances(1e-5, 1e-3, 1e-3, 2e-2))
    monkeypatch.setattr(routes, "forward_terms", off)
    assert refused(audit(model, level="quick")) == {"taylor", "reverse"}


def test_kinks_make_differences_say_nothing(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences that agree at no step must neither confirm nor blame."""
    noise = lambda f, order, start, steps=14: (f(0.0) * 0 + 1.0, 0.5)  # noqa: E731
    monkeypatch.setattr("interference.checks.routes.swept", noise)
    found = audit(toy)
    assert found.verdicts == TRUSTED
    assert sum("say nothing" in note for note in found.notes) == 3
    assert not any(r.against.startswith("differences") for r in found.rows)


def test_probes_hold_the_padding_token_ragged_lengths_and_every_update(toy: Model) -> None:
    settings = {"count": 4, "longest": 20, "directions": 2, "seed": 0}
    probe = make_probe(toy, None, [], **settings)  # type: ignore[arg-type]
    lengths = [len(s.prompt) + len(s.response) for s in probe.sequences]
    assert len(set(lengths)) > 2
    assert all(pad_token(toy) in s.prompt and pad_token(toy) in s.response for s in probe.sequences)
    equal = Domain("d", tuple(s for s in ragged() if len(s.response) == 3))
    cut = make_probe(toy, equal, [], **settings | {"longest": 3})  # type: ignore[arg-type]
    assert len({len(s.prompt) + len(s.response) for s in cut.sequences}) > 1
    big, small = directions(toy, 2)
    only = {"norm.weight": 1e-6 * small["norm.weight"]}
    rest = {n: x for n, x in big.items() if n != "norm.weight"}
    mixed = make_probe(toy, None, [rest, only], **settings).directions  # type: ignore[arg-type]
    assert all(float(d["norm.weight"].norm()) > 1e-2 * float(rest["embed.weight"].norm()) for d in mixed)


def test_of_two_modes_that_disagree_nobody_is_trusted() -> None:
    rows = [
        Check("first order", "taylor", "reverse", 1e-3, 1e-5),
        Check("second order", "taylor", "reverse", 0.0, 1e-3),
    ]
    judged, verdicts = judge(rows)
    assert [v[:7] for v in verdicts.values()] == ["refused", "refused"]
    assert "interference audit" in judged[0].remedy
    assert judge([Check("first order", "taylor", "reverse", float("nan"), 1e-5)])[1]["taylor"].startswith("refused")


def test_refusals_are_clear_where_only_the_others_fail(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode whose own checks pass while nothing confirms it, and one that was not tested."""

    def raising(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no such derivative")

    monkeypatch.setattr("interference.derivatives.gradient", raising)
    monkeypatch.setattr("interference.derivatives.hvp", raising)
    monkeypatch.setattr("interference.jets._nested", raising)
    for level in ("quick", "full"):
        found = audit(toy, level=level)  # type: ignore[arg-type]
        assert found.verdicts["taylor"] == "refused: no other mode confirms its first order"
        with pytest.raises(InputError, match=r"no other mode confirms.*Remedy: see why the other modes fail"):
            found.raise_if_failed(["taylor"])
    tested = Audit("float64", "quick", 1, 1, (), {"taylor": "trusted"})
    with pytest.raises(InputError, match=r"'nested', which this audit did not test.*level='full'"):
        tested.raise_if_failed(["nested"])
    with pytest.raises(InputError, match="did you mean 'nested'"):
        tested.raise_if_failed(["nestd"])


def test_expand_refuses_numbers_that_fail(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, updates, domains = opened(checkpoints)
    good = expand(base, updates, domains)["a"]
    with monkeypatch.context() as patch:
        drop_cross(patch)
        with pytest.raises(InputError, match=r"second order of taylor against reverse: relative error .*Remedy"):
            expand(base, updates, domains)
        wrong = expand(base, updates, domains, check=False)["a"]
        assert not np.allclose(wrong.curvature, good.curvature, rtol=1e-2)
        right = expand(base, updates, domains, engine="nested")["a"]
    np.testing.assert_allclose(right.curvature, good.curvature, rtol=1e-3)


@pytest.mark.parametrize("pairs", [True, False])
def test_expand_checks_the_code_that_it_runs(toy: Model, monkeypatch: pytest.MonkeyPatch, pairs: bool) -> None:
    """With several updates pairs and diagonal are two codes, and one update alone is a third."""
    updates = dict(zip("de", directions(toy, 2), strict=True))
    domains = {"d": Domain("d", tuple(ragged()))}
    expand(toy, updates, domains, pairs=pairs)
    drop_cross_where(monkeypatch, not pairs)
    with pytest.raises(InputError, match="second order of taylor against reverse"):
        expand(toy, updates, domains, pairs=pairs)
    expand(toy, updates, domains, pairs=not pairs)
    expand(toy, {"d": updates["d"]}, domains, pairs=pairs)


def test_diagnose_checks_the_code_that_it_runs(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_cross_where(monkeypatch, diagonal=True)
    request = config(checkpoints, tmp_path / "run").model_dump()
    request["models"].append({"name": "b", "model": str(checkpoints / "rl_b")})
    with pytest.raises(InputError, match="second order of taylor against reverse"):
        diagnose(RunConfig.model_validate(request | {"pairs": False}))


def test_long_sequences_are_checked_as_such(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is done in blocks of queries above 96 tokens; a sequence's middle is what a user's sequences have."""
    ids = torch.randint(0, 23, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    for prompt in (2, 60, 150, 299):
        long = data.Sequence(tuple(ids[:prompt]), tuple(ids[prompt:]), "long")
        settings = {"count": 3, "longest": 40, "directions": 1, "seed": 0}
        chosen = make_probe(toy, [*ragged(), long], [], **settings).sequences[-1]  # type: ignore[arg-type]
        assert len(chosen.prompt) + len(chosen.response) == 130
        assert long.prompt[-len(chosen.prompt) :] == chosen.prompt
        assert long.response[: len(chosen.response)] == chosen.response
    short_sighted(monkeypatch)
    assert audit(toy, level="quick", sequences=ragged()).ok
    assert refused(audit(toy, level="quick", sequences=[*ragged(), long])) >= {"taylor"}
    assert refused(audit(toy, level="quick")) >= {"taylor"}


def test_what_tests_nothing_is_refused_or_said(toy: Model) -> None:
    """0 / 0 is no agreement: zero updates, one sequence alone, weights that the sequences do not use."""
    weight = toy.parameters["norm.weight"]
    for nothing in ({}, {"norm.weight": torch.zeros_like(weight)}, {"norm.weight": torch.full_like(weight, torch.nan)}):
        with pytest.raises(InputError, match="updates of norm"):
            audit(toy, updates={"a": nothing}, level="quick")
    for one in (data.Sequence((1, 2), (3, 4), "a"), data.Sequence((1,), (2,), "a")):
        found = audit(toy, sequences=[one], level="quick")
        assert found.sequences == 2
        assert max(r.agreement for r in found.rows if r.name == "padding and batches") > 0
        two = make_probe(toy, [one], [], count=3, longest=9, directions=1, seed=0).sequences
        assert len({len(s.prompt) + len(s.response) for s in two}) == 2
    model = untied(None)
    row = torch.zeros_like(model.parameters["embed.weight"])
    row[22] = 1.0
    unused = {"a": {"embed.weight": row}}
    found = audit(model, sequences=[data.Sequence((1, 2), (3, 4), "a")], updates=unused, level="quick")
    assert any("tests little" in note for note in found.notes)


def config(checkpoints: Path, output: Path) -> RunConfig:
    here = str(checkpoints)
    return RunConfig.model_validate(
        {
            "base_model": f"{here}/base",
            "models": [{"name": "a", "model": f"{here}/rl_a"}],
            "domains": [{"name": "a", "data": f"{here}/a.jsonl"}],
            "output": str(output),
            "device": "cpu",
        }
    )


def test_diagnose_records_the_audit_and_runs_it_once(checkpoints: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = diagnose(config(checkpoints, tmp_path / "run"), say=said.append)
    manifest = Run.open(folder).manifest
    assert said.count("checking the derivatives") == 1
    assert {row["check"] for row in manifest["audit"]} >= {"first order", "second order", "padding and batches"}
    assert all(row["passed"] and row["agreement"] <= row["tolerance"] for row in manifest["audit"])
    assert any(note.startswith("derivatives checked on 3 sequences") for note in manifest["notes"])
    # An interrupted run finds it again.
    (folder / "manifest.json").unlink()
    folder.rename(tmp_path / "run.part")
    diagnose(config(checkpoints, tmp_path / "run"), say=said.append)
    assert said.count("resuming") == 1
    assert said.count("checking the derivatives") == 1


def test_diagnose_writes_nothing_when_derivatives_fail(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_cross(monkeypatch)
    with pytest.raises(InputError, match="fail their audit"):
        diagnose(config(checkpoints, tmp_path / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("raising", [("hvp",), ("hvp", "gradient")])
def test_diagnose_goes_on_without_reverse_mode(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raising: tuple[str, ...]
) -> None:
    """A trusted engine is enough unless attributions are asked for; gradients that are not trusted give no baseline."""

    def missing(*args: Any) -> Any:
        raise NotImplementedError("derivative not implemented")

    for name in raising:
        monkeypatch.setattr(f"interference.derivatives.{name}", missing)
    request = config(checkpoints, tmp_path / "run")
    with pytest.raises(InputError, match=r"not implemented.*Remedy: set `attribution: false`"):
        diagnose(request)
    assert not list(tmp_path.iterdir())
    run = Run.open(diagnose(request.model_copy(update={"attribution": False})))
    notes = run.manifest["notes"]
    assert any(note.startswith("reverse mode refused: products of reverse: derivative not") for note in notes)
    cosines = [cell["gradient_cosine"] for cell in run.results["cells"]]
    assert any("gradient_cosine was not computed" in note for note in notes) == ("gradient" in raising)
    assert all((c is None) == ("gradient" in raising) for c in cosines)


def test_the_command_prints_a_table_and_writes_the_record(checkpoints: Path, tmp_path: Path) -> None:
    record = tmp_path / "audit.json"
    arguments = [
        "audit",
        str(checkpoints / "base"),
        "--data",
        str(checkpoints / "a.jsonl"),
        "--quick",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json", str(record)])
    assert done.exit_code == 0
    assert "taylor: trusted" in done.stdout
    assert "reverse: trusted" in done.stdout
    assert json.loads(record.read_text())["ok"] is True


def test_a_model_that_sees_its_padding_is_refused_with_exit_code_2(tmp_path: Path) -> None:
    sizes = {"vocab_size": 27, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    save(BertForMaskedLM(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)), tmp_path / "bert")
    command = [sys.executable, "-m", "interference.cli", "audit", str(tmp_path / "bert"), "--quick", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "causal" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "taylor: refused: padding and batches" in done.stdout


def headless(folder: Path) -> list[str]:
    save(qwen3(0, tie_word_embeddings=False).model, folder / "model")
    return ["audit", str(folder / "model")]


def encoder_decoder(folder: Path) -> list[str]:
    sizes = {"vocab_size": 27, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    save(T5ForConditionalGeneration(T5Config(**sizes)), folder / "model")
    return ["audit", str(folder / "model")]


def no_rows(folder: Path) -> list[str]:
    save(qwen3(0), folder / "model")
    (folder / "empty.jsonl").write_text("")
    return ["audit", str(folder / "model"), "--data", str(folder / "empty.jsonl")]


def other_vocabulary(folder: Path) -> list[str]:
    save(qwen3(0, vocab_size=20), folder / "model")
    (folder / "a.jsonl").write_text('{"prompt": "w1 w2", "response": "w22"}')
    return ["audit", str(folder / "model"), "--data", str(folder / "a.jsonl")]


BAD: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda folder: ["audit", str(folder / "nowhere")], "nowhere, which is not there"),
    (headless, "without lm_head.weight"),
    (encoder_decoder, "does not load as a causal LM"),
    (no_rows, "empty.jsonl, which is empty"),
    (other_vocabulary, "token id 25"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_clear_error(tmp_path: Path, make: Callable[[Path], list[str]], message: str) -> None:
    done = CliRunner().invoke(app, make(tmp_path))
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)


def test_levels_and_updates_that_do_not_fit_are_refused(checkpoints: Path, toy: Model) -> None:
    with pytest.raises(InputError, match="did you mean 'quick'"):
        audit(toy, level="quik")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no parameter"):
        audit(Checkpoint.open(checkpoints / "base"), updates={"u": {"no.such.weight": torch.ones(2)}}, device="cpu")
