"""The image lab by its own configs and verbs, with a few steps: from digits to a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.cli import run as command

ROOT = Path(__file__).resolve().parents[2]
LAB = "configs/lab/images_"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_image_lab_from_digits_to_a_report(tmp_path, monkeypatch, capsys, lora):
    from diffusers import StableDiffusionXLPipeline

    monkeypatch.chdir(ROOT)

    def verb(*words: str) -> None:
        assert command(list(words)) == 0, capsys.readouterr().err

    out = tmp_path
    base, mapo = f"model.path={out}/base/model", f"run.output={out}/mapo"
    verb("build", f"{LAB}digits.yaml", f"output={out}/digits", "num_rows=40")
    init = [f"output={out}/init", f"vae.data={out}/digits", "vae.steps=2", "channels=16"]
    verb("init-model", f"{LAB}model.yaml", *init)
    few = ["optim.steps=2", "optim.batch_size=4", "run.log_every_steps=1"]
    verb(
        "train", f"{LAB}base.yaml", f"model.path={out}/init", f"data.path={out}/digits",
        f"run.output={out}/base", *few,
    )  # fmt: skip
    sampling = ["sampling.num_steps=2"]
    verb(
        "build", f"{LAB}pairs.yaml", f"output={out}/pairs", "per_prompt=1",
        f"pipeline.path={out}/base/model", *sampling, "pairs.min_score=0",
    )  # fmt: skip
    rank = ["model.lora={rank: 2}"] if lora else []
    verb("train", f"{LAB}mapo.yaml", base, f"data.path={out}/pairs", mapo, *few, *rank)
    aligned = (
        [base, f"model.adapter={out}/mapo/model"] if lora else [f"model.path={out}/mapo/model"]
    )
    for name, model in (("base", [base]), ("mapo", aligned)):
        named = [f"name={name}", f"output={out}/eval/{name}", "per_prompt=1"]
        verb("eval", "image_preference", f"{LAB}eval.yaml", *named, *model, *sampling)
    capsys.readouterr()
    verb("eval", "compare", f"{out}/eval/base", f"{out}/eval/mapo", "--json")
    found = {one["metric"]: one["b"] for one in json.loads(capsys.readouterr().out)}
    assert 0 <= found["win/digit_style"] <= 1
    runs = f"[{{name: mapo, eval: {out}/eval/mapo, train: {out}/mapo}}]"
    report = [f"output={out}/report", f"base={out}/eval/base", f"runs={runs}", "suites=null"]
    verb("report", "configs/eval/report_example.yaml", *report)
    page = (out / "report" / "report.html").read_text()
    # Eight prompts of two models; three prompts before and after training.
    assert page.count("data:image/png;base64,") == 16 + 6
    assert "step 2" in page
    assert "Denoising error of the rejected picture" in page

    if lora:
        pipeline = StableDiffusionXLPipeline.from_pretrained(out / "base" / "model")
        pipeline.load_lora_weights(out / "mapo" / "model")
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(out / "mapo" / "model")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("bold seven", num_inference_steps=1, guidance_scale=1.0).images[0]
    assert picture.size == (32, 32)
