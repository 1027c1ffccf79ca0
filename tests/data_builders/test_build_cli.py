"""`mmalign build`: every shipped config reads, mistakes are sentences, a small build runs whole."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_builders.config import BUILDERS, load_builder
from mmalign.cli import run
from mmalign.errors import ConfigError
from mmalign.models.tiny import TinyModel
from mmalign.records import Example, Preference, user
from mmalign.store import open_dataset, write_dataset

CONFIGS = Path(__file__).parents[2] / "configs" / "build"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_reads(path: Path) -> None:
    assert load_builder(path).name in BUILDERS
    assert "# Run:" in path.read_text() or "# Launch:" in path.read_text()


def test_the_papers_values_are_the_shipped_ones() -> None:
    config = load_builder(CONFIGS / "realign_coco.yaml").model_dump()
    assert (config["k"], config["similarity"]["threshold"]) == (10, 0.95)
    assert config["similarity"]["model"].endswith("all-mpnet-base-v2")
    assert config["encoder"]["model"] == "ViT-L-14-quickgelu"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kk=3", "did you mean k?"),
        ("masker.wordz=[a]", "words?"),
        ("generator.temprature=1", "did you mean generator.temperature?"),
        ("name=realing", "names no builder; got name: realing"),
        ("shard=3/3", "shard: wanted i/n"),
        ("encoder.name=none", "encoder"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_builder(CONFIGS / "realign_photos.yaml", [override])
    assert message in str(caught.value)


def test_reading_a_config_needs_no_torch() -> None:
    code = (
        "import sys; from data_builders.config import load_builder; "
        f"load_builder({str(CONFIGS / 'realign_coco.yaml')!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_folder_of_pictures_becomes_pairs_with_a_real_model(tmp_path: Path, capsys) -> None:
    """The shipped config on a random checkpoint: model, retrieval, filling, page, all of it."""
    base = TinyModel(output=str(tmp_path / "base")).build()
    (tmp_path / "photos").mkdir()
    for number in range(6):
        color = (40 * number, 255 - 40 * number, 90)
        picture = Image.new("RGB", (20 + 9 * number, 50), color)
        picture.paste((255 - 40 * number, 10, 40 * number), (0, 0, 12, 25))
        picture.save(tmp_path / f"photos/n{number}_sea_lion.jpg")
    (tmp_path / "photos/n9_torn.jpg").write_bytes(b"\xff\xd8\xff")
    arguments = [
        f"source.images={tmp_path / 'photos'}",
        f"generator.model.path={base}",
        f"output={tmp_path / 'out'}",
        "near_duplicate=1.0",
        "shard_rows=3",
        "k=2",
    ]
    assert run(["build", str(CONFIGS / "realign_photos.yaml"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "       6  preference records in" in printed
    assert "       1  quarantined:unreadable" in printed
    assert f"look at   {tmp_path / 'out/preview.html'}" in printed

    dataset = open_dataset(tmp_path / "out", Preference)
    for pair in dataset:
        assert pair.chosen == "a photo of a sea lion."
        assert pair.rejected.startswith("a photo of a ")
        assert pair.rejected.endswith(".")
        assert pair.contrast_images[0].path != pair.images[0].path
    arguments = [a.replace("=" + str(tmp_path / "out"), f"={tmp_path}/again") for a in arguments]
    assert run(["build", str(CONFIGS / "realign_photos.yaml"), *arguments, "shard=1/2"]) == 0
    assert "others are not" in capsys.readouterr().out
    assert run(["build", str(CONFIGS / "realign_photos.yaml"), *arguments, "shard=0/2"]) == 0
    again = open_dataset(tmp_path / "again", Preference)
    assert again.manifest == dataset.manifest


def test_the_builder_that_contributing_shows_builds(tmp_path: Path, repo_root: Path) -> None:
    text = (repo_root / "CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n(# data_builders/borrowed.py\n.*?)```", text, re.S)
    assert code is not None
    (tmp_path / "borrowed.py").write_text(code[1])
    spec = importlib.util.spec_from_file_location("borrowed", tmp_path / "borrowed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["borrowed"] = module  # pydantic looks the types up there
    try:
        spec.loader.exec_module(module)
        rows = [Example(id=id, prompt=user("What?"), answer=f"a {id}") for id in "abc"]
        write_dataset(tmp_path / "in", Example, rows)
        out = module.Borrowed(source=tmp_path / "in", output=tmp_path / "out").build()
    finally:
        del sys.modules["borrowed"]
    rejected = {pair.id: pair.rejected for pair in open_dataset(out, Preference)}
    assert rejected == {"a": "a b", "b": "a c", "c": "a a"}


def test_counts_are_told_in_the_order_of_their_numbers(tmp_path, capsys, monkeypatch):
    from data_builders import config
    from data_builders.built_page import write_preview

    class Builder:
        def build(self) -> Path:
            counts = {"accepted:rank1": 3, "accepted:rank10": 1, "accepted:rank2": 2}
            write_dataset(tmp_path / "d", Preference, [], counts=counts)
            write_preview(tmp_path / "d")
            return tmp_path / "d"

    monkeypatch.setattr(config, "load_builder", lambda path, overrides: Builder())
    assert run(["build", "a.yaml"]) == 0
    told = [capsys.readouterr().out, (tmp_path / "d/preview.html").read_text()]
    in_order = ["accepted:rank1", "accepted:rank2", "accepted:rank10"]
    assert [re.findall(r"accepted:rank\d+", text) for text in told] == [in_order, in_order]


def test_a_missing_source_is_told_before_a_model_is_loaded(tmp_path, capsys, repo_root):
    from mmalign import cli

    config = str(repo_root / "configs" / "build" / "realign_coco.yaml")
    assert cli.run(["build", config, f"source={tmp_path / 'absent'}"]) == 2
    assert "no such dataset" in capsys.readouterr().err


def test_how_far_a_build_is_can_be_asked(tmp_path, capsys, repo_root):
    """By the marks of jobs, and of builders that write their dataset at once."""

    def asked(config: str, *overrides: str) -> str:
        words = [str(repo_root / "configs" / config), f"output={tmp_path / Path(config).stem}"]
        code = run(["build", *words, *overrides, "--check"])
        told = capsys.readouterr()
        return told.out.split()[0] if code == 0 else told.err

    sums, form = "lab/sums_prompts.yaml", "build/instruct_form.yaml"
    source = f"source={tmp_path / 'sums_prompts'}"
    assert asked(sums, "num_rows=3") == "absent"
    assert not (tmp_path / "sums_prompts").exists()
    load_builder(
        repo_root / "configs" / sums, [f"output={tmp_path / 'sums_prompts'}", "num_rows=3"]
    ).build()
    assert asked(sums, "num_rows=3") == "complete"
    assert "was built with other settings: num_rows was 3, is 3000" in asked(sums)
    assert asked(form, source) == "absent"
    out = load_builder(
        repo_root / "configs" / form, [f"output={tmp_path / 'instruct_form'}", source]
    ).build()
    assert asked(form, source) == "complete"
    (out / "manifest.json").unlink()
    assert asked(form, source) == "begun"
    assert "instruction was" in asked(form, source, "instruction=Think.")
    assert "sourse: did you mean source?" in asked(form, "sourse=x")
    (out / "job.json").write_text("{}")
    assert "is no job of a build" in asked(form, source)
