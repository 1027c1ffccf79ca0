"""Layouts against each other, many responses behind one prompt, and a step against its floor.

    python scripts/bench/steps.py layouts|many|floor [--rounds 5] [--threads 2]

All in one process: forward and backward of the scorer with a DPO-like loss, on the small random
LLaVA of pairs.py with a frozen tower, float32, rounds interleaved, medians.

layouts: padded, rows of shared_prefix under masks, packed, and what `auto` takes, over mixes of
    prompt length, response length and responses per prompt.
many: 8 responses behind one prompt of 626 tokens, against 8 rows.
floor: operations of a packed step counted by torch, against the floor (each distinct token once
    through the language model, each picture once through the tower, response positions alone to
    the vocabulary; a backward pass is twice a forward one), and its time against the same number
    of operations at this machine's rate for a large matrix product.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import gemm_rate, machine, make_model, pictures, print_table, words
from floor import floor_of

from mmalign.attention.choose import MASKED, choose
from mmalign.media import embed
from mmalign.models.load import ModelConfig, Policy, load_policy
from mmalign.records import user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer

# Prompts of so many words (258 or 578 tokens more with a picture), words of a response, responses
# for each prompt, prompts.
MIXES = {
    "pairs, picture, short answers": (30, (8, 16), 2, 4, True),
    "pairs, picture, middle answers": (30, (24, 104), 2, 4, True),
    "pairs, picture, long answers": (30, (250, 260), 2, 2, True),
    "pairs, text, long answers": (16, (250, 260), 2, 2, False),
    "pairs, text, unequal answers": (16, (10, 400), 2, 4, False),
    "pairs, long text, short answers": (600, (20, 40), 2, 2, False),
    "four answers, picture": (30, (60, 62), 4, 2, True),
    "one answer each, picture": (30, (60, 62), 1, 4, True),
    "one answer each, unequal text": (100, (10, 400), 1, 4, False),
}


def load(folder: str, side: int) -> Policy:
    return load_policy(ModelConfig(path=str(make_model(Path(folder) / str(side), side))))


def make_batch(
    policy: Policy,
    prompt: int,
    response: tuple[int, int],
    responses: int,
    prompts: int,
    picture: bool,
    side: int = 224,
) -> CandidateBatch:
    rng = random.Random(0)
    shown = pictures(prompts, side)
    conditions, candidates = [], []
    for number in range(prompts):
        turn = user(words(rng, prompt), images=int(picture))
        media = [embed(shown[number])] if picture else []
        conditions.append(policy.preparer.condition(turn, media, None, id=str(number)))
        for _ in range(responses):
            ids = policy.preparer.response(turn, words(rng, rng.randint(*response)))
            candidates.append(Candidate(condition=number, response_ids=ids))
    return CandidateBatch(conditions=conditions, candidates=candidates)


def steps_of(policy: Policy) -> dict[str, Callable[[CandidateBatch], Any]]:
    """A forward and backward pass in each layout, by its name."""
    config = policy.model.config.get_text_config()
    attention = choose("auto", policy.family, config, "cpu", torch.float32)
    masked, free = (Scorer(policy.model, policy.family, a).train() for a in (MASKED, attention))
    planners = {
        "padded": (masked, planner_of(policy, "padded")),
        "rows": (masked, planner_of(policy, "shared_prefix")),
        "packed": (free, planner_of(policy, "shared_prefix", attention)),
        "auto": (free, planner_of(policy, "auto", attention)),
    }

    def step(scorer: Scorer, planner: Any) -> Callable[[CandidateBatch], Any]:
        def run(batch: CandidateBatch) -> Any:
            policy.model.zero_grad(set_to_none=False)
            plan = planner(batch)
            sums = scorer(plan).sums()
            signs = torch.ones_like(sums)
            signs[1::2] = -1
            torch.nn.functional.softplus(-0.1 * (sums * signs).sum()).backward()
            return plan

        return run

    return {name: step(*parts) for name, parts in planners.items()}


def timed(
    steps: dict[str, Callable[[CandidateBatch], Any]], batch: CandidateBatch, rounds: int
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, run in steps.items():
            started = time.perf_counter()
            run(batch)
            if number:  # The first round makes the gradients' memory.
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def layouts(policy: Policy, rounds: int) -> None:
    steps = steps_of(policy)
    rows = []
    for name, mix in MIXES.items():
        batch = make_batch(policy, *mix)
        found = timed(steps, batch, rounds)
        taken = steps["auto"](batch).layout
        rows.append(
            [
                name,
                *(f"{found[n]:.2f}" for n in ("padded", "rows", "packed", "auto")),
                f"{found['padded'] / found['rows']:.2f}x",
                f"{found['padded'] / found['packed']:.2f}x",
                f"{found['padded'] / found['auto']:.2f}x",
                taken,
            ]
        )
    header = ["mix", "padded s", "rows s", "packed s", "auto s"]
    header += ["padded / rows", "padded / packed", "padded / auto", "auto took"]
    print_table(header, rows)


def many(policy: Policy, rounds: int) -> None:
    batch = make_batch(policy, 43, (99, 99), 8, 1, True, side=336)
    steps = steps_of(policy)
    found = timed({name: steps[name] for name in ("padded", "rows", "packed")}, batch, rounds)
    prompt = len(batch.conditions[0].prompt_ids)
    print(f"8 responses of {len(batch.candidates[0].response_ids)} tokens behind {prompt}\n")
    print_table(
        ["layout", "s", "padded / it"],
        [[n, f"{s:.2f}", f"{found['padded'] / s:.2f}x"] for n, s in found.items()],
    )


def counted(run: Callable[[], Any]) -> float:
    """Operations of a call: torch's count of products, and the CPU's attention by its shapes."""
    from torch.utils.flop_counter import FlopCounterMode

    def forward(q, k, v, *rest, is_causal=False, out_shape=None, **_):
        causal = rest[1] if len(rest) > 1 else is_causal
        return _attention(q, k, causal, products=2)

    def backward(grad, q, k, v, out, lse, dropout, causal, *_, out_shape=None, **__):
        return _attention(q, k, causal, products=5)

    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return float(counter.get_total_flops())


def _attention(q: Any, k: Any, causal: bool, products: int) -> float:
    _, heads, queries, width = q
    pairs = queries * k[2] / (2 if causal else 1)
    return 2 * products * heads * width * pairs


def floor(policy: Policy, rounds: int, threads: int) -> None:
    batch = make_batch(policy, 30, (24, 104), 2, 4, True)
    steps = steps_of(policy)
    least, rate = floor_of(policy, batch), gemm_rate(threads)
    rows = []
    rates = [rate]
    for name in ("padded", "rows", "packed"):
        seconds = timed({name: steps[name]}, batch, rounds)[name]
        rates.append(gemm_rate(threads))
        done = counted(lambda name=name: steps[name](batch))
        rows.append(
            [
                name,
                f"{done / 1e9:.0f}",
                f"{done / least:.3f}",
                f"{seconds:.2f}",
                f"{seconds / (done / rates[-1]):.2f}",
                f"{seconds / (least / rates[-1]):.2f}",
            ]
        )
    told = ", ".join(f"{r / 1e9:.0f}" for r in rates)
    print(f"floor {least / 1e9:.0f} GFLOP; 2048^3 product at {told} GFLOP/s\n")
    header = ["layout", "GFLOP", "/ floor", "s", "s / its GFLOP at that rate"]
    print_table([*header, "s / floor at that rate"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("layouts", "many", "floor"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{' '.join(sys.argv)}\n{machine('cpu', args.threads)}\n")
    with tempfile.TemporaryDirectory() as folder:
        policy = load(folder, 336 if args.what == "many" else 224)
        if args.what == "layouts":
            layouts(policy, args.rounds)
        elif args.what == "many":
            many(policy, args.rounds)
        else:
            floor(policy, args.rounds, args.threads)


if __name__ == "__main__":
    main()
