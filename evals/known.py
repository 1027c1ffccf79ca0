"""The rules of every benchmark, by the name that recipes and results give it."""

from __future__ import annotations

from evals import image_preference
from evals.benchmarks import (
    amber,
    chair,
    gqa,
    hallusion_bench,
    llava_bench,
    math_questions,
    mathvision,
    mm_vet,
    mmbench,
    mme,
    mmhal,
    mmmu,
    multimodal_reward_bench,
    object_halbench,
    pope,
    reward_bench,
    safety_bench,
    science_qa,
    tempcompass,
    tempcompass_captioning,
    verifiable,
    video_choices,
    video_hallucer,
    videomme,
    vidhalluc,
    vidhalluc_scenes,
    vl_reward_bench,
    vqa,
)
from evals.rules import ANSWER_TOKENS, Rules

RULES: dict[str, Rules] = {
    "pope": pope.RULES,
    "chair": chair.RULES,
    "amber": amber.RULES,
    "object_halbench": object_halbench.RULES,
    "hallusion_bench": hallusion_bench.RULES,
    "mme": mme.RULES,
    "mmhal": mmhal.RULES,
    "mm_vet": mm_vet.RULES,
    "llava_bench": llava_bench.RULES,
    "vqav2": vqa.TIDIED_RULES,
    "textvqa": vqa.RULES,
    "vizwiz": vqa.TIDIED_RULES,
    "gqa": gqa.RULES,
    "science_qa": science_qa.RULES,
    "mmbench": mmbench.RULES,
    "mmmu": mmmu.RULES,
    "mathvista": math_questions.VISTA_RULES,
    "mathverse": math_questions.VERSE_RULES,
    "mathvision": mathvision.RULES,
    "verifiable": verifiable.RULES,
    "video_hallucer": video_hallucer.RULES,
    "vidhalluc_binary": vidhalluc.BINARY_RULES,
    "vidhalluc_choice": vidhalluc.RULES,
    "vidhalluc_order": vidhalluc.RULES,
    "vidhalluc_scenes": vidhalluc_scenes.RULES,
    "tempcompass": tempcompass.RULES,
    "tempcompass_captioning": tempcompass_captioning.RULES,
    "tvbench": video_choices.RULES,
    "mvbench": video_choices.RULES,
    "mlvu": video_choices.MLVU_RULES,
    "longvideobench": video_choices.RULES,
    "videomme": videomme.RULES,
    "reward_bench": reward_bench.RULES,
    "vl_reward_bench": vl_reward_bench.RULES,
    "multimodal_reward_bench": multimodal_reward_bench.RULES,
    "safety_vlguard": safety_bench.VLGUARD_RULES,
    "safety_jailbreak": safety_bench.JAILBREAK_RULES,
    "image_preference": image_preference.RULES,
}

# What they are called in the field.
_TITLES = {
    "pope": "POPE",
    "chair": "CHAIR",
    "amber": "AMBER",
    "object_halbench": "Object HalBench",
    "hallusion_bench": "HallusionBench",
    "mme": "MME",
    "mmhal": "MMHal-Bench",
    "mm_vet": "MM-Vet",
    "llava_bench": "LLaVA-Bench",
    "vqav2": "VQAv2",
    "textvqa": "TextVQA",
    "vizwiz": "VizWiz",
    "gqa": "GQA",
    "science_qa": "ScienceQA",
    "mmbench": "MMBench",
    "mmmu": "MMMU",
    "mathvista": "MathVista",
    "mathverse": "MathVerse",
    "mathvision": "MATH-Vision",
    "verifiable": "Verifiable",
    "video_hallucer": "VideoHallucer",
    "vidhalluc_binary": "VidHalluc binary",
    "vidhalluc_choice": "VidHalluc choice",
    "vidhalluc_order": "VidHalluc order",
    "vidhalluc_scenes": "VidHalluc scenes",
    "tempcompass": "TempCompass",
    "tempcompass_captioning": "TempCompass captioning",
    "tvbench": "TVBench",
    "mvbench": "MVBench",
    "mlvu": "MLVU",
    "longvideobench": "LongVideoBench",
    "videomme": "Video-MME",
    "reward_bench": "Reward bench",
    "vl_reward_bench": "VL-RewardBench",
    "multimodal_reward_bench": "Multimodal RewardBench",
    "safety_vlguard": "VLGuard",
    "safety_jailbreak": "Jailbreaks",
    "image_preference": "Image preference",
}

# Counts that no table shows, and judges of pictures, whose scores are no shares.
_OTHERS = {"mentions", "pick_score", "hps_v2", "aesthetic", "clip_score", "digit_style"}
_NUMBERS = {ANSWER_TOKENS.key, *_OTHERS} | {
    metric.key for rules in RULES.values() for metric in rules.shown if not metric.percent
}


def is_number(metric: str) -> bool:
    """Whether a metric is a number as it stands; all others are shares, shown in percent."""
    return any(metric == name or metric.startswith(f"{name}/") for name in _NUMBERS)


def title_of(benchmark: str) -> str:
    """What a benchmark is called in the field; its name in capitals where it is none of ours."""
    return _TITLES.get(benchmark, benchmark.upper().replace("_", " "))
