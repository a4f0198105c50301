"""Time of the token jets beside every other way to the same numbers, all in one process and one run.

    python benchmarks/jets.py [--size small|medium] [--rounds 4] [--threads 1] [--out runs/bench/jets.json]

Methods are interleaved and the minimum over rounds is taken; the unit is the fastest no-grad forward pass of the same run,
which computes log-probabilities at the response positions only, in chunks. The gradient, jvp and HVP are along one update and
give sums over tokens; the jets give every token's logp, d1, d2 and fisher.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, func
from transformers import Qwen3Config, Qwen3ForCausalLM

from interference import derivatives
from interference.domain import Batch
from interference.jets import token_jets
from interference.model import Model, prepare
from interference.records import provenance, write_json

SIZES = {  # layers, hidden, intermediate, heads, vocabulary, sequences, tokens, first response token
    "small": (4, 128, 384, 4, 512, 256, 24, 12),
    "medium": (6, 512, 1408, 8, 8192, 4, 256, 64),
}


def make(size: str) -> tuple[Model, Batch, list[dict[str, Tensor]]]:
    """A random Qwen3, a batch and four random updates."""
    layers, hidden, intermediate, heads, vocabulary, B, T, start = SIZES[size]
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=T,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = prepare(Qwen3ForCausalLM(config))
    updates = [{n: 1e-2 * torch.randn_like(p) for n, p in model.parameters.items()} for _ in range(4)]
    targets = torch.zeros(B, T, dtype=torch.bool)
    targets[:, start:] = True
    return model, Batch(torch.randint(0, vocabulary, (B, T)), targets, tuple(range(B))), updates


def forward(model: Model, batch: Batch, chunk: int = 512) -> Tensor:
    """Log-probabilities of the response tokens, without gradients and without logits elsewhere."""
    with torch.no_grad():
        hidden = model.module.model(batch.input_ids, use_cache=False).last_hidden_state[:, :-1][batch.targets[:, 1:]]
        labels = batch.input_ids[batch.targets]
        head = model.module.lm_head.weight
        parts = [
            (h @ head.T).log_softmax(-1).gather(-1, y[:, None])
            for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
        ]
        return torch.cat(parts)[:, 0]


def methods(model: Model, batch: Batch, updates: list[dict[str, Tensor]]) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    total = lambda p: derivatives.sequence_logp(model, p, batch).sum()  # noqa: E731
    theta, d = model.parameters, updates[0]

    def double_backward() -> dict[str, Tensor]:
        along = lambda p: sum((g * v).sum() for g, v in zip(func.grad(total)(p).values(), d.values(), strict=True))  # noqa: E731
        return derivatives.gradient(along, theta)

    return {
        "forward": lambda: forward(model, batch),
        "gradient": lambda: derivatives.gradient(total, theta),
        "jvp": lambda: derivatives.jvp(total, theta, d),
        "hvp forward-over-reverse": lambda: derivatives.hvp(total, theta, d),
        "hvp double backward": double_backward,
        "jets nested, K=1": lambda: token_jets(model, updates[:1], batch, engine="nested"),
        "jets taylor, K=1": lambda: token_jets(model, updates[:1], batch),
        "jets taylor, K=4 diagonal": lambda: token_jets(model, updates, batch, pairs=False),
        "jets taylor, K=4 pairs": lambda: token_jets(model, updates, batch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/jets.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, batch, updates = make(arguments.size)
    timed = methods(model, batch, updates)
    best = {name: {"wall_s": float("inf"), "cpu_s": float("inf")} for name in timed}
    for _ in range(arguments.rounds):
        for name, run in timed.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            best[name] = {"wall_s": min(best[name]["wall_s"], wall), "cpu_s": min(best[name]["cpu_s"], cpu)}
    unit = best["forward"]
    rows = {
        n: {**t, "forwards": t["wall_s"] / unit["wall_s"], "forwards_cpu": t["cpu_s"] / unit["cpu_s"]}
        for n, t in best.items()
    }
    for name, row in rows.items():
        print(
            f"{name:28} {row['wall_s']:8.3f} s  {row['forwards']:6.1f} forwards  ({row['forwards_cpu']:.1f} by CPU time)"
        )
    parameters = sum(p.numel() for p in model.parameters.values())
    settings = vars(arguments) | {
        "out": str(arguments.out),
        "parameters": parameters,
        "processor": platform.processor(),
    }
    write_json(arguments.out, {"settings": settings, "methods": rows, **provenance()})
    print(arguments.out)


if __name__ == "__main__":
    main()
