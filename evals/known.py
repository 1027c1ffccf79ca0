"""The rules of every benchmark, by the name that recipes and results give it."""

from __future__ import annotations

from evals import (
    chair,
    image_preference,
    multimodal_reward_bench,
    pope,
    reward_bench,
    safety_bench,
    tempcompass,
    verifiable,
    video_choices,
    video_hallucer,
    videomme,
    vidhalluc,
    vl_reward_bench,
)
from evals.rules import Rules

RULES: dict[str, Rules] = {
    "pope": pope.RULES,
    "chair": chair.RULES,
    "reward_bench": reward_bench.RULES,
    "vl_reward_bench": vl_reward_bench.RULES,
    "multimodal_reward_bench": multimodal_reward_bench.RULES,
    "safety_vlguard": safety_bench.VLGUARD_RULES,
    "safety_jailbreak": safety_bench.JAILBREAK_RULES,
    "verifiable": verifiable.RULES,
    "image_preference": image_preference.RULES,
    "video_hallucer": video_hallucer.RULES,
    "vidhalluc_binary": vidhalluc.BINARY_RULES,
    "vidhalluc_choice": vidhalluc.RULES,
    "vidhalluc_order": vidhalluc.RULES,
    "tempcompass": tempcompass.RULES,
    "tvbench": video_choices.RULES,
    "mvbench": video_choices.RULES,
    "mlvu": video_choices.MLVU_RULES,
    "longvideobench": video_choices.RULES,
    "videomme": videomme.RULES,
}
