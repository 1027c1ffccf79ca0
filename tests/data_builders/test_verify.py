"""Verdicts on responses: wrong only where that is certain."""

from __future__ import annotations

import re

import pytest

from data_builders.base import GeneratorConfig, OverlapFilter
from data_builders.rewrite import AsItIs, JudgeRewrites, rewritten
from data_builders.verify import (
    ByJudge,
    Differs,
    JudgeConfig,
    Rules,
    Verdict,
    by_rule,
    kind_of,
    load_verifier,
)
from mmalign.generate.base import Generation, Sampling
from mmalign.judge import Case, Judge
from mmalign.models.load import ModelConfig
from mmalign.options import chosen_option, options_of
from mmalign.records import prompt_text

QUESTION = "What does he do?\nOptions:\n(A) opens a door\n(B) closes a door\n(C) the door is gone"


class Script:
    """A judge's model: says what the script says, with the code that the request asks for."""

    name = "script"

    def __init__(self, *says: str) -> None:
        self.says, self.prompts = list(says), list[str]()

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        made = []
        for request in requests:
            prompt = prompt_text(request.prompt)
            self.prompts.append(prompt)
            code = re.findall(r'"code": "([0-9a-f]{16})"', prompt)[-1]
            text = self.says.pop(0).replace("CODE", code)
            made.append(Generation(id=request.id, text=text, num_tokens=1, finished=True))
        return made


def case(question: str, answer: str, response: str) -> Case:
    return Case(id="x", question=question, answer=answer, response=response)


def outcome(question: str, answer: str, response: str) -> str:
    return by_rule(case(question, answer, response), 3).outcome


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (QUESTION, {"A": "opens a door", "B": "closes a door", "C": "the door is gone"}),
        ("Which?\nA. a cat\nB. a dog", {"A": "a cat", "B": "a dog"}),
        ("Which? (A) a cat (B) a dog", {"A": "a cat", "B": "a dog"}),
        ("Which? A) a cat B) a dog\nAnswer with the letter.", {"A": "a cat", "B": "a dog"}),
        ("Who is Mr. B. Smith?", {}),
        ("Is A. a cat?", {}),
        ("What is it?", {}),
    ],
)
def test_options_are_read_from_the_question(question, options):
    assert options_of(question) == options


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B) closes a door", "B"),
        ("He closes a door.", "B"),
        ("The answer is C.", "C"),
        ("The door is gone", "C"),
        ("A", "A"),
        ("(A) closes a door", None),
        ("He opens a door and closes a door.", None),
        ("He does not open it, and closes nothing.", None),
        ("He never closes a door.", None),
        ("He isn't one who opens a door.", None),
        ("Hard to say.", None),
        ("D", None),
    ],
)
def test_a_text_chooses_one_option_or_none(text, letter):
    assert chosen_option(text, options_of(QUESTION)) == letter


def test_words_within_a_longer_option_count_for_the_longer():
    options = {"A": "a dog", "B": "a dog and a cat", "C": "no dog"}
    assert chosen_option("A dog and a cat!", options) == "B"
    assert chosen_option("a dog", options) == "A"
    assert chosen_option("no dog", options) == "C"


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        (QUESTION, "(B) closes a door", "choice"),
        (QUESTION, "closes a door", "choice"),
        (QUESTION, "He leaves.", "short"),
        ("Is it?", "Yes.", "yes_no"),
        ("Is it?", "No, it is not red at all.", "yes_no"),
        ("What?", "a brown dog", "short"),
        ("What?", "a dog that runs along the shore", "open"),
        ("What?", "!", "open"),
    ],
)
def test_the_kind_of_a_question(question, answer, kind):
    assert kind_of(question, answer, 3) == kind


@pytest.mark.parametrize(
    ("question", "answer", "response", "wanted"),
    [
        (QUESTION, "(B) closes a door", "A", "wrong"),
        (QUESTION, "B", "He closes a door.", "right"),
        (QUESTION, "B", "He walks.", "unknown"),
        ("Is it?", "Yes.", "No, it is not.", "wrong"),
        ("Is it?", "No.", "no", "right"),
        ("Is it?", "Yes.", "There is none.", "unknown"),
        ("What?", "A dog.", "the dog", "right"),
        ("What?", "a dog", "A cat.", "wrong"),
        ("How many?", "two", "2", "right"),
        ("How many?", "two", "three", "wrong"),
        ("What?", "a dog", "not a dog", "unknown"),
        ("What?", "a brown dog", "a dog", "unknown"),
        ("What?", "a dog", "...", "unknown"),
        ("What?", "a dog", " ", "unknown"),
        ("What?", "a man walks along a road", "A cat.", "unknown"),
    ],
)
def test_rules_call_wrong_only_what_is(question, answer, response, wanted):
    assert outcome(question, answer, response) == wanted


def test_a_judge_is_asked_only_what_no_rule_can_tell():
    script = Script(
        '{"code": "CODE", "verdict": "incorrect"}', '{"code": "CODE", "verdict": "correct"}'
    )
    verify = load_verifier(ByJudge(), Judge(script, tries=1))
    verdicts = verify(
        [
            case("Is it?", "Yes.", "No."),
            case("What happens?", "a man walks along a road", "A car drives."),
            case("Is it?", "Yes.", "There is one."),
        ]
    )
    assert verdicts == [
        Verdict("wrong", "yes_no"),
        Verdict("wrong", "judge"),
        Verdict("right", "judge"),
    ]
    assert len(script.prompts) == 2
    assert "A car drives." in script.prompts[0]


def test_without_a_judge_open_answers_are_unknown():
    (verdict,) = load_verifier(Rules(), None)([case("What?", "a man on a long road", "A car.")])
    assert verdict == Verdict("unknown", "open")


@pytest.mark.parametrize(
    "says", ["It is wrong.", '{"verdict": "incorrect"}', '{"code": "CODE", "verdict": "so so"}']
)
def test_nonsense_of_a_judge_is_unknown(says):
    verify = load_verifier(ByJudge(), Judge(Script(says), tries=1))
    (verdict,) = verify([case("What?", "a man walks along a road", "A car drives.")])
    assert verdict.outcome == "unknown"
    assert verdict.reason.startswith("judge:")


def test_differing_is_a_choice_of_its_own():
    verify = load_verifier(Differs(similarity=OverlapFilter(threshold=0.7)), None)
    cases = [case("Is it?", "a b c", response) for response in ("a b c", "a b d", "x")]
    # F1 of the words: 1, 2/3, 0.
    assert [verdict.outcome for verdict in verify(cases)] == ["right", "wrong", "wrong"]


def test_a_judge_is_made_from_its_settings(monkeypatch):
    made = Script()
    monkeypatch.setattr(GeneratorConfig, "load", lambda self: made)
    generator = GeneratorConfig(model=ModelConfig(path="none"), temperature=0, max_new_tokens=9)
    judge = JudgeConfig(generator=generator, tries=2).load(seed=4)
    assert (judge.generator, judge.tries) == (made, 2)
    assert judge.sampling == Sampling(max_new_tokens=9, temperature=0, seed=4)


LONG = case("What happens?", "A man walks along a road.", "he is driving a car i think")


def test_a_rewrite_keeps_the_answers_style():
    script = Script(
        '{"code": "CODE", "differences": "drives a car instead of walking"}',
        '{"code": "CODE", "sentence": "A man drives along a road."}',
    )
    (made,) = rewritten(JudgeRewrites(), [LONG], Judge(script))
    assert made.text == "A man drives along a road."
    assert made.differences == "drives a car instead of walking"
    assert "drives a car instead of walking" in script.prompts[1]


def test_short_answers_and_options_are_not_rewritten():
    script = Script()
    cases = [case("Is it?", "Yes.", "No, never."), case(QUESTION, "(C) the door is gone", "A")]
    assert [made.text for made in rewritten(JudgeRewrites(), cases, Judge(script))] == [
        "No, never.",
        "A",
    ]
    assert script.prompts == []


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (['{"code": "CODE", "differences": null}'], "no_key_difference"),
        (['{"code": "CODE", "differences": "None."}'], "no_key_difference"),
        (["None"], "not_rewritten"),
        (['{"code": "CODE", "differences": "a car"}', "A man drives."], "not_rewritten"),
        (
            [
                '{"code": "CODE", "differences": "a car"}',
                '{"code": "CODE", "sentence": "A man walks  along a road."}',
            ],
            "not_rewritten",
        ),
    ],
    ids=["no difference", "none", "nonsense", "no sentence", "unchanged"],
)
def test_what_cannot_be_rewritten_says_why(says, reason):
    (made,) = rewritten(JudgeRewrites(), [LONG], Judge(Script(*says), tries=1))
    assert (made.text, made.reason) == (None, reason)


def test_one_bad_reply_takes_no_other_case_with_it():
    script = Script(
        "nonsense",
        '{"code": "CODE", "differences": "a car"}',
        '{"code": "CODE", "sentence": "A man drives along a road."}',
    )
    made = rewritten(JudgeRewrites(), [LONG, LONG], Judge(script, tries=1))
    assert [one.text for one in made] == [None, "A man drives along a road."]


def test_as_it_is_needs_no_judge():
    assert [made.text for made in rewritten(AsItIs(), [LONG], None)] == [LONG.response]
