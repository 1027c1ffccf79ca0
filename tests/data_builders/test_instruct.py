"""Rows asked with an instruction: the prompts change, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_builders.base import GeneratorConfig
from data_builders.instruct import Instruct
from data_builders.specs import Specs
from mmalign.generate.base import Generation
from mmalign.instruct import FORM, instructed
from mmalign.media import embed
from mmalign.models.load import ModelConfig
from mmalign.records import Message, Preference, Verifiable, user
from mmalign.store import open_dataset, write_dataset


def rows() -> list[Verifiable]:
    from PIL import Image

    images = (embed(Image.new("RGB", (8, 8))),)
    shared = {"images": images, "answer": "7", "verifier": "number"}
    prompt = user("Sum?", images=1)
    return [
        Verifiable(id="a", prompt=prompt, **shared),
        Verifiable(id="b", prompt=instructed(prompt, FORM), **shared),
        Verifiable(id="c", prompt=(*prompt, Message(role="assistant", content=())), **shared),
    ]


def test_prompts_end_with_the_instruction_once(tmp_path: Path):
    write_dataset(tmp_path / "in", Verifiable, rows())
    Instruct(source=tmp_path / "in", output=tmp_path / "out").build()
    made = open_dataset(tmp_path / "out", Verifiable)
    asked = instructed(user("Sum?", images=1), FORM)
    assert list(made) == [replace(row, prompt=asked) for row in rows()[:2]]
    assert made.manifest.counts == {
        "accepted": 1,
        "accepted:as_it_was": 1,
        "quarantined:bad_prompt": 1,
    }
    assert made.manifest.kind == "verifiable"


def test_pairs_of_asked_rows_have_the_prompts_that_rollouts_have(tmp_path: Path):
    class Policy:
        name = "policy"

        def generate(self, requests, sampling):
            good = "<think>3 and 4</think> <answer>\\boxed{7}</answer>"
            return [Generation(id=r.id, text=good, num_tokens=1, finished=True) for r in requests]

    write_dataset(tmp_path / "in", Verifiable, rows()[:2])
    Instruct(source=tmp_path / "in", output=tmp_path / "asked").build()
    prompts = [row.prompt for row in open_dataset(tmp_path / "asked", Verifiable)]
    for instruction in (None, FORM):
        specs = Specs(
            source=tmp_path / "asked",
            output=tmp_path / f"pairs_{instruction is None}",
            generator=GeneratorConfig(model=ModelConfig(path="none")),
            instruction=instruction,
        )
        specs.build_with({"generator": Policy()}, None)
        assert [pair.prompt for pair in open_dataset(specs.output, Preference)] == prompts
