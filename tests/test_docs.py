"""The documentation keeps up with the code: links, configs, commands, and the keys of a recipe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mmalign.cli import verbs
from mmalign.config import apply_overrides, load_config, read_yaml, validate

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# What CONTRIBUTING.md shows how to make.
INVENTED = {"configs/train/squared_hinge_llava15_lora.yaml", "configs/build/borrowed.yaml"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str) -> list[str]:
    """Fenced blocks without a language: what a reader would type."""
    return re.findall(r"^```\n(.*?)^```", text, re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """The words after `mmalign` of every command line in a page's blocks."""
    lines = "\n".join(blocks(page.read_text())).replace("\\\n", " ").splitlines()
    return [split(line.partition("mmalign ")[2]) for line in lines if line.startswith("mmalign ")]


def split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # Words beside a command may hold an apostrophe.
        return line.split()


@every_page
def test_every_relative_link_resolves(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    links = [link.split() for link in re.findall(r"\]\(([^)]+)\)", text)]
    for link, *_ in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else (page.parent / name)
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in anchors, f"{link}: no such heading"


@every_page
def test_every_config_named_exists(page: Path):
    named = set(re.findall(r"configs/[\w/.-]+\.ya?ml", page.read_text())) - INVENTED
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@every_page
def test_every_verb_named_exists(page: Path):
    known = verbs()
    spans = re.findall(r"`mmalign ([^`]+)`", page.read_text())
    for verb, *rest in [*commands(page), *(split(span) for span in spans)]:
        if verb.startswith("-"):
            continue
        assert verb in known, f"mmalign {verb}"
        inner = getattr(typer.main.get_command(known[verb].load()), "commands", None)
        if inner is not None and rest and not rest[0].startswith("-"):
            assert rest[0] in inner, f"mmalign {verb} {rest[0]}"


@every_page
def test_every_config_command_reads(page: Path):
    """Every command that takes a YAML, with its overrides, is one that would start."""
    from data_builders.config import load_builder
    from evals.config import EvalRecipe
    from evals.image_preference import ImagePreferenceRecipe
    from evals.report import ReportRecipe
    from mmalign.specs_chain import SpecsChain
    from trainers.config import Recipe
    from trainers.recipes import kind_of

    kinds = {"train": None, "estimate": Recipe, "eval": EvalRecipe, "report": ReportRecipe}
    for verb, *rest in commands(page):
        names = [word for word in rest if word.endswith(".yaml") and word not in INVENTED]
        overrides = [word for word in rest if "=" in word]
        if verb == "recipe" and names:
            load_config(ROOT / names[0], SpecsChain, overrides)
        if verb in ("build", *kinds) and names:
            path = ROOT / names[0]
            if verb == "build":
                load_builder(path, overrides)
            else:
                data = apply_overrides(read_yaml(path), overrides, str(path))
                kind = kinds[verb] or kind_of(data)
                validate(data, ImagePreferenceRecipe if "judges" in data else kind, str(path))


def test_the_example_of_a_family_is_one():
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## A family")[2]
    example = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)[0]
    source = (ROOT / "mmalign/models/families/llava.py").read_text()
    assert [part for part in example.split("\n\n\n") if part.strip() not in source] == []


def test_the_recipe_is_documented_key_by_key_with_its_defaults():
    from trainers.config import Recipe

    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", (ROOT / "docs/train.md").read_text(), re.M)
    told = {key: default for key, default in rows if key.partition(".")[0] in Recipe.model_fields}
    found = keys(Recipe) | {"loss.name": "required", "data.online": None, "model.reward_head": None}
    found = {key: value for key, value in found.items() if not key.startswith("rollouts.")}
    assert sorted(told) == sorted(found)
    for key, default in told.items():
        shown = default if default == "required" else yaml.safe_load(default.strip("`"))
        assert shown == found[key], key


def test_every_loss_is_documented_setting_by_setting_with_its_defaults():
    from mmalign.losses import Loss
    from mmalign.losses.rollout import RolloutLossConfig

    text = (ROOT / "docs/methods/index.md").read_text()
    named = re.findall(r"^\| `(\w+)` \| [^|`]", text, re.M)
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(.+?)` \|", text, re.M)
    told = {(loss, key): default for loss, key, default in rows}
    found = {}
    for loss in members(Loss):
        if issubclass(loss, RolloutLossConfig):
            continue  # On a page of their own.
        name = loss.model_fields["name"].default
        assert name in named, name
        shared = {"name", "beta", "sft_weight", "sft_mean"}
        found |= {(name, k): f.default for k, f in loss.model_fields.items() if k not in shared}
    assert sorted(told) == sorted(found)
    for key, default in told.items():
        value = getattr(found[key], "name", found[key])  # of an inner loss, its name
        assert yaml.safe_load(default) == value, key


def test_image_recipes_and_losses_are_documented_with_their_defaults():
    from mmalign.losses.images import ImageLoss
    from trainers.config import Recipe
    from trainers.images.config import ImageRecipe

    text = (ROOT / "docs/methods/mapo.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (required|`.+?`) \|", text, re.M)
    fields = ImageRecipe.model_fields
    told = {key: default for key, default in rows if key.partition(".")[0] in fields}
    shared = {key for key in keys(Recipe) if key.partition(".")[0] in ("optim", "run")}
    found = {key: value for key, value in keys(ImageRecipe).items() if key not in shared}
    assert sorted(told) == sorted(found)
    for key, default in told.items():
        shown = default if default == "required" else yaml.safe_load(default.strip("`"))
        assert shown == found[key], key
    settings = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(.+?)` \|", text, re.M)
    assert {(loss, key): yaml.safe_load(default) for loss, key, default in settings} == {
        (loss.model_fields["name"].default, key): field.default
        for loss in members(ImageLoss)
        for key, field in loss.model_fields.items()
        if key != "name"
    }


def test_rollout_losses_are_documented_with_their_defaults():
    from mmalign.losses.rollout import RolloutLoss

    text = (ROOT / "docs/methods/grpo.md").read_text()
    (names,) = re.findall(r"^\| setting \|(.+)\| meaning \|$", text, re.M)
    rows = re.findall(r"^\| `(\w+)` \|((?: `[^`]+` \|){4})", text, re.M)
    told = {
        (loss, key): yaml.safe_load(default)
        for key, defaults in rows
        for loss, default in zip(
            re.findall(r"`(.+?)`", names), re.findall(r"`(.+?)`", defaults), strict=True
        )
    }
    assert told == {
        (loss.model_fields["name"].default, key): field.default
        for loss in members(RolloutLoss)
        for key, field in loss.model_fields.items()
        if key != "name"
    }
    named = re.findall(r"^\| `(\w+)` \| [^|`]", text, re.M)
    assert {loss for loss, _ in told} <= set(named)


def test_rollouts_are_documented_with_their_defaults():
    from trainers.rollouts import Rollouts

    text = (ROOT / "docs/methods/grpo.md").read_text()
    rows = re.findall(r"^\| `rollouts\.([\w.]+)` \| `(.+?)`", text, re.M)
    found = keys(Rollouts)
    assert sorted(key for key, _ in rows) == sorted(found)
    for key, default in rows:
        if key != "rewards.functions":  # In words, as the list of two functions.
            assert yaml.safe_load(default) == found[key], key


def test_a_rollout_servers_settings_are_documented_with_their_defaults():
    from trainers.rollout_server import VllmServer

    text = (ROOT / "docs/methods/grpo.md").read_text()
    table = text.split("| in `rollouts.generator`, `engine: vllm` |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`(.+?)`)? ?\|", table, re.M))
    fields = {name: one for name, one in VllmServer.model_fields.items() if name != "engine"}
    assert list(rows) == list(fields)
    for name, default in rows.items():
        wanted = (
            None
            if fields[name].is_required()
            else fields[name].get_default(call_default_factory=True)
        )
        assert yaml.safe_load(default) == wanted, name


def members(union: Any) -> list[Any]:
    """The classes of a union, of unions inside it too."""
    if isinstance(union, type):
        return [union]
    parts = get_args(union)
    if hasattr(union, "__metadata__"):
        parts = parts[:1]
    return [kind for part in parts for kind in members(part)]


def keys(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted keys with their defaults; a section has a key of its own where it may be null."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name in ("loss", "online", "reward_head"):
            continue
        inner = [
            kind
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if inner:
            found |= keys(inner[0], f"{prefix}{name}.")
        if not inner or field.default is None:
            value = field.default
            value = list(value) if isinstance(value, tuple) else value
            found[prefix + name] = "required" if value is PydanticUndefined else value
    return found
