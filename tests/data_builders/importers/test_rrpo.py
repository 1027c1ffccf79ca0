"""RRPO's JSON: tags become spans of the clean text, whatever the tags did to its blanks."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.importers.common import Bad, Unusable
from data_builders.importers.rrpo import read, untag
from mmalign.records import Block, Media, Preference, Span, check, user

ROW = {
    "question": "<image>\nWhat happens?",
    "answer": "This is a correct or preferred answer.",
    "pred": "This is an incorrect or non-preferred answer.",
    "answer_masked": "This is a <MASK> correct </MASK> or <MASK> preferred </MASK> answer.",
    "pred_masked": "This is an <MASK> incorrect </MASK> or <MASK> non-preferred </MASK> answer.",
    "src": "data-source",
    "sample_id": 0,
    "video": "video.mp4",
}


def one(tmp_path: Path, row: Any) -> Any:
    file = tmp_path / "masked.json"
    file.write_text(json.dumps([row]))
    (result,) = read(file)
    return result


def detail(pair: Preference) -> dict[str, Any]:
    return json.loads(pair.origin.detail)


def phrases(clean: str, spans: tuple[Span, ...]) -> dict[int, str]:
    return {span.phrase: clean[span.start : span.end] for span in spans}


# --- rows -----------------------------------------------------------------------------------


def test_the_documented_row(tmp_path: Path) -> None:
    pair = one(tmp_path, ROW)
    assert pair.prompt == user("What happens?", videos=1)
    assert (pair.videos, pair.images) == ((Media(path="video.mp4"),), ())
    assert (pair.chosen, pair.rejected) == (ROW["answer"], ROW["pred"])
    assert pair.chosen_spans == (
        Span(start=10, end=17, phrase=1),
        Span(start=21, end=30, phrase=2),
    )
    assert phrases(pair.rejected, pair.rejected_spans) == {1: "incorrect", 2: "non-preferred"}
    assert (pair.id, pair.origin.builder) == ("masked-0", "import:rrpo")
    assert detail(pair) == {"sample_id": 0, "src": "data-source", "one_sided": 0}
    assert list(check(pair)) == []


def test_the_clip_may_be_under_media_path(tmp_path: Path) -> None:
    row = {key: value for key, value in ROW.items() if key != "video"} | {"media_path": "b.mp4"}
    assert one(tmp_path, row).videos == (Media(path="b.mp4"),)
    assert one(tmp_path, ROW | {"video": None, "media_path": "b.mp4"}).videos[0].path == "b.mp4"


def test_a_question_without_a_place_has_its_clip_in_front(tmp_path: Path) -> None:
    assert one(tmp_path, ROW | {"question": "What?"}).prompt == user("What?", videos=1)
    pair = one(tmp_path, ROW | {"question": "What?\n<video>"})
    assert pair.prompt[0].content == (Block(type="text", text="What?"), Block(type="video"))


def test_equal_sample_ids_do_not_make_equal_rows(tmp_path: Path) -> None:
    file = tmp_path / "masked.json"
    file.write_text(json.dumps([ROW, ROW]))
    assert [record.id for record in read(file)] == ["masked-0", "masked-1"]


def test_one_sided_phrases_are_kept_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Phrase 2 of answer holds nothing, phrase 3 has no counterpart: of three, one has both."""
    row = ROW | {
        "answer": "a red ball, quickly",
        "answer_masked": "a <MASK> red </MASK> ball<MASK></MASK>, <MASK>quickly</MASK>",
        "pred": "a blue ball rolling",
        "pred_masked": "a <MASK> blue </MASK> ball <MASK> rolling </MASK>",
    }
    with caplog.at_level(logging.INFO, logger="mmalign"):
        pair = one(tmp_path, row)
    assert phrases(pair.chosen, pair.chosen_spans) == {1: "red", 3: "quickly"}
    assert phrases(pair.rejected, pair.rejected_spans) == {1: "blue", 2: "rolling"}
    assert detail(pair)["one_sided"] == 2
    assert "2 one-sided phrases in 1 rows" in caplog.text


def test_a_phrase_on_one_side_alone_is_enough(tmp_path: Path) -> None:
    pair = one(tmp_path, ROW | {"pred_masked": ROW["pred"]})
    assert (len(pair.chosen_spans), pair.rejected_spans) == (2, ())
    assert detail(pair)["one_sided"] == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer_masked": None}, "missing_column"),
        ({"answer": " "}, "empty_text"),
        ({"pred_masked": 3}, "wrong_type"),
        ({"video": None}, "missing_column"),
        ({"video": {"id": 3}}, "wrong_type"),
        ({"question": ""}, "empty_text"),
        ({"answer_masked": "Quite <MASK> another </MASK> text."}, "tags_do_not_align"),
        ({"answer_masked": ROW["answer_masked"] + " Really."}, "tags_do_not_align"),
        ({"answer_masked": ROW["answer"], "pred_masked": ROW["pred"]}, "no_phrases"),
        (
            {"answer_masked": ROW["answer"], "pred_masked": "<MASK></MASK>" + ROW["pred"]},
            "no_phrases",
        ),
        ({"answer_masked": ROW["answer_masked"].replace("</MASK> or", "or")}, "bad_tags"),
        ({"pred_masked": ROW["pred_masked"].replace("<MASK> incorrect", "incorrect")}, "bad_tags"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    bad = one(tmp_path, ROW | changes)
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, "masked.json row 0")
    assert bad.detail


# --- tags -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tagged", "clean", "expected"),
    [
        ("<MASK> A </MASK> cat.", "A cat.", {1: (0, 1)}),
        ("A <MASK> cat. </MASK>", "A cat.", {1: (2, 6)}),
        ("<MASK> A cat. </MASK>", "A cat.", {1: (0, 6)}),
        ("A <MASK> goose </MASK>.", "A goose.", {1: (2, 7)}),
        ("A <MASK>goose</MASK>.", "A goose.", {1: (2, 7)}),
        ("(<MASK> A </MASK>) it is", "(A) it is", {1: (1, 2)}),
        ("<MASK>a</MASK><MASK>b</MASK>", "ab", {1: (0, 1), 2: (1, 2)}),
        ("a <MASK> big dog </MASK> ran", "a big dog ran", {1: (2, 9)}),
        ("a <MASK>big</MASK>dog", "a big dog", {1: (2, 5)}),
        ("two\n\n<MASK> lines </MASK>", " two lines", {1: (5, 10)}),
        ("x <MASK> </MASK> <MASK>y</MASK>", "x y", {2: (2, 3)}),
        ("no tags", "no tags", {}),
    ],
)
def test_spans_by_hand(tagged: str, clean: str, expected: dict[int, tuple[int, int]]) -> None:
    spans, num_phrases = untag(tagged, clean)
    assert {span.phrase: (span.start, span.end) for span in spans} == expected
    assert num_phrases == tagged.count("<MASK>")


@pytest.mark.parametrize(
    "tagged",
    [
        "<MASK> a <MASK> b </MASK> c </MASK>",
        "<MASK> a b c",
        "a b c </MASK>",
        "</MASK> a <MASK> b c",
        "<MASK> a </MASK> b </MASK> c",
    ],
)
def test_nested_and_unbalanced_tags_are_refused(tagged: str) -> None:
    with pytest.raises(Unusable) as error:
        untag(tagged, "a b c")
    assert error.value.reason == "bad_tags"


@pytest.mark.parametrize(
    ("tagged", "clean"),
    [
        ("a part of <MASK>it</MASK>", "apart of it"),
        ("apart of <MASK>it</MASK>", "a part of it"),
        ("a <MASK>Part</MASK>", "a part"),
        ("a <MASK>part</MASK>", "a part of it"),
    ],
)
def test_texts_that_differ_away_from_a_tag_do_not_align(tagged: str, clean: str) -> None:
    with pytest.raises(Unusable) as error:
        untag(tagged, clean)
    assert error.value.reason == "tags_do_not_align"


BLANKS = st.text(alphabet=" \n\t", max_size=2)
WORDS = st.text(alphabet="ab<>.,é/", min_size=1, max_size=5)
PIECES = st.lists(st.tuples(st.booleans(), st.lists(WORDS, max_size=3), BLANKS, BLANKS), max_size=6)


@given(PIECES, st.randoms(use_true_random=False))
def test_tags_inserted_into_any_text_are_found_again(pieces: Any, random: Any) -> None:
    """The clean text is built beside the tagged one, so where each phrase lies is known."""
    tagged, clean, expected, num_phrases = "", "", {}, 0
    for is_phrase, words, before, after in pieces:
        text = random.choice([" ", "\n"]).join(words)
        between = random.choice(["", " "])  # what parts this piece from the last, in the clean text
        if is_phrase:
            num_phrases += 1
            if text:
                start = len(clean) + len(between)
                expected[num_phrases] = (start, start + len(text))
            tagged += f"{between}<MASK>{before}{text}{after}</MASK>"
        else:
            tagged += between + re.sub("[ \n]", before + " ", text)
        clean += between + text
    spans, num_found = untag(tagged, clean)
    assert num_found == num_phrases
    assert {span.phrase: (span.start, span.end) for span in spans} == expected
    assert all(clean[span.start : span.end].strip() for span in spans)
