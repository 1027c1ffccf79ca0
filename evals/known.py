"""The rules of every benchmark, by the name that recipes and results give it."""

from __future__ import annotations

from evals import (
    amber,
    chair,
    image_preference,
    object_halbench,
    pope,
    reward_bench,
    tempcompass,
    verifiable,
    video_choices,
    video_hallucer,
    videomme,
    vidhalluc,
)
from evals.rules import Rules

RULES: dict[str, Rules] = {
    "pope": pope.RULES,
    "chair": chair.RULES,
    "reward_bench": reward_bench.RULES,
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
    "amber": amber.RULES,
    "object_halbench": object_halbench.RULES,
}
