"""Video-MME (Fu et al., 2024, arXiv 2405.21075): choices about short, medium and long clips.

    official  the first capital A to D, after the phrases that lmms-eval's copy of the released
              script removes: "Best option: C" is B. An answer without any is **left out of the
              count**, as there; a missing one is wrong. Read from a quotation of that copy, never
              run beside the script itself, of which other copies remove more phrases
    strict    mmalign.options.chosen_option: one letter, or the words of one option; an unread
              answer is wrong

Read `official/unparsed_rate` beside the official accuracy: what it left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from evals.base import QuestionPrompt, Row, text_field
from evals.benchmarks.video_choices import Choices, both
from evals.questions import READ_TWICE, Question, Reading, question_rules
from evals.rules import Metric
from evals.sources import of_kind, read_rows
from evals.stats import Ratio, ratio
from mmalign.errors import DataError
from mmalign.options import chosen_option

# What lmms-eval's copy removes from an answer before it looks for a letter, in this order.
_PHRASES = ("The best answer is", "The correct answer is", "The answer is", "The answer")


class VideoMme(Choices):
    """data: the released parquet file, or its rows as JSON lines.

    subtitles: the folder of <videoID>.srt, to ask with them; the key then ends in "subtitles". All
    of a clip's subtitles are given, where the released prompt takes those of the frames shown. A
    clip without a file is asked about without, as there.
    """

    name: Literal["videomme"] = "videomme"
    data: Path
    subtitles: Path | None = None
    prompt: QuestionPrompt = "{question}"

    @property
    def key(self) -> str:
        """`videomme-<split>-subtitles`, the latter where they are given."""
        given = None if self.subtitles is None else "subtitles"
        return "-".join(filter(None, (self.name, self.split, given)))

    method: ClassVar[str] = (
        "official: the first A to D, answers without one not counted; strict: one option"
    )

    def load(self) -> list[Question]:
        """The file's questions; their categories are length, domain and task."""
        questions: list[Question] = []
        for where, row in read_rows(self.data):
            of_kind(row.get("options"), list, f"{where}, options")
            found = [re.fullmatch(r"([A-D])\.\s*(.*)", str(line)) for line in row["options"]]
            options = {one[1]: one[2] for one in found if one}
            truth = text_field(row, "answer", where)
            if len(options) != len(row["options"]) or truth not in options:
                raise DataError(
                    "options or answer are wrong",
                    where=where,
                    got=f"{row['options']}, answer {truth}",
                    wanted='options such as "A. a cat", and the letter of one',
                )
            clip = text_field(row, "videoID", where)
            lines = "\n".join(map(str, row["options"]))
            questions.append(
                Question(
                    id=text_field(row, "question_id", where),
                    video=f"{clip}.mp4",
                    text=self._text(clip, text_field(row, "question", where), lines),
                    truth=truth,
                    categories=tuple(
                        text_field(row, name, where) for name in ("duration", "domain", "task_type")
                    ),
                    cluster=clip,
                    options=options,
                )
            )
        if self.subtitles is not None and not any(self.subtitles.glob("*.srt")):
            raise DataError("holds no .srt file", where=str(self.subtitles), fix="correct the path")
        return questions

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """A letter, A to D."""
        if reading == "strict":
            return chosen_option(answer, question.options)
        for phrase in _PHRASES:
            answer = answer.replace(phrase, "")
        found = re.search("[A-D]", answer)
        return found[0] if found else None

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """Accuracy by length, domain and task; the official one of answers with a letter."""
        return metrics(items)

    def _text(self, clip: str, question: str, lines: str) -> str:
        choose = (
            "Select the best answer to the following multiple-choice question based on the video. "
            "Respond with only the letter (A, B, C, or D) of the correct option."
        )
        file = None if self.subtitles is None else self.subtitles / f"{clip}.srt"
        if file is None or not file.exists():
            return f"{question}\n{choose}\n{lines}"
        spoken = subtitle_text(file)
        return f"This video's subtitles are listed below:\n{spoken}\n{choose}\n{question}\n{lines}"


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """As video_choices.metrics; officially, answers without a letter are not counted."""
    counted = [row["official"] is not None or row["answer"] is None for row in items]
    whole = ratio([row["correct_official"] for row in items], counted)
    return both(items, whole, whole, macro=False)


def subtitle_text(file: Path) -> str:
    """The words of an .srt file, a line for each subtitle, without times, numbers and tags.

    Raises DataError when it cannot be read, or holds no subtitle.
    """
    try:
        blocks = re.split(r"\n\s*\n", file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", where=str(file)) from None
    words = [re.sub("<[^>]*>", "", block.partition("-->")[2]) for block in blocks]
    spoken = [" ".join(text.split("\n")[1:]).strip() for text in words]
    if not any(spoken):
        raise DataError("holds no subtitle", where=str(file), fix="repair it, or delete it")
    return "\n".join(filter(None, spoken))


RULES = question_rules(
    metrics,
    {"official/accuracy": "bootstrap", "strict/accuracy": "mcnemar"},
    shown=(*READ_TWICE, Metric("official/unparsed_rate", "not counted")),
)
