"""Records: every kind survives plain values, and check names what is wrong with one."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmalign import records
from mmalign.errors import DataError
from mmalign.records import (
    KINDS,
    Block,
    Example,
    ImagePreference,
    Media,
    Message,
    Preference,
    RankedResponse,
    Ranking,
    Span,
    Verifiable,
    arrow_schema,
    check,
    from_row,
    kind_name,
    media_of,
    prompt_text,
    to_row,
    user,
)

# Everything UTF-8 can hold, which is everything a parquet string can.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(allow_nan=False)
st.register_type_strategy(str, texts)
st.register_type_strategy(float, finite)
st.register_type_strategy(int, st.integers(-(2**63), 2**63 - 1))


def some(kind: type) -> st.SearchStrategy:
    """Any value of a record class, nested classes included."""
    hints = typing.get_type_hints(kind, vars(records), {})
    return st.builds(kind, **{name: value_of(hint) for name, hint in hints.items()})


def value_of(hint: typing.Any) -> st.SearchStrategy:
    if typing.get_origin(hint) is tuple:
        return st.lists(value_of(typing.get_args(hint)[0]), max_size=2).map(tuple)
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return some(hint)
    return st.from_type(hint)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_survives_plain_values_and_arrow(kind: type) -> None:
    import pyarrow as pa

    schema = arrow_schema(kind)

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(some(kind))
    def survives(record: typing.Any) -> None:
        row = to_row(record)
        assert from_row(kind, row) == record
        table = pa.Table.from_pylist([row], schema=schema)
        assert from_row(kind, table.to_pylist()[0]) == record

    survives()


def test_kinds_and_names_agree() -> None:
    assert {name: kind_name(kind) for name, kind in KINDS.items()} == {name: name for name in KINDS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "is no preference record: column chosen is null"),
        ({"images": "a.png"}, "images: wanted a list, got str"),
        ({"images": ["a.png"]}, "images: wanted a Media, got str"),
        ({"p_target": "half"}, "p_target: wanted float, got str"),
        (
            {"prompt": [{"role": "robot", "content": []}]},
            "prompt: role: 'robot' is none of 'system'",
        ),
        ({"prompt": [{"role": "user"}]}, "prompt: column content is missing"),
    ],
)
def test_a_row_that_does_not_fit_is_named(change: dict, message: str) -> None:
    row = to_row(Preference(id="a", prompt=user("q"), chosen="x", rejected="y")) | change
    with pytest.raises(DataError, match="row 3.*" + message):
        from_row(Preference, row, where="row 3")


def test_a_missing_column_is_named_and_an_optional_one_takes_its_default() -> None:
    row = to_row(Preference(id="a", prompt=user("q"), chosen="x", rejected="y", weight=2.0))
    del row["weight"]
    assert from_row(Preference, row).weight == 1.0
    del row["rejected"]
    with pytest.raises(DataError, match="column rejected is missing"):
        from_row(Preference, row)


def test_whole_numbers_are_read_as_floats_where_floats_are_meant() -> None:
    row = to_row(Preference(id="a", prompt=user("q"), chosen="x", rejected="y")) | {"score_gap": 2}
    assert isinstance(from_row(Preference, row).score_gap, float)


def test_prompt_text_leaves_out_media_places() -> None:
    prompt = (
        *user("Look.", images=1),
        Message(role="user", content=(Block(type="text", text="Why?"),)),
    )
    assert prompt_text(prompt) == "Look.\nWhy?"


# --- check ----------------------------------------------------------------------------------

PAIR = Preference(
    id="a", prompt=user("q", images=1), images=(Media(path="a.png"),), chosen="yes", rejected="no"
)
ANSWER_TURN = Message(role="assistant", content=(Block(type="text", text="yes"),))
RANKING = Ranking(
    id="a",
    prompt=user("q"),
    responses=(RankedResponse(text="x", rank=0), RankedResponse(text="y", rank=1)),
)
IMAGE_PAIR = ImagePreference(
    id="a", prompt="a cat", chosen=Media(path="a.png"), rejected=Media(path="b.png")
)
VERIFIABLE = Verifiable(id="a", prompt=user("q"), answer="yes", verifier="yes_no")


@pytest.mark.parametrize("record", [PAIR, RANKING, IMAGE_PAIR, VERIFIABLE])
def test_good_records_have_no_problems(record: typing.Any) -> None:
    assert list(check(record)) == []


@pytest.mark.parametrize(
    ("record", "column", "what"),
    [
        (replace(PAIR, id=" "), "id", "empty"),
        (replace(PAIR, prompt=()), "prompt", "no messages"),
        (replace(PAIR, prompt=(*PAIR.prompt, ANSWER_TURN)), "prompt", "ends with an assistant"),
        (replace(PAIR, images=()), "images", "0 files for 1 places"),
        (replace(PAIR, videos=(Media(path="a.mp4"),)), "videos", "1 files for 0 places"),
        (replace(PAIR, chosen=" \n"), "chosen", "empty"),
        (replace(PAIR, rejected=""), "rejected", "empty"),
        (replace(PAIR, rejected="yes"), "rejected", "is the chosen response"),
        (replace(PAIR, contrast_images=PAIR.images * 2), "contrast_images", "2 files where"),
        (replace(PAIR, chosen_spans=(Span(start=0, end=4, phrase=1),)), "chosen_spans", "outside"),
        (
            replace(PAIR, rejected_spans=(Span(start=1, end=1, phrase=1),)),
            "rejected_spans",
            "outside",
        ),
        (replace(PAIR, p_target=1.5), "p_target", "1.5"),
        (replace(PAIR, p_target=float("nan")), "p_target", "nan"),
        (replace(RANKING, responses=RANKING.responses[:1]), "responses", "1 responses"),
        (
            replace(RANKING, responses=(*RANKING.responses, RankedResponse(text="", rank=2))),
            "responses",
            "empty",
        ),
        (replace(IMAGE_PAIR, prompt=""), "prompt", "empty"),
        (replace(IMAGE_PAIR, p_target=-0.1), "p_target", "-0.1"),
        (replace(VERIFIABLE, answer=""), "answer", "empty"),
        (Example(id="a", prompt=user("q"), answer=" "), "answer", "empty"),
    ],
)
def test_check_names_the_column_and_the_problem(record: typing.Any, column: str, what: str) -> None:
    problems = list(check(record))
    assert [problem.column for problem in problems] == [column]
    assert what in problems[0].what
    assert problems[0].fix


def test_equal_responses_are_fine_where_the_images_differ() -> None:
    """Re-Align's visual pair: one answer, right under one image and wrong under the other."""
    pair = replace(PAIR, rejected="yes", contrast_images=(Media(path="b.png"),))
    assert list(check(pair)) == []


def test_media_of_yields_every_column() -> None:
    media = {
        name: Media(path=name)
        for name in ("images", "videos", "contrast_images", "contrast_videos")
    }
    pair = replace(PAIR, **{name: (item,) for name, item in media.items()})
    assert dict(media_of(pair)) == media
    assert list(media_of(IMAGE_PAIR)) == [
        ("chosen", IMAGE_PAIR.chosen),
        ("rejected", IMAGE_PAIR.rejected),
    ]
    assert list(media_of(RANKING)) == []
