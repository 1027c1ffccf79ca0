"""`mmalign eval lmms`, mostly with a stand-in for lmms-eval that writes files as 0.7.3 does."""

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from evals.config import EvalModel
from evals.eval_cli import app
from evals.lmms import Options, evaluate, installed, metrics_of
from evals.lmms_classes import CLASSES, Choice, arguments
from mmalign.clips import FrameSampling
from mmalign.errors import ConfigError, MissingExtra, MmalignError, ModelError
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, load_policy
from mmalign.models.lora import Lora
from mmalign.models.merge import MADE_FROM, merge_into, merged
from mmalign.models.tiny import TinyModel

# Its words and ways: coloured log lines, exit code 0 whatever happened, a folder by model.
STAND_IN = r"""
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "batch_size", "output_path", "include_path", "limit"):
    parser.add_argument("--" + name)
parser.add_argument("--log_samples", action="store_true")
args = parser.parse_args()
told = dict(part.split("=", 1) for part in args.model_args.split(","))
seen = {**vars(args), "told": told, "holds": sorted(os.listdir(told["pretrained"]))}
pathlib.Path(os.environ["SEEN"]).write_text(json.dumps(seen))
mode = os.environ.get("MODE", "")
say = "\x1b[32m2026-01-01\x1b[0m | \x1b[31m\x1b[1mERROR   \x1b[0m | \x1b[36mx:y:1\x1b[0m - "
print("Model Responding:  50%\rModel Responding: 100%\r", end="")
if mode == "missing task":
    print(say + "\x1b[1mError during evaluation: Tasks not found: nonsense.. "
          "Please set `--verbosity=DEBUG` to get more information.\x1b[0m")
    sys.exit(0)
if mode == "crash":
    sys.exit("ImportError: no such thing")
if mode == "half":
    print(say + "\x1b[1mError CUDA out of memory in generating\x1b[0m")
results = {
    "results": {
        "pope": {"alias": "pope", "acc,none": 0.75, "acc_stderr,none": 0.05,
                 "acc_stderr_clt,none": 0.04, "acc_stderr_clustered,none": "N/A",
                 "f1,strict": 0.5, "f1_stderr,strict": "N/A"},
        "mme": {"alias": "mme", "sent,none": None, "sent_stderr,none": []},
    },
    "higher_is_better": {"pope": {"acc": True, "f1": True}},
    "n-samples": {"pope": {"original": 9, "effective": 4}},
}
folder = pathlib.Path(args.output_path) / "m"
folder.mkdir(parents=True, exist_ok=True)
stamp = f"20260101_{len(list(folder.iterdir())):06}"
(folder / (stamp + "_results.json")).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return TinyModel(output=str(tmp_path_factory.mktemp("models") / "base")).build()


def make_adapter(base, folder, *, fill):
    import torch

    policy = load_policy(ModelConfig(path=str(base), lora=Lora(rank=2, alpha=4)))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(fill)
    policy.save(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "a", fill=0.1)


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """A stand-in for lmms-eval on the path; gives what it was called with."""
    package = tmp_path / "stand_in" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.delenv("MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda: json.loads((tmp_path / "seen.json").read_text())


ON_CPU = Choice(device="cpu")


def made(tasks=("pope", "mme"), **changes):
    return Options(tasks=tasks, choice=ON_CPU, **changes)


def test_the_command_and_the_summary(base, seen, tmp_path):
    summary = evaluate(EvalModel(path=str(base)), Path("out"), made(limit=4, include=Path("mine")))
    asked = seen()
    assert (asked["model"], asked["tasks"], asked["limit"]) == ("llava_hf", "pope,mme", "4")
    assert asked["log_samples"]
    assert asked["include_path"] == str(tmp_path / "mine")
    assert asked["output_path"] == str(tmp_path / "out/lmms_eval")
    assert asked["told"] == {
        "pretrained": str(base),
        "device": "cpu",
        "device_map": "cpu",
        "dtype": "float32",
    }
    assert not (tmp_path / "out/merged").exists()
    assert json.loads((tmp_path / "out/lmms.json").read_text()) == summary
    assert summary["checkpoint"] == str(base)
    assert summary["lmms_eval"] == {
        "version": installed(sys.executable),
        "model": "llava_hf",
        "model_args": asked["model_args"],
        "tasks": ["pope", "mme"],
        "limit": 4,
        "results": "lmms_eval/m/20260101_000000_results.json",
    }
    assert summary["num_failed"] == 0
    assert summary["metrics"] == [
        {"task": "pope", "metric": "acc", "filter": "none", "value": 0.75, "stderr": 0.05}
        | {"higher_is_better": True, "num_items": 4},
        {"task": "pope", "metric": "f1", "filter": "strict", "value": 0.5, "stderr": None}
        | {"higher_is_better": True, "num_items": 4},
        {"task": "mme", "metric": "sent", "filter": "none", "value": None, "stderr": None}
        | {"higher_is_better": None, "num_items": None},
    ]


def test_a_second_run_reads_its_own_results(base, seen):
    model = EvalModel(path=str(base))
    first = evaluate(model, Path("out"), made())["lmms_eval"]["results"]
    second = evaluate(model, Path("out"), made())["lmms_eval"]["results"]
    assert Path(second).name == "20260101_000001_results.json"
    assert first != second


@pytest.mark.parametrize("by", ["folder", "setting"])
def test_an_adapter_is_merged_once(base, adapter, seen, tmp_path, by):
    model = EvalModel(path=str(base), adapter=str(adapter))
    model = EvalModel(path=str(adapter)) if by == "folder" else model
    summary = evaluate(model, Path("out"), made())
    folder = tmp_path / "out/merged"
    assert seen()["told"]["pretrained"] == summary["checkpoint"] == str(folder)
    assert {"config.json", "model.safetensors", MADE_FROM} <= set(seen()["holds"])
    assert "adapter_config.json" not in seen()["holds"]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    evaluate(model, Path("out"), made())
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_what_is_refused_is_refused_before_merging(base, adapter, seen, tmp_path):
    model = EvalModel.model_validate({"path": str(adapter), "quantization": {}})
    with pytest.raises(ConfigError, match="no weights in 4 bits"):
        evaluate(model, Path("out"), made())
    with pytest.raises(ConfigError, match="the output folder cannot be handed to lmms-eval"):
        evaluate(EvalModel(path=str(adapter)), Path("a,b"), made())
    assert not list(tmp_path.rglob("merged*"))


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_what_is_merged_is_base_plus_adapter(base, adapter, tmp_path):
    """W + (alpha / rank) B A, with B filled with 0.1: 4 / 2 * 0.1 * the sum over A's rows."""
    import torch
    from safetensors.torch import load_file

    folder = merged(ModelConfig(path=str(adapter)), tmp_path / "merged")
    low = load_file(adapter / "adapter_model.safetensors")
    before, after = weights(base), weights(folder)
    name, key = (
        next(key for key in held if "language_model" in key and key.endswith(f"layers.0.{what}"))
        for held, what in (
            (low, "self_attn.q_proj.lora_A.weight"),
            (before, "self_attn.q_proj.weight"),
        )
    )
    expected = before[key] + 2 * 0.1 * low[name].sum(0, keepdim=True)
    torch.testing.assert_close(after[key], expected)
    assert after[key].dtype == torch.float32


def test_other_files_are_merged_anew_and_strangers_refused(base, tmp_path):
    config = ModelConfig(path=str(make_adapter(base, tmp_path / "a", fill=0.1)))
    folder = merged(config, tmp_path / "merged")
    first = weights(folder)
    make_adapter(base, tmp_path / "a", fill=0.2)
    second = weights(merged(config, folder))
    changed = [key for key in first if not first[key].equal(second[key])]
    assert changed
    (folder / MADE_FROM).unlink()
    with pytest.raises(ModelError, match="merged: is not empty"):
        merged(config, folder)
    with pytest.raises(ModelError, match="nowhere"):
        merge_into(ModelConfig(path=str(base), adapter=str(tmp_path / "nowhere")), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_place_that_is_no_new_folder_is_refused(tmp_path, monkeypatch):
    model = ModelConfig(path="nowhere")
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ModelError, match=r"file: is no folder\. Choose a new folder"):
            merge_into(model, output)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ModelError, match="here: is where this command runs"):
        merge_into(model, Path())


def test_every_family_has_a_class_or_none_in_lmms_eval():
    """For these three 0.7.3 has none that runs: its general one fails with transformers 5."""
    types = {kind for family in FAMILIES for kind in family.model_types}
    assert types - set(CLASSES) == {"paligemma", "idefics3", "smolvlm"}
    assert set(CLASSES) <= types


def checkpoint(folder, model_type):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


def args_of(model, path, choice=ON_CPU):
    name, text, left_out = arguments(model, path, choice)
    assert text.startswith(f"pretrained={path}")
    return name, text.removeprefix(f"pretrained={path}").lstrip(","), left_out


def test_settings_are_handed_on_or_named(tmp_path):
    path = checkpoint(tmp_path / "q", "qwen2_5_vl")
    device = "device=cpu,device_map=cpu"
    model = EvalModel(path=path, dtype="bfloat16", max_pixels=401408)
    assert args_of(model, path) == ("qwen2_5_vl", f"{device},max_pixels=401408", [])
    # Smaller than what the class enlarges pictures to, which would contradict it.
    small = model.model_copy(update={"max_pixels": 50176, "attention": "eager"})
    told = f"{device},max_pixels=50176,min_pixels=3136,attn_implementation=eager"
    assert args_of(small, path) == ("qwen2_5_vl", told, [])
    path = checkpoint(tmp_path / "g", "gemma3")
    model = EvalModel(path=path, max_pixels=9, frames=FrameSampling(num_frames=3))
    name, told, left_out = args_of(model, path)
    assert (name, told) == ("gemma3", device)
    assert [text.partition("=")[0].partition(":")[0] for text in left_out] == [
        "dtype",
        "max_pixels",
        "frames",
    ]
    path = checkpoint(tmp_path / "q2", "qwen2_vl")
    model = EvalModel(path=path, attention="sdpa", trust_remote_code=True, dtype="auto")
    assert args_of(model, path)[2] == ["attention=sdpa", "trust_remote_code=true"]


def test_more_arguments_come_last_so_that_they_count(tmp_path):
    path = checkpoint(tmp_path / "q", "qwen3_vl")
    model = EvalModel(path=path, dtype="bfloat16")
    _, told, _ = args_of(model, path, Choice(model_args="device_map=auto,fps=2", device="cuda"))
    assert told == "device=cuda,device_map=cuda,device_map=auto,fps=2"


def test_an_unknown_family_needs_a_class_by_name(tmp_path):
    path = checkpoint(tmp_path / "p", "paligemma")
    with pytest.raises(ConfigError, match=r"known here for model_type paligemma.*--lmms-model"):
        arguments(EvalModel(path=path), path, ON_CPU)
    name, told, left_out = args_of(
        EvalModel(path=path), path, Choice(model_class="vllm", model_args="tp=2")
    )
    assert (name, told) == ("vllm", "tp=2")
    assert left_out == ["dtype=float32: vllm loads weights in a type of its own choice"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quantization": {}}, "model.quantization: .*no weights in 4 bits"),
        ({"path": "a/b", "revision": "x1"}, "qwen2_vl takes no revision"),
        ({"path": "a,b"}, "splits its arguments at commas; got a,b"),
    ],
)
def test_what_cannot_be_passed_is_refused(change, match):
    model = EvalModel.model_validate({"path": "a/b"} | change)
    with pytest.raises(ConfigError, match=match):
        arguments(model, model.path, Choice(model_class="qwen2_vl"))


def test_a_hub_name_keeps_its_revision():
    model = EvalModel(path="a/b", revision="x1")
    told = arguments(model, "a/b", Choice(model_class="llava_hf", device="cpu"))[1]
    assert told == "pretrained=a/b,device=cpu,device_map=cpu,revision=x1,dtype=float32"


def test_success_is_a_results_file_not_an_exit_code(base, seen, monkeypatch, tmp_path):
    model = EvalModel(path=str(base))
    evaluate(model, Path("out"), made())
    monkeypatch.setenv("MODE", "missing task")
    with pytest.raises(
        MmalignError, match=r"wrote no results: Tasks not found: nonsense\. Mend what .*lmms\.log"
    ):
        evaluate(model, Path("out"), made())
    assert not (tmp_path / "out/lmms.json").exists()
    log = (tmp_path / "out/lmms.log").read_text()
    assert "| ERROR    | x:y:1 - Error during evaluation" in log
    assert "Responding" not in log
    monkeypatch.setenv("MODE", "crash")
    with pytest.raises(MmalignError, match="failed with exit code 1"):
        evaluate(model, Path("out"), made())
    assert "ImportError: no such thing" in (tmp_path / "out/lmms.log").read_text()


def test_answers_that_failed_are_counted(base, seen, monkeypatch):
    monkeypatch.setenv("MODE", "half")
    assert evaluate(EvalModel(path=str(base)), Path("out"), made())["num_failed"] == 1


def test_an_interpreter_without_it_is_told_of_first(base, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # -S -I: without this environment's packages, whatever they are.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    python.chmod(0o755)
    with pytest.raises(MissingExtra, match=r"lmms-eval is not installed.*\.\[lmms\]"):
        evaluate(EvalModel(path=str(base)), tmp_path / "out", made(python=str(python)))
    with pytest.raises(ConfigError, match=r"cannot be run \(No such file"):
        installed(str(tmp_path / "nothing"))
    python.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    with pytest.raises(ConfigError, match="is no Python that works; got broken"):
        installed(str(python))
    with pytest.raises(ConfigError, match="names no task"):
        evaluate(EvalModel(path=str(base)), tmp_path / "out", made(tasks=("pope", "")))


def test_a_metric_that_is_no_number_is_none():
    odd = {"a,none": True, "b,none": float("nan"), "c,none": "9", "d,none": 3, " ,none": " "}
    found = metrics_of({"results": {"t": {"alias": "t", **odd}}})
    assert [one.value for one in found] == [None, None, None, 3.0, None]


def test_the_verb(base, seen, tmp_path):
    Path("recipe.yaml").write_text(f"name: x\nmodel: {{path: {base}}}\noutput: elsewhere\n")
    words = ["lmms", "--tasks", "pope, mme", "--output", "out", "--device", "cpu"]
    shown = CliRunner().invoke(app, [*words, "recipe.yaml", "model.max_pixels=64"])
    assert shown.exit_code == 0, shown.exception
    assert seen()["tasks"] == "pope,mme"
    assert "not handed on: max_pixels=64" in shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[-5:] == [
        ["task", "metric", "value", "stderr", "items"],
        ["pope", "acc", "0.7500", "0.0500", "4"],
        ["pope", "f1", "(strict)", "0.5000", "-", "4"],
        ["mme", "sent", "-", "-", "-"],
        ["out/lmms.json"],
    ]
    shown = CliRunner().invoke(app, [*words, "--model", str(base)])
    assert shown.exit_code == 0
    for more, match in (
        (["recipe.yaml", "--model", "x"], "give either a recipe or --model"),
        ([], "give either a recipe or --model"),
        (["recipe.yaml", "--adapter", "x"], "--adapter goes with --model"),
        (["recipe.yaml", "model.pth=x"], "did you mean"),
        (["recipe.yaml", "model=3"], "has no `model` section"),
        (["recipe.yaml", "model.engine=server"], "is a model behind a server"),
    ):
        error = CliRunner().invoke(app, [*words, *more]).exception
        assert isinstance(error, ConfigError)
        assert match in str(error)


@pytest.mark.slow
def test_lmms_eval_itself(adapter, tmp_path, monkeypatch):
    """A task of ours on pictures of ours, where MMALIGN_LMMS_PYTHON names an interpreter."""
    python = os.environ.get("MMALIGN_LMMS_PYTHON")
    if not python:
        pytest.skip("set MMALIGN_LMMS_PYTHON to an interpreter that has lmms-eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = []
    for number in range(3):
        Image.new("RGB", (40, 40), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"image": str(tmp_path / f"{number}.png"), "question": "Red?", "answer": "yes"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "ours.yaml").write_text(f"""
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path / "rows.jsonl"}}}
test_split: train
output_type: generate_until
doc_to_visual: !function ours_utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4}}
process_results: !function ours_utils.results
metric_list:
  - {{metric: length, aggregation: mean, higher_is_better: false}}
""")
    (tasks / "ours_utils.py").write_text("""
from PIL import Image
def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
def results(doc, answers):
    return {"length": len(answers[0])}
""")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = made(("ours",), python=python, include=tasks, limit=2)
    summary = evaluate(EvalModel(path=str(adapter)), tmp_path / "out", options)
    (metric,) = summary["metrics"]
    (file,) = (tmp_path / "out/lmms_eval").rglob("*_samples_ours.jsonl")
    said = [json.loads(line)["filtered_resps"] for line in file.read_text().splitlines()]
    assert metric["num_items"] == len(said) == 2
    assert metric["value"] == pytest.approx(sum(map(len, said)) / 2)
