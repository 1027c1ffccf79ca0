"""A POPE evaluation against one generate call per question: the same model, pictures, questions.

    python scripts/bench/evaluation.py [--questions 300] [--pictures 50] [--new-tokens 16]
                                       [--batch-size 32] [--rounds 3] [--threads 2]
                                       [--device cpu|cuda]

ours: `evals.run.evaluate` from the question file to results.json: what `mmalign eval run` does once
the model is loaded, scoring included.
naive: what its reader would write first with transformers alone: for each question open the
picture, the processor on prompt and picture, `generate` with one row. Greedy, with the same tokens
forbidden and the same tokens ending an answer, so that it has to write the same answers, token for
token; it scores nothing.

The small random LLaVA of pairs.py: 256 picture tokens. Each picture has its questions in a row, of
5 to 8 words, then an instruction of 7, as in POPE's files. A random model seldom ends an answer, so
nearly all are of --new-tokens tokens: 16 is POPE's limit here, and 2 are a word and the end of the
turn, which is what a trained model writes. All in one process, rounds interleaved, a first round
left out, medians.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from builders import Counted, timed
from common import machine, make_model, pictures, print_table, words

from evals.benchmarks.pope import Pope
from evals.config import EvalModel, EvalRecipe
from evals.run import evaluate
from mmalign.generate.base import Request
from mmalign.generate.local import LocalGenerator, banned_ids, end_ids
from mmalign.media import open_image


def write_pope(
    folder: Path, questions: int, num_pictures: int, new_tokens: int, vocabulary: int, side: int
) -> Pope:
    """A POPE split of random words about random pictures, its files in `folder`."""
    rng = random.Random(0)
    for number, picture in enumerate(pictures(num_pictures, side)):
        picture.save(folder / f"{number}.png")
    rows = [
        {
            "question_id": number,
            "image": f"{number * num_pictures // questions}.png",
            "text": words(rng, rng.randint(5, 8), vocabulary),
            "label": ("yes", "no")[number % 2],
        }
        for number in range(questions)
    ]
    file = folder / "questions.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Pope(
        split="random",
        questions=file,
        images=folder,
        prompt="{question} " + words(rng, 7, vocabulary),
        max_new_tokens=new_tokens,
    )


class OneByOne:
    """A generate call for each question, of transformers alone."""

    def __init__(self, ours: LocalGenerator, new_tokens: int, device: str) -> None:
        self.model, self.processor = ours.policy.model, ours.policy.processor
        self.device = device
        self.decoding: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": new_tokens,
            "suppress_tokens": banned_ids(ours.policy),
            "eos_token_id": end_ids(ours.policy),
            "pad_token_id": ours.policy.preparer.pad_token_id,
        }
        self.made: list[tuple[int, ...]] = []

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> None:
        """Answer all of them, one by one, and keep their tokens."""
        self.made = [self._one(request) for request in requests]

    def _one(self, request: Request) -> tuple[int, ...]:
        messages = [
            {
                "role": one.role,
                "content": [
                    {"type": "text", "text": block.text}
                    if block.type == "text"
                    else {"type": block.type}
                    for block in one.content
                ],
            }
            for one in request.prompt
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        shown = [open_image(media, request.media_root) for media in request.images]
        inputs = self.processor(text=text, images=shown, return_tensors="pt").to(self.device)
        out = self.model.generate(**inputs, **self.decoding)
        return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


class Kept(Counted):
    """A generator that remembers the answers of all its calls."""

    def generate(self, requests: Any, sampling: Any) -> Any:
        """Pass on, and keep the answers."""
        made = self.inner.generate(requests, sampling)
        self.made += made
        return made


def measure(
    pope: Pope, model: Path, folder: Path, args: argparse.Namespace
) -> tuple[dict[str, float], list[bool]]:
    """Median seconds of each run, and for each question whether both wrote the same tokens."""
    local = LocalGenerator.from_checkpoint(
        str(model), batch_size=args.batch_size, device=args.device
    )
    naive, ours = OneByOne(local, pope.max_new_tokens, args.device), Kept(local)
    outputs: Iterator[int] = count()

    def run_ours() -> None:
        ours.made = []
        recipe = EvalRecipe(
            name="bench",
            model=EvalModel(path=str(model)),
            output=folder / f"run-{next(outputs)}",
            benchmarks=[pope],
            batch_size=args.batch_size,
        )
        evaluate(recipe, ours)

    found = timed({"naive": lambda: naive.answer(pope.requests()), "ours": run_ours}, args)
    same = [one.token_ids == ids for one, ids in zip(ours.made, naive.made, strict=True)]
    return found, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        pope = write_pope(folder, args.questions, args.pictures, args.new_tokens, 32_000, 224)
        found, same = measure(pope, model, folder, args)
    print(f"{' '.join(sys.argv)}\n{machine(args.device, args.threads)}")
    print(
        f"{args.questions} questions over {args.pictures} pictures, up to {args.new_tokens} new "
        f"tokens, batches of {args.batch_size}; median of {args.rounds} interleaved rounds; "
        "baseline naive: transformers' generate, one question at a time\n"
    )
    rows = [
        [
            run,
            f"{seconds:.2f}",
            f"{args.questions / seconds:.1f}",
            f"{seconds / found['naive']:.3f}",
            f"{found['naive'] / seconds:.2f}x",
        ]
        for run, seconds in found.items()
    ]
    print_table(["run", "s", "questions/s", "time / naive", "throughput / naive"], rows)
    print(f"\nsame answers, token for token: {sum(same)} of {len(same)}")


if __name__ == "__main__":
    main()
