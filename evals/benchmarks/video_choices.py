"""Multiple choice about clips: TVBench, MVBench, MLVU and LongVideoBench.

    official  the first letter of the alphabet in the answer, case aside, as RRPO's released scripts
              read it (arXiv 2504.12083): "The answer is B" is T, and wrong
    strict    mmalign.options.chosen_option: one letter, or the words of one option; else unread

`official/accuracy` is over all questions; MLVU's is M-avg, the mean of its tasks' accuracies.
MVBench's and MLVU's own scripts differ from RRPO's: MVBench takes the first word and looks for it
in the right option's letter, so that an empty answer is right; MLVU the character before ")".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from evals.base import QuestionPrompt, Row, text_field
from evals.questions import (
    Question,
    QuestionBench,
    Reading,
    accuracy,
    by_category,
    question_rules,
    unparsed,
)
from evals.sources import of_kind, read_json
from evals.stats import Ratio
from mmalign.errors import DataError
from mmalign.options import chosen_option

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# <task>.json of TVBench, which is also the folder of its clips.
TVBENCH = (
    "action_count",
    "object_count",
    "action_sequence",
    "object_shuffle",
    "scene_transition",
    "action_localization",
    "action_antonym",
    "unexpected_action",
    "egocentric_sequence",
    "moving_direction",
)
# <task>.json of MVBench, and where its clips are.
MVBENCH = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
# Tasks whose questions are about a part of a clip.
BOUNDED = {
    "action_sequence",
    "action_prediction",
    "object_interaction",
    "action_localization",
    "episodic_reasoning",
}
MLVU = (
    "1_plotQA",
    "2_needle",
    "3_ego",
    "4_count",
    "5_order",
    "6_anomaly_reco",
    "7_topic_reasoning",
)


class Choices(QuestionBench):
    """What benchmarks of multiple choice share: RRPO's reading, and the strict one."""

    videos: Path
    prompt: QuestionPrompt = "{question}\nOnly give the best option."

    method: ClassVar[str] = (
        "official: the first letter of the answer; strict: one option, else unread"
    )

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """A capital letter, which the official rule may find beyond the options."""
        if reading == "strict":
            return chosen_option(answer, question.options)
        found = re.search("[A-Za-z]", answer)
        return found[0].upper() if found else None

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """Accuracy under both readings, the official one by category too."""
        return metrics(items)


class TvBench(Choices):
    """TVBench (arXiv 2410.07752). data: its folder json. videos: its folder video."""

    name: Literal["tvbench"] = "tvbench"
    data: Path

    def load(self) -> list[Question]:
        """The questions of every task, whose clips are in the folder of its name."""
        return _of_tasks(self.data, {task: task for task in TVBENCH})


class MvBench(Choices):
    """MVBench (arXiv 2311.17005). data: its folder json. videos: its folder video.

    episodic_reasoning has folders of frames, at 3 a second: make a clip of each part.
    """

    name: Literal["mvbench"] = "mvbench"
    data: Path

    def load(self) -> list[Question]:
        """The questions of every task, whose clips are in the folders of their sources."""
        return _of_tasks(self.data, MVBENCH)


class Mlvu(Choices):
    """MLVU's choices (arXiv 2406.04264). data: its folder json. videos: its folder video."""

    name: Literal["mlvu"] = "mlvu"
    data: Path

    def load(self) -> list[Question]:
        """The questions of every task, whose clips are in the folder of its name."""
        return _of_tasks(self.data, {task: task for task in MLVU})

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """M-avg, and the tasks' accuracies."""
        return mlvu_metrics(items)


class LongVideoBench(Choices):
    """LongVideoBench (arXiv 2407.15754), without subtitles. data: lvb_val.json."""

    name: Literal["longvideobench"] = "longvideobench"
    data: Path
    prompt: QuestionPrompt = (
        "{question}\nAnswer with the option's letter from the given choices directly."
    )

    def load(self) -> list[Question]:
        """The file's questions; their categories are kind and length of clip in seconds."""
        questions: list[Question] = []
        for number, row in enumerate(read_json(self.data, list), start=1):
            where = f"{self.data}, question {number}"
            of_kind(row, dict, where)
            options, right = _lettered(row.get("candidates"), where), row.get("correct_choice")
            if type(right) is not int or not 0 <= right < len(options):
                raise DataError(
                    "correct_choice is wrong",
                    where=where,
                    got=right,
                    wanted=f"0 to {len(options) - 1}",
                    fix="the test split has no answers: give lvb_val.json",
                )
            if type(row.get("duration_group")) is not int:
                raise DataError("duration_group is no number of seconds", where=where)
            clip = text_field(row, "video_path", where)
            lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
            questions.append(
                Question(
                    id=text_field(row, "id", where),
                    video=clip,
                    text=f"Question: {text_field(row, 'question', where)}\nOptions:\n{lines}",
                    truth=LETTERS[right],
                    categories=(
                        text_field(row, "question_category", where),
                        f"{row['duration_group']} s",
                    ),
                    cluster=clip,
                    options=options,
                )
            )
        return questions


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Accuracy over questions under both readings, the official one by category too."""
    return both(items, accuracy(items, "official"), accuracy(items, "official"), macro=False)


def mlvu_metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """As metrics, with the mean over tasks for the whole."""
    whole = accuracy(items, "official", macro=True)
    return both(items, whole, accuracy(items, "official"), macro=True)


def both(items: Sequence[Row], whole: Ratio, plain: Ratio, *, macro: bool) -> dict[str, Ratio]:
    """The official `whole`, `plain` by category, the strict accuracy, and what was not read."""
    return {
        "official/accuracy": whole,
        **by_category(items, "official/accuracy", plain),
        "strict/accuracy": accuracy(items, "strict", macro=macro),
        "official/unparsed_rate": unparsed(items, "official"),
        "unparsed_rate": unparsed(items),
    }


def _of_tasks(data: Path, folders: Mapping[str, str]) -> list[Question]:
    """The questions of data/<task>.json, a list for each task of `folders`.

    Rows have video, question, candidates, answer, some of them start and end. folders: where each
    task's clips are, below the folder of clips. Questions of BOUNDED tasks are about a part of a
    clip, from start to end in seconds, and ask for a file of it alone, cut beforehand:
    clip_<start>_<end>.mp4 beside clip.mp4, with two digits after the point.
    """
    questions: list[Question] = []
    for task, folder in folders.items():
        file = data / f"{task}.json"
        for number, row in enumerate(read_json(file, list), start=1):
            where = f"{file}, question {number}"
            of_kind(row, dict, where)
            options = _lettered(row.get("candidates"), where)
            answer = text_field(row, "answer", where)
            right = [letter for letter, text in options.items() if text == answer]
            if not right:
                raise DataError("answer is none of the candidates", where=where, got=answer)
            clip = text_field(row, "video", where)
            clip = f"{folder}/{_part(clip, row, where) if task in BOUNDED else clip}"
            questions.append(
                Question(
                    id=f"{task}/{number}",
                    video=clip,
                    text=_listed(text_field(row, "question", where), options),
                    # Of equal candidates the script takes the last.
                    truth=right[-1],
                    categories=(task,),
                    cluster=clip,
                    options=options,
                )
            )
    return questions


def _lettered(candidates: Any, where: str) -> dict[str, str]:
    of_kind(candidates, list, f"{where}, candidates")
    if not 2 <= len(candidates) <= len(LETTERS):
        raise DataError(
            "candidates are wrong", where=where, got=len(candidates), wanted="2 to 26 of them"
        )
    return {letter: str(text) for letter, text in zip(LETTERS, candidates, strict=False)}


def _listed(question: str, options: Mapping[str, str]) -> str:
    lines = "\n".join(f"({letter}) {text}" for letter, text in options.items())
    return f"Question: {question}\nOptions:\n{lines}"


def _part(clip: str, row: Row, where: str) -> str:
    """The file of the part of a clip that a row is about."""
    start, end = row.get("start"), row.get("end")
    if not isinstance(start, int | float) or not isinstance(end, int | float) or start >= end:
        raise DataError(
            "start and end are wrong", where=where, got=f"{start}, {end}", wanted="start < end"
        )
    return f"{Path(clip).with_suffix('')}_{start:.2f}_{end:.2f}.mp4"


RULES = question_rules(metrics)
MLVU_RULES = question_rules(mlvu_metrics)
