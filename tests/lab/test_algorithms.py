"""GRPO, RLOO, DPO and LoRA in the lab: against closed forms, TRL called directly, and PEFT's own merge."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from interference import Checkpoint, Update
from interference.errors import InputError
from paper_repro.lab.build import build
from paper_repro.lab.config import LabConfig, quick
from paper_repro.lab.domains import DOMAINS, vocabulary
from paper_repro.lab.files import load, save
from paper_repro.lab.model import FAMILIES, make_model, make_tokenizer
from paper_repro.lab.pairs import preference_pairs
from paper_repro.lab.reinforce import ALGORITHMS, Trained, dpo, grpo, rloo

TINY = quick(
    hidden=16, heads=2, rl_batch=16, rl_generations=4, pair_rollouts=6, max_new_tokens=5, rl_learning_rate=1e-3
)
WORDS = [word for word in vocabulary() if word.isalpha()]
PROMPTS = [
    {"prompt": f"{a} {b}", "prompt_id": str(i)} for i, (a, b) in enumerate(zip(WORDS, WORDS[8:24], strict=False))
]


def parity(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that a random model gets about half of the time."""
    return [float(sum(map(len, completion)) % 2) for completion in completions]


def start(family: str = "qwen3") -> tuple[Any, Any]:
    words = vocabulary()
    tokenizer = make_tokenizer(words)
    return make_model(family, len(tokenizer), hidden=16, layers=1, heads=2, seed=0), tokenizer


def run(config: LabConfig, steps: int = 2, family: str = "qwen3", **settings: Any) -> Trained:
    model, tokenizer = start(family)
    rows: list[dict[str, Any]] = PROMPTS
    if config.algorithm == "dpo":
        rows = preference_pairs(config, model, tokenizer, rows, reward=parity, seed=3)
    return ALGORITHMS[config.algorithm](config, model, tokenizer, rows, steps=steps, **{"reward": parity} | settings)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_probability(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """log p(response | prompt), summed over its tokens."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response].sum()


def gradient_norm(model: Any, value: Tensor) -> float:
    grads = torch.autograd.grad(value, list(model.parameters()))
    return float(torch.cat([g.flatten() for g in grads]).norm())


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "dpo"])
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_every_algorithm_changes_the_weights_and_repeats(algorithm: str, lora_rank: int | None) -> None:
    config = TINY.model_copy(update={"algorithm": algorithm, "lora_rank": lora_rank})
    one, two = run(config), run(config)
    torch.manual_seed(99)  # the global state must not matter
    three = run(config.model_copy(update={"training_seed": 5}))
    assert isinstance(one.model, PeftModel) == (lora_rank is not None)
    assert not one.model.training
    assert same(weights(one.model), weights(two.model))
    assert not same(weights(one.model), weights(three.model))
    trained = [n for n, p in one.model.named_parameters() if p.requires_grad]
    assert all(("lora_" in name) == (lora_rank is not None) for name in trained)
    curve = "training_accuracies" if algorithm == "dpo" else "training_rewards"
    assert {len(one.curves[name]) for name in (curve, "gradient_norms")} == {2}
    assert one.seconds > 0


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_first_gradient_is_the_equation(algorithm: str) -> None:
    """The norm of the first step's gradient, from the rollouts that the reward function was shown."""
    seen: list[dict[str, Any]] = []

    def spy(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        seen.append({"prompts": prompts, "ids": columns["completion_ids"], "rewards": parity(prompts, completions)})
        return parity(prompts, completions)

    config = TINY.model_copy(update={"algorithm": algorithm})
    trained = run(config, steps=1, reward=spy)
    model, tokenizer = start()
    groups = torch.tensor(seen[0]["rewards"]).view(-1, config.rl_generations)
    total, size = groups.sum(1, keepdim=True), config.rl_generations
    if algorithm == "grpo":
        advantages = (groups - total / size) / config.max_new_tokens
    else:
        advantages = groups - (total - groups) / (size - 1)
    assert advantages.abs().max() > 0.05
    value = torch.stack(
        [
            a * log_probability(model, tokenizer(prompt)["input_ids"], list(ids))
            for a, prompt, ids in zip(advantages.flatten(), seen[0]["prompts"], seen[0]["ids"], strict=True)
        ]
    ).mean()
    assert trained.curves["gradient_norms"][0] == pytest.approx(gradient_norm(model, value), rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_dpo_takes_the_sampled_tokens_as_they_are(weight: float) -> None:
    """At the reference every sigmoid is 1/2, so the first gradient is -beta/2 * mean of grad log p(y+) - grad log p(y-),
    and with `dpo_sft` its weight times the gradient of the chosen responses' loss per token."""
    model, tokenizer = start()
    config = TINY.model_copy(update={"algorithm": "dpo", "dpo_beta": 0.3, "dpo_sft": weight})
    pairs = preference_pairs(config, model, tokenizer, PROMPTS, reward=parity, seed=3)
    ids = {side: [pair[f"{side}_token_ids"] for pair in pairs] for side in ("prompt", "chosen", "rejected")}
    # TRL would append an end token to those that were cut.
    assert not all(response[-1] == tokenizer.eos_token_id for response in ids["chosen"] + ids["rejected"])
    config = config.model_copy(update={"rl_batch": 2 * len(pairs)})
    trained = dpo(config, copy.deepcopy(model), tokenizer, pairs, reward=parity, steps=1)
    chosen, rejected = (
        torch.stack([log_probability(model, *pair) for pair in zip(ids["prompt"], ids[side], strict=True)])
        for side in ("chosen", "rejected")
    )
    per_token = chosen.sum() / sum(map(len, ids["chosen"]))
    value = 0.15 * (chosen - rejected).mean() + weight * per_token
    assert trained.curves["gradient_norms"][0] == pytest.approx(gradient_norm(model, value), rel=1e-4)
    assert trained.curves["training_losses"][0] == pytest.approx(0.6931 - weight * float(per_token), abs=1e-3)


def test_pairs_are_disjoint_and_in_order() -> None:
    model, tokenizer = start()

    def length(prompts: Sequence[str], completions: Sequence[str], prompt_id: Sequence[str], **_: Any) -> list[float]:
        return [float(len(c)) if i != "0" else 1.0 for c, i in zip(completions, prompt_id, strict=True)]

    pairs = preference_pairs(TINY, model, tokenizer, PROMPTS, reward=length, seed=3)
    assert {pair["prompt_id"] for pair in pairs} == {row["prompt_id"] for row in PROMPTS} - {
        "0"
    }  # one reward: left out
    for number in {pair["prompt_id"] for pair in pairs}:
        group = [pair for pair in pairs if pair["prompt_id"] == number]
        assert 1 <= len(group) <= TINY.pair_rollouts // 2
        best, worst = [p["chosen_reward"] for p in group], [p["rejected_reward"] for p in group]
        assert best == sorted(best, reverse=True)
        assert worst == sorted(worst)
        assert min(best) > max(worst)
    for pair in pairs:
        assert pair["chosen_reward"] == len(pair["chosen"]) > len(pair["rejected"]) == pair["rejected_reward"]
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(pair[f"{side}_token_ids"], skip_special_tokens=True) == pair[side]
    with pytest.raises(InputError, match="two different rewards"):
        preference_pairs(TINY, model, tokenizer, PROMPTS, reward=lambda prompts, **_: [1.0] * len(prompts), seed=3)


def test_defaults_are_what_they_were() -> None:
    """GRPO as the lab has always called it, written out; the run in between keeps a step, which must change nothing."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = start()
    arguments = GRPOConfig(
        output_dir="unused", seed=0, max_steps=3, per_device_train_batch_size=16, num_generations=4,
        max_completion_length=5, learning_rate=1e-3, lr_scheduler_type="constant", adam_beta2=0.99, weight_decay=0.0,
        max_grad_norm=1.0, beta=0.0, temperature=1.0, top_p=1.0, top_k=0, scale_rewards="none", loss_type="dr_grpo",
        bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=True, dataloader_pin_memory=False,
        save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True, log_level="error",
    )  # fmt: skip
    GRPOTrainer(
        model=model, reward_funcs=parity, args=arguments, train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tokenizer,
    ).train()  # fmt: skip
    assert same(weights(run(TINY, steps=3).model), weights(model))


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_kept_steps_are_what_a_shorter_run_ends_with(algorithm: str) -> None:
    config = TINY.model_copy(update={"algorithm": algorithm, "keep_steps": (1, 2, 9)})
    kept: dict[int, dict[str, Tensor]] = {}
    whole = run(config, steps=3, keep=lambda step, model: kept.update({step: weights(model)}))
    assert list(kept) == [1, 2]
    assert same(kept[2], weights(run(config, steps=2).model))
    assert not same(kept[2], weights(whole.model))


def test_training_seed_stands_in_for_the_seed_alone() -> None:
    one = run(TINY.model_copy(update={"seed": 7, "training_seed": 0}))
    assert same(weights(one.model), weights(run(TINY).model))


def test_more_iterations_reuse_a_batch_of_rollouts() -> None:
    calls: list[int] = []

    def counted(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        calls.append(len(prompts))
        return parity(prompts, completions)

    run(TINY.model_copy(update={"rl_iterations": 2}), steps=4, reward=counted)
    assert calls == [TINY.rl_batch] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", [grpo, rloo])
def test_adapter_is_an_update_of_its_base(family: str, train: Callable[..., Trained], tmp_path: Path) -> None:
    model, tokenizer = start(family)
    save(tmp_path / "base", model, tokenizer)
    config = TINY.model_copy(update={"lora_rank": 4, "lora_alpha": 12})
    trained = train(config, model, tokenizer, PROMPTS, reward=parity, steps=2)
    save(tmp_path / "rl", trained.model, tokenizer)
    check_adapter(tmp_path / "base", tmp_path / "rl")


def check_adapter(base: Path, adapter: Path) -> None:
    """The update that the product reads is PEFT's own merge in float64 minus the base, on every linear layer but the head."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (adapter / settings["base_model_name_or_path"]).resolve() == base.resolve()
    update = Update.between(Checkpoint.open(base), Checkpoint.open(adapter))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, local_files_only=True)
    before = weights(plain)
    peft = PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=False)
    merged = {name: tensor.detach() for name, tensor in peft.merge_and_unload().state_dict().items()}
    linear = {
        n for n, t in before.items() if t.ndim == 2 and not any(w in n for w in ("embed", "wte", "wpe", "lm_head"))
    }
    assert {name for name in merged if not torch.equal(merged[name], before[name])} == linear
    assert set(update) == linear
    for name in linear:
        torch.testing.assert_close(update.dense(name).double(), merged[name] - before[name], rtol=1e-6, atol=1e-8)


SMALL = quick(
    train_prompts=24, heldout_prompts=8, sft_steps=200, rollouts=2, rl_batch=8, rl_generations=4, pair_rollouts=8,
    algorithm="dpo", lora_rank=2, keep_steps=(1, 3), rl_steps={**dict.fromkeys(DOMAINS, 2), "qa": 3},
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lab") / "world"
    build(out, SMALL)
    return out


def test_lab_of_adapters_from_preferences(lab: Path) -> None:
    for domain in DOMAINS:
        record = json.loads((lab / "stages" / f"rl_{domain}.json").read_text())
        assert record["kept_steps"] == ([1, 3] if domain == "qa" else [1])
        assert 0 < record["training_seconds"] <= record["seconds"] + 0.01
        pairs = [json.loads(line) for line in (lab / "data" / f"{domain}_pairs.jsonl").read_text().splitlines()]
        train = {
            json.loads(line)["prompt"] for line in (lab / "data" / f"{domain}_train.jsonl").read_text().splitlines()
        }
        assert {pair["prompt"] for pair in pairs} <= train
        assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
        check_adapter(lab / "base", lab / f"rl_{domain}")
        check_adapter(lab / "base", lab / f"rl_{domain}_step1")
    base, tuned = (load(lab / name)[0].state_dict() for name in ("base", "rl_qa"))
    update = Update.between(Checkpoint.open(lab / "base"), Checkpoint.open(lab / "rl_qa"))
    assert tuned.keys() == base.keys()
    for name in update:  # what is read back for merging is the base with the adapter in it
        torch.testing.assert_close(tuned[name], base[name] + update.dense(name))
    final, kept, early = (Checkpoint.open(lab / f"rl_qa{end}") for end in ("", "_step3", "_step1"))
    assert all(torch.equal(final.tensor(name), kept.tensor(name)) for name in final.names())
    assert not all(torch.equal(final.tensor(name), early.tensor(name)) for name in final.names())


def test_a_lab_without_a_setting_has_its_default(lab: Path) -> None:
    path = lab / "lab.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in settings.items() if key not in ("dpo_beta", "training_seed")})
    )
    assert build(lab, SMALL).spent < 2.0
    for change in ({"dpo_beta": 0.2}, {"training_seed": 1}, {"keep_steps": (1,)}, {"algorithm": "rloo"}):
        with pytest.raises(InputError, match=next(iter(change))):
            build(lab, SMALL.model_copy(update=change))
    path.write_text(json.dumps(settings))


def test_settings_that_cannot_be() -> None:
    for bad in ({"algorithm": "ppo"}, {"keep_steps": (0,)}, {"keep_steps": (76,)}, {"dpo_beta": 0}, {"lora_rank": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LabConfig.model_validate(bad)


def test_lora_alpha_is_twice_the_rank_unless_given() -> None:
    for given, scale in ((None, 2.0), (12, 3.0)):
        model = run(TINY.model_copy(update={"lora_rank": 4, "lora_alpha": given}), steps=1).model
        assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {scale}
