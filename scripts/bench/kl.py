"""What RRPO's KL costs: one step of the same pairs with alpha 0 and with alpha 0.01.

    python scripts/bench/kl.py [--rounds 3] [--pairs 2] [--device cpu|cuda]

A language model of Qwen2.5-0.5B's sizes (24 layers of 896, 152k words), random weights, with LoRA
on it as RRPO trains; prompts of 288 tokens, responses of 62; reference in the step. Step times are
medians of interleaved steps in one process; peak activation memory is measured in a process for
each, as growth over what the weights take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import Memory

VOCAB = 151_936
PROMPT, RESPONSE = 288, 62
ALPHAS = {"alpha 0": 0.0, "alpha 0.01": 0.01}


def make_policy(folder: str, device: str):
    from mmalign.models.load import Lora, ModelConfig, load_policy
    from mmalign.models.tiny import TinyModel, Tower

    sizes = Tower(hidden=896, layers=24, heads=14, mlp=4864)
    small = TinyModel(output=folder, text=sizes.model_copy(update={"layers": 1})).build()
    config = json.loads((Path(small) / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = sizes.layers
    config["text_config"]["vocab_size"] = VOCAB
    from transformers import AutoConfig, LlavaForConditionalGeneration

    (Path(small) / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    LlavaForConditionalGeneration(AutoConfig.from_pretrained(small)).save_pretrained(small)
    policy = load_policy(ModelConfig(path=folder, lora=Lora(rank=16, alpha=32)))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # zero at first: the policy would be the reference
            torch.nn.init.normal_(parameter, std=0.01)
    policy.model.to(device)
    return policy


def make_batch(policy, pairs: int, device: str):
    from mmalign.scores import PairTable
    from mmalign.scoring.candidates import Candidate, CandidateBatch, Condition
    from mmalign.scoring.plan import make_plan

    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(300, VOCAB, (count,), generator=draw).tolist()

    conditions = [
        Condition(
            id=str(row), prompt_ids=ids(PROMPT), images=(), positions=torch.arange(PROMPT)[None]
        )
        for row in range(pairs)
    ]
    marked = [10 <= t < 16 for t in range(RESPONSE)]
    candidates = [
        Candidate(condition=row, response_ids=ids(RESPONSE), marked=marked)
        for row in range(pairs)
        for _ in range(2)
    ]
    plan = make_plan(
        CandidateBatch(conditions=conditions, candidates=candidates),
        policy.family,
        "shared_prefix",
        image_token_id=-1,
        video_token_id=None,
        pad_token_id=0,
    )
    first = torch.arange(pairs) * 2
    return plan.to(device), PairTable(chosen=first.to(device), rejected=(first + 1).to(device))


def step(scorer, policy, plan, table, alpha: float) -> float:
    """One forward and backward pass with its reference; returns the loss."""
    from mmalign.losses import RRPO
    from mmalign.losses.base import totals_of

    with torch.no_grad(), policy.model.disable_adapter():
        reference = scorer(plan, distributions=alpha > 0)
    scores = scorer(
        plan, against=reference.distributions, kl_of=table.chosen if alpha > 0 else None
    )
    output = RRPO(alpha=alpha)(scores, reference, table, totals_of(scores, table))
    output.loss.backward()
    policy.model.zero_grad()
    return output.loss.item()


def measure(device: str, pairs: int, rounds: int, only: str | None) -> dict:
    from mmalign.scoring.scorer import Scorer

    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy(folder, device)
    scorer = Scorer(policy.model, policy.family)
    plan, table = make_batch(policy, pairs, device)
    names = list(ALPHAS) if only is None else [only]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = Memory(device)
    for name in names:
        step(scorer, policy, plan, table, ALPHAS[name])  # the first one makes what stays
    memory.reset()
    for _ in range(rounds):
        for name in names:
            started = time.perf_counter()
            step(scorer, policy, plan, table, ALPHAS[name])
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {"seconds": seconds, "megabytes": memory.growth()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=list(ALPHAS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.device, args.pairs, 1, args.only)))
        return
    peaks = {}
    for name in ALPHAS:
        command = [sys.executable, __file__, "--only", name, "--device", args.device]
        command += ["--pairs", str(args.pairs)]
        # Large blocks go back to the system when they are freed, so that resident memory is honest.
        honest = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=honest).stdout
        peaks[name] = json.loads(out.splitlines()[-1])["megabytes"]
    seconds = measure(args.device, args.pairs, args.rounds, None)["seconds"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("| step | s (median) | time | peak activations, MB | memory |\n|---|---|---|---|---|")
    plain = next(iter(ALPHAS))
    for name in ALPHAS:
        time_ratio, memory_ratio = medians[name] / medians[plain], peaks[name] / peaks[plain]
        print(
            f"| {name} | {medians[name]:.2f} | {time_ratio:.2f}x | {peaks[name]:.0f} "
            f"| {memory_ratio:.2f}x |"
        )


if __name__ == "__main__":
    main()
