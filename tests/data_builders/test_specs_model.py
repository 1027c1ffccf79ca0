"""SPECS's pairs by a real model: it learns to add a little, and tells itself what form is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.cli import run as command
from mmalign.records import Preference, Verifiable
from mmalign.store import open_dataset
from mmalign.think import final_answer, parts_of
from mmalign.verify import Verifiers

ROOT = Path(__file__).resolve().parents[2]
LAB = "configs/lab/sums_"


@pytest.mark.slow
def test_a_small_model_gives_pairs_of_its_own_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path

    def verb(*words: str) -> None:
        assert command(list(words)) == 0, capsys.readouterr().err

    verb("init-model", f"{LAB}model.yaml", f"output={out}/init")
    verb("build", f"{LAB}train.yaml", f"output={out}/train", "num_rows=300", "num_digits=[2]")
    verb(
        "train", f"{LAB}base.yaml", f"model.path={out}/init", f"data.path={out}/train",
        f"run.output={out}/base", "optim.steps=60", "optim.batch_size=16",
    )  # fmt: skip
    verb("build", f"{LAB}prompts.yaml", f"output={out}/prompts", "num_rows=48", "num_digits=[2]")
    verb(
        "build", f"{LAB}specs.yaml", f"source={out}/prompts", f"output={out}/pairs",
        f"generator.model.path={out}/base/model", "shard_rows=16",
    )  # fmt: skip
    pairs = open_dataset(out / "pairs", Preference)
    rows = {row.id: row for row in open_dataset(out / "prompts", Verifiable)}
    counts = pairs.manifest.counts
    assert sum(counts.values()) == 48
    assert counts["dropped:chosen_wrong"] > 0
    assert len(pairs) >= 1
    with Verifiers() as verifiers:
        for pair in pairs:
            row = rows[pair.id]
            assert (pair.prompt, pair.images) == (row.prompt, row.images)
            assert parts_of(pair.chosen).well_formed
            assert not parts_of(pair.rejected).well_formed
            for text in (pair.chosen, pair.rejected):
                assert verifiers.check_response(text, row).correct, final_answer(text)
            assert json.loads(pair.origin.detail)["kind"]
