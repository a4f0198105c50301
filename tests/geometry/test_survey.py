"""The survey on real files: tables against dense references, resumption, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import perturbed, qwen3, save

from interference import Checkpoint
from interference.errors import InputError
from interference.geometry import Settings, Survey
from interference.records import GEOMETRY

SETTINGS = Settings(projections=2, k=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three tuned models; "c" shares half of the change of "a"."""
    root = tmp_path_factory.mktemp("models")
    save(qwen3(0), root / "base")
    for name, seed in (("a", 1), ("b", 2)):
        save(perturbed(seed), root / name)
    mixed = perturbed(3)
    with torch.no_grad():
        for p, a, base in zip(mixed.parameters(), perturbed(1).parameters(), qwen3(0).parameters(), strict=True):
            p.copy_(base + 0.5 * (p - base) + 0.5 * (a - base))
    save(mixed, root / "c")
    return root


def made(folder: Path, settings: Settings = SETTINGS, names: str = "abc") -> Survey:
    tuned = {n: Checkpoint.open(folder / n) for n in names}
    return Survey.of(Checkpoint.open(folder / "base"), tuned, settings)


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    return made(folder).tables(tmp_path_factory.mktemp("work"))


def changes(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    base = load_file(folder / "base" / "model.safetensors")
    tuned = {n: load_file(folder / n / "model.safetensors") for n in "abc"}
    return base, {n: {k: t[k] - base[k] for k in base} for n, t in tuned.items()}


def test_every_table_has_its_columns(found: dict[str, pd.DataFrame]) -> None:
    assert set(found) == set(GEOMETRY)
    for name, table in found.items():
        assert list(table.columns) == list(GEOMETRY[name]), name
        assert len(table) or name == "audits"


def test_norms_and_cosines_of_the_whole(folder: Path, found: dict[str, pd.DataFrame]) -> None:
    base, moved = changes(folder)
    flat = {n: torch.cat([d[k].reshape(-1) for k in base]).double() for n, d in moved.items()}
    whole = found["norms"].query("scope == 'model'").set_index("model")
    pairs = found["cosines"].query("scope == 'model'").set_index(["a", "b"])
    for n, d in flat.items():
        assert whole.loc[n, "norm"] == pytest.approx(float(d.norm()), rel=1e-12)
        assert whole.loc[n, "identical"] == pytest.approx(float((d == 0).double().mean()))
    for (a, b), row in pairs.iterrows():
        expected = float(flat[a] @ flat[b] / flat[a].norm() / flat[b].norm())
        assert row["cosine"] == pytest.approx(expected, rel=1e-12)
        null = float((flat[a] ** 2 @ flat[b] ** 2).sqrt() / flat[a].norm() / flat[b].norm())
        assert row["null_std"] == pytest.approx(null, rel=1e-5)
    # What was planted: c holds half of a's change, so their cosine is about 1/sqrt(2), and nobody else's is.
    assert pairs.loc[("a", "c"), "cosine"] == pytest.approx(0.5**0.5, abs=0.05)
    assert abs(pairs.loc[("a", "b"), "cosine"]) < 4 * pairs.loc[("a", "b"), "null_std"]


def test_parts_make_up_the_whole(found: dict[str, pd.DataFrame]) -> None:
    norms = found["norms"].query("model == 'a'")
    squares = (norms["norm"] ** 2).groupby(norms["scope"]).sum()
    assert squares["module"] == pytest.approx(squares["model"], rel=1e-12)
    assert squares["tensor"] == pytest.approx(squares["model"], rel=1e-12)
    assert squares["layer"] == pytest.approx(squares["model"], rel=1e-12)


def test_a_channel_is_its_gate_row_up_row_and_down_column(folder: Path, found: dict[str, pd.DataFrame]) -> None:
    _, moved = changes(folder)
    stem = "model.layers.1.mlp."
    d = {p: moved["b"][f"{stem}{p}_proj.weight"].double() for p in ("gate", "up", "down")}
    expected = (d["gate"].square().sum(1) + d["up"].square().sum(1) + d["down"].square().sum(0)).sqrt()
    rows = found["neurons"].query("kind == 'channel' and layer == 1 and model == 'b'").sort_values("unit")
    np.testing.assert_allclose(rows["change"], expected, rtol=1e-12)
    heads = found["neurons"].query("layer == 1 and model == 'b'")
    o, q = (moved["b"][f"model.layers.1.self_attn.{p}_proj.weight"].double() for p in ("o", "q"))
    first = (o[:, :8].square().sum() + q[:8].square().sum()).sqrt()
    assert heads.query("kind == 'head' and unit == 0")["change"].item() == pytest.approx(float(first), rel=1e-12)


def test_spectra_and_subspaces_of_a_matrix(folder: Path, found: dict[str, pd.DataFrame]) -> None:
    base, moved = changes(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    a, c = (moved[n][name].double() for n in "ac")
    row = found["spectra"].query("model == 'a' and tensor == @name").iloc[0]
    values = torch.linalg.svdvals(a)
    assert row["spectral_norm"] == pytest.approx(float(values[0]), rel=1e-12)
    assert row["stable_rank"] == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-6)
    assert row["rank"] == int(torch.linalg.matrix_rank(a.float()))
    before, after = (torch.linalg.svdvals(x.double()) for x in (base[name], base[name] + moved["a"][name]))
    assert row["nss"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-6)
    u, v = (torch.linalg.svd(x)[0][:, :4] for x in (a, c))
    pair = found["subspaces"].query("a == 'a' and b == 'c' and side == 'left' and tensor == @name").iloc[0]
    assert pair["overlap"] == pytest.approx(float((u.T @ v).square().sum() / 4), rel=1e-9)


def test_an_interrupted_survey_goes_on(folder: Path, tmp_path: Path, found: dict[str, pd.DataFrame]) -> None:
    said: list[str] = []

    def stop(text: str) -> None:
        said.append(text)
        if len(said) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(folder).tables(tmp_path, stop)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("sums-*.safetensors")}
    assert 4 <= len(kept) < len(made(folder).parts)
    tables = made(folder).tables(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table, found[name])


def test_vocabularies_too_small_to_split_and_vectors_are_taken(tmp_path: Path, folder: Path) -> None:
    """GPT-2: fused q, k, v, biases and positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=27, n_positions=32)
    for seed, name in enumerate(("base", "a")):
        torch.manual_seed(seed)
        save(GPT2LMHeadModel(config), tmp_path / name)
    tables = made(tmp_path, Settings(projections=0, spectra="none"), "a").tables(tmp_path / "work")
    assert {"qkv", "o", "up", "down", "norm"} <= set(tables["norms"]["module"])
    assert set(tables["neurons"]["kind"]) == {"channel", "head", "key_value head"}
    assert tables["masks"].empty
    assert tables["spectra"].empty


def altered(source: Path, target: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    held = load_file(file)
    save_file(held | {k.replace("__", "."): v for k, v in tensors.items()}, file, {"format": "pt"})
    return target


def test_an_update_of_nothing_and_weights_that_are_not_finite_stop_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    shutil.copytree(folder / "base", tmp_path / "a")
    with pytest.raises(InputError, match="all identical to the base's"):
        made(tmp_path, names="a").tables(tmp_path / "w1")
    broken = load_file(folder / "a" / "model.safetensors")["model.norm.weight"].clone()
    broken[3] = float("nan")
    altered(folder / "a", tmp_path / "b", model__norm__weight=broken)
    with pytest.raises(InputError, match=r"NaN or infinite weights in model.norm.weight of b"):
        made(tmp_path, names="b").tables(tmp_path / "w2")


def test_a_base_that_was_trained_is_suspected(tmp_path: Path) -> None:
    """Tuned models that all hold one model's weights bit by bit, where the base differs from it: that one is the base."""
    base = qwen3(0)
    save(base, tmp_path / "true")
    for seed, name in enumerate(("base", "b", "c"), start=1):
        model = qwen3(0)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_((torch.rand(p.shape, generator=g) < 0.2) * 0.02 * torch.randn(p.shape, generator=g))
        save(model, tmp_path / name)
    shutil.copytree(tmp_path / "true", tmp_path / "a")
    audits = made(tmp_path, Settings(projections=0, spectra="none")).tables(tmp_path / "w")["audits"]
    assert audits.query("check == 'swapped'")["model"].tolist() == ["a"]
    shutil.copytree(tmp_path / "base", tmp_path / "d")
    right = Survey.of(Checkpoint.open(tmp_path / "true"), {n: Checkpoint.open(tmp_path / n) for n in "bcd"}, SETTINGS)
    assert "swapped" not in set(right.tables(tmp_path / "w3")["audits"]["check"])


def test_modules_that_did_not_change_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    base = load_file(folder / "base" / "model.safetensors")
    norms = {k.replace(".", "__"): v for k, v in base.items() if "norm" in k}
    altered(folder / "a", tmp_path / "a", **norms)
    audits = made(tmp_path, Settings(projections=0, spectra="none"), "a").tables(tmp_path / "w")["audits"]
    assert audits.query("check == 'identical modules'")["message"].str.contains("norm").all()


def test_an_adapter_is_read_from_its_factors(tmp_path: Path, folder: Path) -> None:
    """Rank 2, small: through a merged float32 model it would have full rank and rounding for directions."""
    from peft import LoraConfig, get_peft_model

    shutil.copytree(folder / "base", tmp_path / "base")
    model = get_peft_model(qwen3(0), LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(1e-3 * torch.randn(p.shape, generator=g))
    model.save_pretrained(tmp_path / "a")
    tables = made(tmp_path, Settings(projections=1, k=4), "a").tables(tmp_path / "work")
    name = "model.layers.0.mlp.up_proj.weight"
    parts = [model.get_parameter(f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.default.weight") for x in "BA"]
    change = (parts[0].double() @ parts[1].double()).detach() * 8 / 2
    row = tables["spectra"].query("tensor == @name").iloc[0]
    assert (row["rank"], row["method"]) == (2, "factors")
    assert row["spectral_norm"] == pytest.approx(float(torch.linalg.svdvals(change)[0]), rel=1e-6)
    norms = tables["norms"].set_index("tensor")
    assert norms.loc[name, "norm"] == pytest.approx(float(change.norm()), rel=1e-6)
    assert norms.loc["model.layers.0.mlp.down_proj.weight", "norm"] == 0
    assert list(tables["cosines"].columns) == list(GEOMETRY["cosines"])


def test_precisions_of_their_own_are_kept(tmp_path: Path) -> None:
    """A float64 model beside a float32 base: both the pass and the spectra take the wider."""
    save(qwen3(0), tmp_path / "base")
    tuned = qwen3(0).double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(1e-12)
    save(tuned, tmp_path / "a")
    tables = made(tmp_path, Settings(projections=0, k=1), "a").tables(tmp_path / "work")
    norm = tables["norms"].set_index("tensor").loc["model.layers.0.mlp.up_proj.weight", "norm"]
    assert norm == pytest.approx(1e-12 * (32 * 16) ** 0.5, rel=1e-3)
    found = tables["spectra"].set_index("tensor").loc["model.layers.0.mlp.up_proj.weight", "spectral_norm"]
    assert found == pytest.approx(norm, rel=1e-3)
    assert tables["audits"]["check"].tolist() == ["dtype"]


def test_randomized_subspaces_of_independent_updates_do_not_meet(tmp_path: Path) -> None:
    """Flat spectra: the method does not find the leading directions, and says so instead of comparing what it found."""
    from interference.geometry import spectral
    from interference.geometry.labels import by_name

    g = torch.Generator().manual_seed(0)
    base = torch.randn(300, 200, generator=g)
    tuned = {n: base + 1e-3 * torch.randn(300, 200, generator=g) for n in "ab"}
    settings = Settings(spectra="randomized", k=8)
    read = lambda _: (base, {n: (lambda t=t: t) for n, t in tuned.items()})  # noqa: E731
    parts = {"w": by_name("w", (300, 200))}
    found = spectral.survey(parts, {"w": (300, 200)}, read, settings, tmp_path)
    assert (found["spectra"]["seed_overlap"] < 0.5).all()
    assert found["spectra"]["nss"].isna().all()
    assert found["subspaces"].empty
    rank = torch.randn(300, 3, generator=g) @ torch.randn(3, 200, generator=g)
    tuned["a"], tuned["b"] = base + rank, base + 2 * rank
    found = spectral.survey(parts, {"w": (300, 200)}, read, Settings(spectra="randomized", k=3), tmp_path / "2")
    assert (found["subspaces"]["overlap"] > 0.999).all()


def test_what_the_model_does_not_know_is_told_by_name_and_said(tmp_path: Path, folder: Path) -> None:
    extra = torch.ones(4, 16)
    for name in ("base", "a"):
        altered(folder / name, tmp_path / name, model__layers__1__mlp__extra_down_proj__weight=extra)
    survey = made(tmp_path, Settings(projections=0, spectra="none"), "a")
    assert any("extra_down_proj" in note for note in survey.notes)
    assert survey.parts["model.layers.1.mlp.extra_down_proj.weight"].layer == 1
    assert made(folder, names="a").notes == ()
