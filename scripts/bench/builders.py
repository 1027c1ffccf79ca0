"""Building BDHS negatives against a naive generate loop: the same model, pictures and sentences.

    python scripts/bench/builders.py [--items 16] [--rounds 3] [--threads 2] [--temperature 0]
                                     [--device cpu|cuda]

ours: `sample_negatives`, as the BDHS builder calls it: every sentence of every item in one call of
LocalGenerator, which batches requests of like length.
naive: one example at a time: for each sentence the processor on prompt and picture, the true
sentences before it and its beginning as the start of the answer, and transformers' `generate` with
one row, until the sentence's tokens are spent. What its reader would write first; it has the same
hidden picture tokens and the same cuts, and with temperature 0 has to write the same texts.

The small random LLaVA of pairs.py; each item has a picture of 256 tokens and an answer of three
sentences; one guided try; up to 32 new tokens a sentence. All in one process, rounds interleaved,
medians. Cutting, masking and the comparison of texts are in both times.
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
from common import machine, make_model, pictures, print_table, words

from mmalign.generate.base import Generation, Request, Sampling, request_seed
from mmalign.generate.corrupt import visible_tokens
from mmalign.generate.local import LocalGenerator
from mmalign.hallucinate import AlikeWords, Bias, BiasItem, Guided, sample_negatives
from mmalign.media import embed, open_image
from mmalign.records import user

SENTENCES, SENTENCE_WORDS, NEW_TOKENS = 3, (8, 24), 32


def make_items(count: int) -> list[BiasItem]:
    rng = random.Random(0)
    return [
        BiasItem(
            id=f"{number:04d}",
            prompt=user(words(rng, rng.randint(16, 40)), images=1),
            images=(embed(picture),),
            chosen=" ".join(
                words(rng, rng.randint(*SENTENCE_WORDS)) + " ." for _ in range(SENTENCES)
            ),
        )
        for number, picture in enumerate(pictures(count, 224))
    ]


class OneByOne:
    """A generator without batches: transformers' processor and `generate`, a request at a time."""

    name = "naive"

    def __init__(self, ours: LocalGenerator, device: str) -> None:
        self.model, self.processor = ours.policy.model, ours.policy.processor
        self.device = device

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Generation]:
        """Answer each request by itself."""
        return [self._one(request, sampling) for request in requests]

    @torch.inference_mode()
    def _one(self, request: Request, sampling: Sampling) -> Generation:
        messages = [
            {"role": one.role, "content": [_block(block) for block in one.content]}
            for one in request.prompt
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        begun = f"{text} {request.prefill}" if request.prefill else text
        shown = [open_image(media, None) for media in request.images]
        inputs = self.processor(text=begun, images=shown, return_tensors="pt").to(self.device)
        places = inputs["input_ids"][0] == self.model.config.image_token_id
        seen = visible_tokens(request.corruption, int(places.sum()), sampling.seed)
        inputs["attention_mask"][0, places] = seen.long().to(self.device)
        # Left alone, generate would not count hidden tokens as places.
        inputs["position_ids"] = torch.arange(len(places), device=self.device)[None]
        sampled: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            torch.manual_seed(request_seed(sampling.seed, request.id))
            sampled = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
        out = self.model.generate(**inputs, max_new_tokens=sampling.max_new_tokens, **sampled)
        new = out[0, inputs["input_ids"].shape[1] :]
        tokenizer = self.processor.tokenizer
        ended = bool((new == tokenizer.eos_token_id).any())
        # A blank before it, as words of this tokenizer have when they follow others.
        made = " " + tokenizer.decode(new, skip_special_tokens=True)
        return Generation(id=request.id, text=made, num_tokens=len(new) - ended, finished=ended)


def _block(block: Any) -> dict[str, str]:
    return {"type": "text", "text": block.text} if block.type == "text" else {"type": block.type}


class Counted:
    """A generator that remembers what came of it."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.name = inner, inner.name
        self.made: list[Generation] = []

    def generate(self, requests: Any, sampling: Sampling) -> list[Generation]:
        """Pass on, and keep the answers."""
        self.made = self.inner.generate(requests, sampling)
        return self.made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bias = Bias(
        guidance=Guided(sentence_tokens=NEW_TOKENS),
        tries=1,
        similarity=AlikeWords(),
    )
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=args.temperature, seed=0)
    items = make_items(args.items)
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "model")
        ours = LocalGenerator.from_checkpoint(str(path), device=args.device)
    generators = {"naive": Counted(OneByOne(ours, args.device)), "ours": Counted(ours)}

    def build(generator: Any, some: list[BiasItem]) -> None:
        sample_negatives(
            some, generator, similarity=bias.similarity.load(), settings=bias, sampling=sampling
        )

    found = timed({n: lambda g=g: build(g, items) for n, g in generators.items()}, args)
    print(f"{' '.join(sys.argv)}\n{machine(args.device, args.threads)}")
    print(
        f"{args.items} items of {SENTENCES} sentences, up to {NEW_TOKENS} new tokens each, "
        f"temperature {args.temperature:g}; median of {args.rounds} interleaved rounds; baseline "
        "naive: transformers' generate, one sentence of one example at a time\n"
    )
    rows = []
    for name, seconds in found.items():
        made = generators[name].made
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{len(made) / seconds:.1f}",
                f"{sum(one.num_tokens for one in made) / seconds:.0f}",
                f"{found['naive'] / seconds:.2f}x",
            ]
        )
    print_table(["run", "s", "sentences/s", "new tokens/s", "throughput / naive"], rows)
    same = [
        a.text.split() == b.text.split()
        for a, b in zip(*(generators[n].made for n in ("naive", "ours")), strict=True)
    ]
    if args.temperature == 0:
        print(f"\nsame texts: {sum(same)} of {len(same)}")


def timed(runs: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each run; a first round warms up and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
