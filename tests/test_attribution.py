"""Attribution: parts sum to the whole, planted updates get all of it, tokens, records of a run, and bugs that are seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_anatomy import build
from test_diagnose import write
from test_jets import directions, ragged
from torch import Tensor
from toy import ToyTransformer

from interference import Checkpoint, Domain, Update, derivatives, expand, explanation, products
from interference import anatomy as anatomies
from interference.anatomy import Anatomy
from interference.attribution import Attribution, attribute, attribute_tokens, check, examples, sequence_changes
from interference.config import load_config
from interference.diagnose import diagnose
from interference.errors import InputError
from interference.model import Model, prepare
from interference.objectives import OBJECTIVES
from interference.records import MODULES, Run

WHOLE = ["first", "second"]


def domain(repeat: bool = False) -> Domain:
    sequences = ragged()
    return Domain("d", tuple(sequences + sequences[2:5] if repeat else sequences))


def two(model: Model, scale: float = 0.05) -> dict[str, dict[str, Tensor]]:
    return dict(zip("ab", directions(model, 2, scale), strict=True))


def gap(got: pd.DataFrame, cells: pd.DataFrame) -> float:
    """Largest difference of sums by update from the jets' totals, relative to the size of the change."""
    sums = got.groupby("update")[WHOLE].sum()
    jets = cells.set_index("update")[["jets_first", "jets_second"]]
    return float((np.abs(sums.to_numpy() - jets.to_numpy()).max(1) / np.abs(jets).sum(axis=1)).max())


def of_heads_and_channels(found: Attribution) -> pd.DataFrame:
    """What heads and channels say about modules: q + o and k + v by kind, gate + up + down."""
    heads = found.heads.groupby(["update", "layer", "kind"])[WHOLE].sum()
    channels = found.channels.groupby(["update", "layer"])[WHOLE].sum()
    channels.index = pd.MultiIndex.from_tuples([(*i, "channel") for i in channels.index], names=heads.index.names)
    return pd.concat([heads, channels]).sort_index()


def of_modules(found: Attribution) -> pd.DataFrame:
    names = dict.fromkeys(("q", "o"), "query") | dict.fromkeys(("k", "v"), "key_value")
    names |= dict.fromkeys(("gate", "up", "down"), "channel")
    table = found.modules.assign(kind=found.modules["module"].map(names)).dropna(subset="kind")
    return table.groupby(["update", "layer", "kind"])[WHOLE].sum().sort_index()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("batch_tokens", [13, 4096])
def test_parts_sum_to_the_jets(toy: Model, objective: str, batch_tokens: int) -> None:
    found = attribute(toy, two(toy), {"d": domain(True)}, objective=objective, batch_tokens=batch_tokens)
    assert gap(found.modules, found.cells) < 1e-10
    assert found.cells["disagreement"].max() < 1e-10
    assert (found.cells["jets_second"].abs() > 1e-6).all()
    without_biases = of_modules(found)  # the toy has biases in q and k only, which are rows of theirs
    pd.testing.assert_frame_equal(of_heads_and_channels(found), without_biases, rtol=1e-9, atol=1e-12)
    assert not found.notes


@pytest.mark.parametrize("objective", ["nll", "reward"])
@pytest.mark.parametrize(
    "name", ["qwen3", "llama", "gpt2", "gpt_neox", "phi3", "opt", "gemma2", "olmo2", "qwen3_moe", "gpt_oss"]
)
def test_parts_sum_to_the_jets_in_float32(name: str, objective: str) -> None:
    model = build(name)
    found = attribute(model, two(model, 0.02), {"d": domain()}, objective=objective)
    bound = 1e-5 if objective == "nll" else 3e-5  # advantages of both signs nearly cancel: gemma2's reward is at 1.0e-5
    assert gap(found.modules, found.cells) < bound
    if name not in ("gpt2", "gpt_neox", "opt", "gpt_oss"):  # biases of o and down belong to no head and no channel
        close = {"rtol": 1e-9, "atol": 1e-12}
        pd.testing.assert_frame_equal(of_heads_and_channels(found), of_modules(found), **close)
    changed = found.modules.groupby("update")["parameters"].sum()
    assert changed.tolist() == [sum(p.numel() for p in model.parameters.values())] * 2


def test_parts_of_checkpoints(checkpoints: Path) -> None:
    base = Checkpoint.open(checkpoints / "base")
    updates = {n: Update.between(base, Checkpoint.open(checkpoints / f"rl_{n}")) for n in "ab"}
    domains = {n: Domain.from_jsonl(checkpoints / f"{n}.jsonl", tokenizer=base.tokenizer()) for n in "ab"}
    for objective in ("nll", "reward", "kl"):
        models = expand(base, updates, domains, objective=objective, pairs=False)
        found = attribute(base, updates, domains, objective=objective, models=models)
        assert len(found.cells) == 4
        assert found.cells["disagreement"].max() < 1e-5
        for d, rows in found.modules.groupby("domain"):
            sums = rows.groupby("update")[WHOLE].sum()
            for u in "ab":
                whole = models[str(d)].predict({u: 1.0})
                scale = abs(whole.first) + abs(whole.second)
                assert sums.loc[u, "first"] == pytest.approx(whole.first, abs=1e-5 * scale)
                assert sums.loc[u, "second"] == pytest.approx(whole.second, abs=1e-5 * scale)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_units_equal_autograd_of_the_objective(toy: Model, objective: str) -> None:
    """Every unit's first and second order against torch.func on the scalar that the objective stands for."""
    d, updates, anatomy = domain(), two(toy), anatomies.read(toy)
    c = torch.from_numpy(products.sequence_weights(objective, d))
    (batch,) = products.data.batches(d.sequences, tokens=10**6)
    place, labels = batch.targets.nonzero()[:, 0], batch.input_ids[batch.targets][:, None]

    def log_p(p: Any) -> Tensor:
        return toy.logits(p, batch.input_ids)[:, :-1][batch.targets[:, 1:]].log_softmax(-1)

    anchor, weight = log_p({}).detach(), c[list(batch.index)]

    def scalar(p: Any) -> Tensor:
        z = log_p(p)
        step = (z - anchor).gather(1, labels)[:, 0]
        if objective == "nll":
            return (weight[place] * step).sum()
        if objective == "kl":
            return (weight[place, None] * anchor.exp() * (anchor - z)).sum()
        if objective == "surrogate":
            return (weight[place] * step.exp()).sum()
        return (weight * torch.zeros(len(weight), dtype=step.dtype).index_add(0, place, step).exp()).sum()

    got = products.unit_products(toy, anatomy, updates, d, [objective], batch_tokens=20)[0]
    for k, update in enumerate(updates.values()):
        gradient, product = derivatives.hvp(scalar, toy.parameters, update)
        for name, direction in update.items():
            for order, vector in ((0, gradient[name]), (1, 0.5 * product[name])):
                want = anatomy.sums(name, vector * direction).numpy()
                np.testing.assert_allclose(got[k, order, anatomy.places[name]], want, rtol=1e-8, atol=1e-12)


def test_sequences_without_advantage_are_left_out(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts whose rewards are all equal contribute exactly nothing: they are not computed, and the totals stay right."""
    d = Domain("d", tuple(dataclasses.replace(s, reward=1.0 if s.prompt_id < "p3" else s.reward) for s in ragged()))
    idle = (products.sequence_weights("reward", d) == 0).sum()
    seen, right = [], products._scored_logits
    monkeypatch.setattr(products, "_scored_logits", lambda m, batch: seen.append(len(batch.index)) or right(m, batch))
    found = attribute(toy, two(toy), {"d": d}, objective="reward")
    assert (idle, sum(seen)) == (6, len(d.sequences) - 6)
    assert gap(found.modules, found.cells) < 1e-10


def test_objectives_that_share_their_data_share_the_passes(toy: Model) -> None:
    d, updates, anatomy = domain(), two(toy), anatomies.read(toy)
    together = products.unit_products(toy, anatomy, updates, d, list(OBJECTIVES))
    for o, objective in enumerate(OBJECTIVES):
        alone = products.unit_products(toy, anatomy, updates, d, [objective])[0]
        np.testing.assert_allclose(together[o], alone, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tokens_sum_to_the_whole(toy: Model, objective: str) -> None:
    updates, d = two(toy), domain(True)
    model = expand(toy, updates, {"d": d}, objective=objective)["d"]
    tokens = attribute_tokens(toy, updates, d, objective, batch_tokens=20)
    for u, rows in tokens.groupby("update"):
        whole = model.predict({str(u): 1.0})
        assert rows["first"].sum() == pytest.approx(whole.first, rel=1e-10, abs=1e-14)
        assert rows["second"].sum() == pytest.approx(whole.second, rel=1e-10, abs=1e-14)
        for order, change in zip(WHOLE, sequence_changes(model, str(u)), strict=True):
            by_sequence = rows.groupby("sequence")[[order, f"sequence_{order}"]].agg(
                {order: "sum", f"sequence_{order}": "first"}
            )
            np.testing.assert_allclose(by_sequence[order], change, rtol=1e-10, atol=1e-14)
            np.testing.assert_allclose(by_sequence[f"sequence_{order}"], change, rtol=1e-10, atol=1e-14)
        for i, row in rows.groupby("sequence"):
            assert tuple(row["token_id"]) == d.sequences[int(str(i))].response
            assert row["position"].tolist() == list(range(len(row)))


def test_some_sequences_are_the_same_as_in_all(toy: Model) -> None:
    updates, d = two(toy), domain()
    every = attribute_tokens(toy, updates, d, "reward")
    some = attribute_tokens(toy, updates, d, "reward", sequences=[4, 1])
    expected = every[every["sequence"].isin([1, 4])].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, expected, rtol=1e-10, atol=1e-14)


def planted(model: Model, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    full = two(model)["a"]
    return {name: full[name] * mask for name, mask in masks.items()}


@pytest.mark.parametrize("objective", ["nll", "reward"])
def test_an_update_of_one_layer_is_all_in_that_layer(toy: Model, objective: str) -> None:
    masks = anatomies.read(toy).masks(layer=1)
    found = attribute(toy, {"a": planted(toy, masks)}, {"d": domain()}, objective=objective)
    inside = found.modules["layer"] == 1
    assert gap(found.modules[inside], found.cells) < 1e-10
    assert (found.modules.loc[~inside, [*WHOLE, "parameters"]] == 0).all(axis=None)
    assert (found.heads.loc[found.heads["layer"] != 1, WHOLE] == 0).all(axis=None)
    assert (found.channels.loc[found.channels["layer"] != 1, WHOLE] == 0).all(axis=None)


@pytest.mark.parametrize("name", ["toy", "gpt2", "phi3", "qwen3_moe", "gpt_oss"])
def test_an_update_on_ten_channels_is_all_in_them(name: str) -> None:
    model = prepare(ToyTransformer.seeded(0)) if name == "toy" else build(name)
    anatomy, chosen = anatomies.read(model), [0, 1, 2, 3, 5, 7, 8, 9, 10, 11]
    expert = 2 if name in ("qwen3_moe", "gpt_oss") else -1
    update: dict[str, Tensor] = {}
    for channel in chosen:
        for n, part in planted(model, anatomy.masks(layer=0, expert=expert, channel=channel)).items():
            update[n] = update[n] + part if n in update else part
    found = attribute(model, {"a": update}, {"d": domain()}, engine="nested")
    table = found.channels
    mine = (table["layer"] == 0) & (table["expert"] == expert) & table["channel"].isin(chosen)
    assert mine.sum() == 10
    assert gap(table[mine], found.cells) < 1e-5
    assert (table.loc[~mine, WHOLE] == 0).all(axis=None)
    assert (table.loc[mine, "second"] != 0).all()
    assert (found.heads[WHOLE] == 0).all(axis=None)
    assert set(found.modules.query("parameters > 0")["module"]) <= {"gate", "up", "down"}


@pytest.mark.parametrize("name", ["toy", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize(("kind", "head"), [("query", 3), ("key_value", 1)])
def test_an_update_of_one_head_is_all_in_that_head(name: str, kind: str, head: int) -> None:
    model = prepare(ToyTransformer.seeded(0)) if name == "toy" else build(name)
    masks = anatomies.read(model).masks(layer=1, kind=kind, head=head)
    found = attribute(model, {"a": planted(model, masks)}, {"d": domain()})
    table = found.heads
    mine = (table["layer"] == 1) & (table["kind"] == kind) & (table["head"] == head)
    assert mine.sum() == 1
    assert gap(table[mine], found.cells) < 1e-5
    assert (table.loc[~mine, WHOLE] == 0).all(axis=None)
    assert (found.channels[WHOLE] == 0).all(axis=None)


def test_a_module_predicts_what_its_restriction_predicts(toy: Model) -> None:
    """First order is additive: the update restricted to a module changes the domain by that module's `first`."""
    whole, anatomy = Update.from_tensors(two(toy)["a"]), anatomies.read(toy)
    found = attribute(toy, {"a": whole}, {"d": domain()}, objective="reward").modules
    for layer, module in ((0, "q"), (1, "down"), (-1, "embedding + head"), (0, "norm")):
        part = whole.restrict(anatomy.masks(layer=layer, module=module))
        alone = expand(toy, {"a": part}, {"d": domain()}, objective="reward")["d"].predict({"a": 1.0}, 1)
        row = found[(found["layer"] == layer) & (found["module"] == module)]
        assert row["first"].item() == pytest.approx(alone.value, rel=1e-9)


def transposed(self: Anatomy, name: str, values: Tensor) -> Tensor:
    """The planted bug: sums over the wrong axis, wrapped to the right length. The whole is still right; the parts are not."""
    square = values.dim() == 2 and values.shape[0] == values.shape[1]
    return RIGHT(self, name, values.T if square else values)


RIGHT = Anatomy.sums


def test_rows_taken_for_columns_are_seen(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = anatomies.read(toy).masks(layer=1, kind="query", head=3)
    monkeypatch.setattr(Anatomy, "sums", transposed)
    found = attribute(toy, {"a": planted(toy, masks)}, {"d": domain()})
    assert gap(found.modules, found.cells) < 1e-10  # the sum does not notice ...
    other = found.heads[(found.heads["kind"] == "query") & (found.heads["head"] != 3)]
    assert (other[WHOLE] != 0).any(axis=None)  # ... the planted head does


def test_a_wrong_product_is_not_reported(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the Hessian of the reward without s1 s1'."""
    right = products._Head.curved
    wrong = lambda self, objective, c, dz: right(self, "nll" if objective == "reward" else objective, c, dz)  # noqa: E731
    monkeypatch.setattr(products._Head, "curved", wrong)
    attribute(toy, two(toy), {"d": domain()}, objective="nll")
    with pytest.raises(InputError, match="where the jets give"):
        attribute(toy, two(toy), {"d": domain()}, objective="reward")


def test_bad_input_is_refused(toy: Model) -> None:
    updates, d = two(toy), domain()
    with pytest.raises(InputError, match="did you mean 'reward'"):
        attribute(toy, updates, {"d": d}, objective="rewards")
    with pytest.raises(InputError, match="did you mean 'nll'"):
        attribute_tokens(toy, updates, d, "nl")
    with pytest.raises(InputError, match="no updates"):
        attribute(toy, {}, {"d": d})
    with pytest.raises(InputError, match="no parameter of"):
        attribute(toy, {"a": {"nowhere": torch.ones(1)}}, {"d": d})
    with pytest.raises(InputError, match="sequence 9"):
        attribute_tokens(toy, updates, d, sequences=[9])


def test_nothing_to_split_is_refused(toy: Model) -> None:
    updates, d = two(toy), domain()
    with pytest.raises(InputError, match="'x' without tensors"):
        attribute(toy, {**updates, "x": {}}, {"d": d})
    with pytest.raises(InputError, match="'x' without tensors"):
        attribute_tokens(toy, {"x": {}}, d)
    with pytest.raises(InputError, match="no domains"):
        attribute(toy, updates, {})
    with pytest.raises(InputError, match="no sequences"):
        attribute_tokens(toy, updates, d, sequences=[])


def test_models_of_another_request_are_refused(toy: Model) -> None:
    """Models in another order would accuse reverse mode, of fewer updates lose some, of more break off."""
    updates, d = two(toy), domain()
    a, b = updates.items()
    models = expand(toy, updates, {"d": d}, pairs=False)
    found = attribute(toy, updates, {"d": d}, models=models | {"e": models["d"]})  # a model more does no harm
    assert found.cells["update"].tolist() == ["a", "b"]
    for other in (dict([b, a]), dict([a]), {**updates, "c": a[1]}):
        with pytest.raises(InputError, match="the model of 'd' along 'a', 'b'"):
            attribute(toy, other, {"d": d}, models=models)
    with pytest.raises(InputError, match="one for domain 'e'"):
        attribute(toy, updates, {"e": d}, models=models)
    with pytest.raises(InputError, match="objective 'nll'; expected objective 'kl'"):
        attribute(toy, updates, {"d": d}, models=models, objective="kl")
    with pytest.raises(InputError, match="other sequences"):
        attribute(toy, updates, {"d": domain(True)}, models=models)


def test_what_cancels_is_recorded_as_rounding(toy: Model) -> None:
    """Terms of both signs that nearly cancel: the relative difference says little, and a zero total makes it no zero."""
    model = expand(toy, two(toy), {"d": domain()}, objective="reward", pairs=False)["d"]
    jets = model.predict({"a": 1.0})
    row = check(model, "d", "a", jets.first, jets.second)
    assert (row["disagreement"], row["rounding"]) == (0.0, False)
    terms = model.terms
    slope, curvature = terms.slope - terms.slope.mean(0), terms.curvature - terms.curvature.mean(0)
    flat = dataclasses.replace(model, terms=dataclasses.replace(terms, slope=0 * slope, curvature=0 * curvature))
    assert check(flat, "d", "a", 0.0, 0.0)["disagreement"] == 0.0
    near = dataclasses.replace(model, terms=dataclasses.replace(terms, slope=slope, curvature=curvature))
    off = 1e-6 * float(np.abs(sequence_changes(near, "a")[0]).sum())
    row = check(near, "d", "a", off, 0.0)
    assert row["rounding"]
    assert float(row["disagreement"]) > 1e-3
    slope = np.zeros_like(terms.slope)
    slope[:2] = [[1.0], [-1.0]]  # they cancel exactly
    exact = dataclasses.replace(model, terms=dataclasses.replace(terms, slope=slope, curvature=0 * curvature))
    row = check(exact, "d", "a", 1e-7 * float(np.abs(sequence_changes(exact, "a")[0]).sum()), 0.0)
    assert row["rounding"]
    assert row["disagreement"] == float("inf")


def test_an_operation_without_a_forward_derivative_is_refused(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def grouped(*_: object) -> None:
        raise NotImplementedError("Trying to use forward AD with _grouped_mm that does not support it")

    models = expand(toy, two(toy), {"d": domain()}, pairs=False)
    monkeypatch.setattr(Model, "logits", grouped)
    with pytest.raises(InputError, match="experts_implementation"):
        attribute(toy, two(toy), {"d": domain()}, models=models)


@pytest.mark.parametrize("objective", ["nll", "reward"])
def test_examples_are_the_extremes_and_distinct(toy: Model, objective: str) -> None:
    updates, d = two(toy), domain(True)
    model = expand(toy, updates, {"d": d}, objective=objective)["d"]
    sign = 1 if objective == "nll" else -1
    damage = sign * np.sum(sequence_changes(model, "a"), axis=0)
    places = examples(model, "a", d)
    assert len(places) == 4
    distinct = {(d.sequences[i].prompt, d.sequences[i].response): damage[i] for i in reversed(range(len(damage)))}
    ordered = sorted(distinct.values(), reverse=True)
    assert damage[places].tolist() == [*ordered[:3], ordered[-1]]
    assert len(examples(model, "a", d, hurt=20, helped=5)) == len(distinct) == 9


def test_a_run_writes_the_records(demo_run: Path) -> None:
    run = Run.open(demo_run)
    cells = pd.DataFrame(run.results["attribution"])
    assert len(cells) == 8
    assert cells["disagreement"].max() < 1e-5
    key = ["objective", "update", "domain"]
    predicted = run.cells().set_index(key)["predicted_second"]
    whole = cells.set_index(key)
    tables = {
        n: pd.read_parquet(demo_run / "tables" / f"attribution_{n}.parquet") for n in ("modules", "heads", "channels")
    }
    sums = tables["modules"].groupby(key)[WHOLE].sum()
    pd.testing.assert_frame_equal(sums, whole[WHOLE].sort_index(), rtol=1e-9)
    np.testing.assert_allclose(sums.sum(axis=1), predicted.sort_index(), rtol=1e-4, atol=1e-6)
    assert tables["modules"].columns.tolist() == [*key, "layer", "module", *WHOLE, "parameters"]
    assert tables["heads"].columns.tolist() == [*key, "layer", "kind", "head", *WHOLE]
    assert tables["channels"].columns.tolist() == [*key, "layer", "expert", "channel", *WHOLE]
    assert set(tables["modules"]["module"]) <= set(MODULES)
    assert len(tables["heads"]) == 8 * 2 * (2 + 1)
    assert len(tables["channels"]) == 8 * 2 * 32


def test_a_run_writes_example_tokens(demo_run: Path, checkpoints: Path) -> None:
    tokens = pd.read_parquet(demo_run / "tables" / "attribution_tokens.parquet")
    assert tokens.columns.tolist() == [
        "objective", "update", "domain", "prompt_id", "sequence", "rank", "position", "token_id", "text", "prompt",
        "first", "second", "sequence_first", "sequence_second",
    ]  # fmt: skip
    tokenizer = Checkpoint.open(checkpoints / "base").tokenizer()
    for (objective, _, name), cell in tokens.groupby(["objective", "update", "domain"]):
        d = Domain.from_jsonl(checkpoints / f"{name}.jsonl", tokenizer=tokenizer)
        sign = 1 if objective == "nll" else -1
        each = cell.drop_duplicates("rank").set_index("rank").sort_index()
        assert each.index.tolist() == [1, 2, 3, 4]
        damage = sign * (each["sequence_first"] + each["sequence_second"])
        assert damage.is_monotonic_decreasing
        for rank, rows in cell.groupby("rank"):
            sequence = d.sequences[rows["sequence"].iloc[0]]
            assert tuple(rows["token_id"]) == sequence.response
            assert rows["text"].tolist() == [tokenizer.decode([i]) for i in sequence.response]
            assert set(rows["prompt"]) == {tokenizer.decode(list(sequence.prompt))}
            assert set(rows["prompt_id"]) == {sequence.prompt_id}
            assert rows["first"].sum() == pytest.approx(each.loc[rank, "sequence_first"], rel=1e-6, abs=1e-12)


def test_without_attribution_nothing_of_it_is_there(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path
) -> None:
    request = request_yaml | {"objective": "nll", "attribution": False, "output": str(tmp_path / "run")}
    folder = diagnose(load_config(write(checkpoints, request, "without.yaml")), search_path=[checkpoints])
    assert "attribution" not in Run.open(folder).results
    assert not list(folder.rglob("*attribution*"))
    assert not list(folder.rglob("tokens-*"))


def test_an_interrupted_run_goes_on_without_the_split(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while parts were made, the same request with attribution: false keeps every other stage; and back again."""
    request = request_yaml | {"objective": "nll", "output": str(tmp_path / "run")}
    asked, without = (
        load_config(write(checkpoints, request | {"attribution": a}, f"split_{a}.yaml")) for a in (True, False)
    )

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(explanation, "_examples", stopped)
    with pytest.raises(KeyboardInterrupt):
        diagnose(asked, search_path=[checkpoints])
    table = tmp_path / "run.part" / "tables" / "attribution_modules.parquet"
    pd.DataFrame().to_parquet(table)  # what a run that got further would have left
    said: list[str] = []
    folder = diagnose(without, search_path=[checkpoints], say=said.append)
    assert "resuming" in said
    assert not [line for line in said if line.startswith(("derivatives", "evaluating"))]
    assert "attribution" not in Run.open(folder).results
    assert not list((folder / "tables").glob("attribution_*"))
    with pytest.raises(InputError, match="holds another run"):  # finished, it is another request still
        diagnose(asked, search_path=[checkpoints])


@pytest.mark.parametrize("failure", ["sums", "operation"])
def test_a_failing_split_is_left_out_and_the_run_finished(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """Wrong parts are not reported; the cells and scores, which do not depend on them, are, with a note on top."""
    right = products.unit_products

    def wrong(*arguments: Any, **options: Any) -> Any:
        if failure == "operation":
            raise InputError(got="a model without Hessian-vector products", expected="some", remedy="none")
        return 1.01 * right(*arguments, **options)

    monkeypatch.setattr(products, "unit_products", wrong)
    request = request_yaml | {"objective": "nll", "output": str(tmp_path / "run")}
    folder = diagnose(load_config(write(checkpoints, request, "failing.yaml")), search_path=[checkpoints])
    run = Run.open(folder)
    assert len(run.cells()) == 4
    assert run.results["scorecards"]["nll"]
    assert "attribution" not in run.results
    assert not list((folder / "tables").glob("attribution_*"))
    why = "where the jets give" if failure == "sums" else "without Hessian-vector products"
    assert run.results["notes"][0].startswith("attribution left out: got ")
    assert why in run.results["notes"][0]
    assert run.results["notes"][0] in run.manifest["notes"]
    assert "attribution left out" in (folder / "report.html").read_text()


def test_an_interrupted_attribution_resumes(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two domains, it goes on with the second one only; objectives on one file share their passes."""
    request = request_yaml | {"objective": ["nll", "kl"], "output": str(tmp_path / "run")}
    file, right, seen = write(checkpoints, request, "broken.yaml"), products.unit_products, []

    def stopped(model: Model, anatomy: Anatomy, updates: Any, d: Domain, *rest: Any, **options: Any) -> Any:
        seen.append((d.name, rest[0]))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return right(model, anatomy, updates, d, *rest, **options)

    monkeypatch.setattr(products, "unit_products", stopped)
    with pytest.raises(KeyboardInterrupt):
        diagnose(load_config(file), search_path=[checkpoints])
    folder = diagnose(load_config(file), search_path=[checkpoints])
    assert seen == [("a", ["nll", "kl"]), ("b", ["nll", "kl"]), ("b", ["nll", "kl"])]
    base = Checkpoint.open(checkpoints / "base")
    updates = {n: Update.between(base, Checkpoint.open(checkpoints / f"rl_{n}")) for n in "ab"}
    domains = {n: Domain.from_jsonl(checkpoints / f"{n}.jsonl", tokenizer=base.tokenizer()) for n in "ab"}
    table = pd.read_parquet(folder / "tables" / "attribution_channels.parquet")
    for objective in ("nll", "kl"):
        alone = attribute(base, updates, domains, objective=objective).channels
        mine = table[table["objective"] == objective].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, alone, rtol=1e-6, atol=1e-10)
