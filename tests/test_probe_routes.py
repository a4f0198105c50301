"""The probe "routes" as a user runs it: planted channels, updates and gradients are found; it resumes; bad input is said."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tiny import qwen3, save, tokenizer, write_jsonl
from torch import Tensor

from interference.domain import Domain
from interference.errors import InputError
from interference.probes.halves import prompt_halves
from interference.probes.routes import Routes
from interference.probing import routing
from interference.probing.config import ProbeConfig, load_config
from interference.probing.run import probe
from interference.records import PROBES, Run

Request = dict[str, Any]
CHANNELS = {"a": [{1, 5, 9}, {0, 30, 31}], "b": [{9, 20, 31}, {2, 3, 4}]}  # by layer; channel 9 of layer 0 is shared
WORDS = {"a": (0, 10), "b": (10, 20)}
TABLES = ("route_overlap", "route_direction", "gradient_agreement")


def wired() -> Any:
    """A's words lie along the first dimension of the stream, B's along the second, and a few channels of each layer read one."""
    module = qwen3(0, num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.1)
    with torch.no_grad():
        module.model.embed_tokens.weight[:, :2] = 0.0
        for dimension, (name, (low, high)) in enumerate(WORDS.items()):
            module.model.embed_tokens.weight[3 + low : 3 + high, dimension] = 2.0
            for layer, channels in zip(module.model.layers, CHANNELS[name], strict=True):
                for c in channels:
                    layer.mlp.gate_proj.weight[c, dimension] = 3.0
                    layer.mlp.up_proj.weight[c, dimension] = 3.0
        for layer in module.model.layers:
            for out in (layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight):
                out *= 0.1  # so that layer 1 still sees the words themselves
                out[:2] = 0.0
    return module


def moved(sign: float) -> Any:
    """The base with every weight moved; those of layer 0's channel 9 by the same whatever the sign."""
    module = wired()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            change = 0.0003 * torch.randn(p.shape, generator=g)
            kept = torch.full(p.shape, sign)
            if name.startswith("model.layers.0.mlp"):
                (kept.t() if "down" in name else kept)[9] = 1.0
            p.add_(kept * change)
    return module


def rollouts(name: str, model: str, prompts: int = 8, responses: int = 4, reward: bool = True) -> list[dict[str, Any]]:
    rng = np.random.default_rng(sum(map(ord, name + model)))

    def words(most: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(*WORDS[name], rng.integers(1, most)))

    out = []
    for p in range(prompts):
        prompt = words(5)
        for _ in range(responses):
            row = {"prompt_id": f"{name}{p}", "prompt": prompt, "response": words(6), "eos": False, "model": model}
            out.append(row | ({"reward": float(rng.random() < 0.5)} if reward else {}))
    return out


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routes")
    save(wired(), folder / "base")
    save(moved(1.0), folder / "a")
    save(moved(-1.0), folder / "b")
    for name in "ab":
        write_jsonl(folder / f"{name}.jsonl", [row for m in ("base", "a", "b") for row in rollouts(name, m)])
    return folder


def request(**changes: Any) -> Request:
    return {
        "base_model": "base",
        "models": [{"name": name, "model": name, "kind": "expert"} for name in "ab"],
        "domains": [{"name": name, "data": f"{name}.jsonl"} for name in "ab"],
        "probes": ["routes"],
        "routes": {"tops": [0.1, 0.2]},
    } | changes


def read(folder: Path, asked: Request, output: Path) -> ProbeConfig:
    file = folder / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(asked | {"output": str(output)}))
    return load_config(file)


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(probe(read(inputs, request(), tmp_path_factory.mktemp("runs") / "made")))


def check_routes(run: Run) -> None:
    """The wired channels are the top ones in every model, and domains share those that they share by construction."""
    for model in ("base", "a", "b"):
        for name in "ab":
            scores = pd.read_parquet(run.path / "routes" / name / f"{model}.parquet").query("kind == 'channel'")
            for layer in (0, 1):
                top = scores[scores["layer"] == layer].nlargest(3, "score")["unit"]
                assert set(top) == CHANNELS[name][layer]
    rows = run.probe("route_overlap").query("kind == 'channel' and scope == 'layer' and top == 0.1")
    assert set(rows["model"]) == {"base", "a", "b"}
    across = rows[rows["a"] != rows["b"]]
    assert (across.loc[across["layer"] == 0, "jaccard"] == 1 / 5).all()
    assert (across.loc[across["layer"] == 1, "jaccard"] == 0).all()
    assert (rows.loc[rows["a"] == rows["b"], "jaccard"] == 1).all()
    np.testing.assert_allclose(rows["chance"], (3 / 32) / (2 - 3 / 32))


def check_direction(run: Run) -> None:
    """The updates are opposite everywhere but on the one channel that both domains use."""
    rows = run.probe("route_direction").query("top == 0.1").set_index(["kind", "layer"])
    shared = rows.loc[("channel", 0)]
    assert shared["count"] == 1
    assert shared["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert shared["sign_agreement"] == 1.0
    assert shared["cosine_chance_high"] < -0.99  # one random channel of 32 is rarely that one
    assert rows.loc[("channel", 1), "count"] == 0
    assert math.isnan(rows.loc[("channel", 1), "cosine"])
    whole = rows.loc[("all", -1)]
    assert -1 < whole["cosine"] < -0.9


def check_gradients(run: Run, folder: Path) -> None:
    """Cosines of policy gradients by plain backward passes, whole and of one module."""
    base = wired()
    halves = {}
    for name in "ab":
        domain = Domain.from_rows(rollouts(name, "base"), tokenizer=tokenizer(), name=name)
        halves[name] = [policy_gradient(base, half) for half in prompt_halves(domain, 0)]
    table = run.probe("gradient_agreement").set_index(["scope", "layer", "module"])
    assert set(table["objective"]) == {"reward"}
    for key, pattern in ((("model", -1, "all"), ""), (("part", 1, "down"), "layers.1.mlp.down")):
        flat = {n: [torch.cat([g[k].flatten() for k in g if pattern in k]) for g in both] for n, both in halves.items()}
        four = [float(torch.cosine_similarity(x, y, dim=0)) for x in flat["a"] for y in flat["b"]]
        assert table.loc[key, "cosine"] == pytest.approx(np.mean(four), abs=1e-4)
        assert table.loc[key, "split_a"] == pytest.approx(float(torch.cosine_similarity(*flat["a"], dim=0)), abs=1e-4)
        apart = [flat[n][0] - flat[n][1] for n in "ab"]
        assert table.loc[key, "noise"] == pytest.approx(float(torch.cosine_similarity(*apart, dim=0)), abs=1e-4)


def policy_gradient(module: Any, domain: Domain) -> dict[str, Tensor]:
    """Of the mean over prompts of the mean over responses of (r - the mean of the prompt's other rewards) log p."""
    module.zero_grad()
    prompts = list(dict.fromkeys(domain.prompt_ids))
    for prompt in prompts:
        mine = [s for s in domain.sequences if s.prompt_id == prompt]
        total = sum(float(s.reward or 0) for s in mine)
        for s in mine:
            others = (total - float(s.reward or 0)) / (len(mine) - 1)
            logp = module(torch.tensor([s.prompt + s.response])).logits.log_softmax(-1)[0]
            value = sum(logp[len(s.prompt) - 1 + t, y] for t, y in enumerate(s.response))
            ((float(s.reward or 0) - others) * value / len(mine) / len(prompts)).backward()  # type: ignore[union-attr]
    return {n: p.grad.double().clone() for n, p in module.named_parameters()}


def test_planted_routes_updates_and_gradients_are_found(made: Run, inputs: Path) -> None:
    assert made.results["probes"] == ["routes"]
    for name in TABLES:
        table = made.probe(name)
        assert list(table.columns) == list(PROBES[name])
        assert len(table), name
    check_routes(made)
    check_direction(made)
    check_gradients(made, inputs)
    assert not (made.path / "cache").exists()


def test_the_oracles_can_fail(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routes of the wrong domain, updates of the wrong expert, gradients of the wrong objective: each is seen."""
    asked, plain, own = routing.active_routes, routing.gradient_agreement, routing._update
    last: list[Domain] = []

    def before(model: Any, domain: Domain, **options: Any) -> Routes:
        last.append(domain)
        return asked(model, last[max(0, len(last) - 2)], **options)

    monkeypatch.setattr(routing, "active_routes", before)
    monkeypatch.setattr(routing, "_update", lambda work, name: own(work, "a"))
    monkeypatch.setattr(routing, "gradient_agreement", lambda *a, **o: plain(*a, **o | {"objective": "nll"}))
    run = Run.open(probe(read(inputs, request(), tmp_path / "run")))
    for check in (check_routes, check_direction, lambda r: check_gradients(r, inputs)):
        with pytest.raises(AssertionError):
            check(run)


def test_interrupted_it_resumes_and_computes_nothing_twice(
    made: Run, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    stop_at = [2]

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if len(calls) >= stop_at[0]:
                raise KeyboardInterrupt
            calls.append(name)
            return function(*args, **options)

        return run

    for name in ("active_routes", "update_on_routes", "gradient_agreement"):
        monkeypatch.setattr(routing, name, counted(name, getattr(routing, name)))
    config = read(inputs, request(), tmp_path / "run")
    for stop_at[0] in (2, 6, 7):
        with pytest.raises(KeyboardInterrupt):
            probe(config)
    stop_at[0] = 100
    run = Run.open(probe(config))
    assert calls == ["active_routes"] * 6 + ["update_on_routes", "gradient_agreement"]
    for name in TABLES:
        pd.testing.assert_frame_equal(run.probe(name), made.probe(name))


def test_models_of_no_domain_need_no_weights(inputs: Path, tmp_path: Path) -> None:
    models = [*request()["models"], {"name": "mix", "kind": "multi"}]
    files = []
    for name in "ab":
        path = write_jsonl(tmp_path / f"{name}.jsonl", rollouts(name, "mix"))
        files.append({"model": "mix", "domain": name, "data": str(path)})
    run = Run.open(probe(read(inputs, request(models=models, rollouts=files), tmp_path / "run")))
    assert set(run.probe("route_overlap")["model"]) == {"base", "a", "b"}


@pytest.mark.parametrize("shape", ["constant", "off", "nll", "one expert"])
def test_what_cannot_be_compared_is_said(inputs: Path, tmp_path: Path, shape: str) -> None:
    asked = request()
    if shape == "constant":
        rows = [row for m in ("base", "a", "b") for row in rollouts("a", m)]
        path = write_jsonl(tmp_path / "a.jsonl", [r | {"reward": 1.0} if r["model"] == "base" else r for r in rows])
        asked["domains"] = [{"name": "a", "data": str(path)}, asked["domains"][1]]
    elif shape == "one expert":
        asked = request(models=asked["models"][:1])
        for name in "ab":
            rows = [row for m in ("base", "a") for row in rollouts(name, m)]
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
        asked["domains"] = [{"name": n, "data": str(tmp_path / f"{n}.jsonl")} for n in "ab"]
    else:
        asked["routes"] = {"tops": [0.1], "gradients": None if shape == "off" else "nll", "variant": "gradient"}
    run = Run.open(probe(read(inputs, asked, tmp_path / "run")))
    notes, rows_of = " ".join(run.results["notes"]), {name: len(run.probe(name)) for name in TABLES}
    assert rows_of["route_overlap"]
    assert bool(rows_of["gradient_agreement"]) == (shape in ("nll", "one expert"))
    assert bool(rows_of["route_direction"]) == (shape != "one expert")
    wanted = {"constant": "every reward equal to 1", "nll": "zero in expectation", "one expert": "two or more experts"}
    assert wanted.get(shape, "") in notes
    text = re.sub(r"<[^>]+>", " ", (run.path / "report.html").read_text())
    assert not re.search(r"\b(nan|np\.float64)\b", text)


def no_rewards(folder: Path, asked: Request) -> None:
    write_jsonl(folder / "b2.jsonl", [row for m in ("base", "a", "b") for row in rollouts("b", m, reward=False)])
    asked["domains"][1]["data"] = "b2.jsonl"


def one_prompt(folder: Path, asked: Request) -> None:
    write_jsonl(folder / "b1.jsonl", [row for m in ("base", "a", "b") for row in rollouts("b", m, prompts=1)])
    asked["domains"][1]["data"] = "b1.jsonl"


def no_weights(folder: Path, asked: Request) -> None:
    del asked["models"][1]["model"]


def setting(**values: Any) -> Callable[[Path, Request], None]:
    return lambda folder, asked: asked.update(routes=values)


BAD: list[tuple[Callable[[Path, Request], None], str]] = [
    (no_rewards, "set routes.gradients to nll"),
    (one_prompt, "a single prompt of 'b' for 'base'"),
    (no_weights, "model 'b' without its weights"),
    (setting(tops=[0.1, 0.1]), "give each share once"),
    (setting(tops=[0.0]), "routes.tops.0"),
    (setting(variants="gradient"), "did you mean 'variant'?"),
    (setting(gradients="kl"), "routes.gradients"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_clear_error_and_nothing_is_written(
    inputs: Path, tmp_path: Path, spoil: Callable[[Path, Request], None], message: str
) -> None:
    asked = request()
    spoil(inputs, asked)
    with pytest.raises(InputError) as caught:
        probe(read(inputs, asked, tmp_path / "run"))
    assert message in str(caught.value)
    assert "Remedy: " in str(caught.value)
    assert not list(tmp_path.glob("run*"))
