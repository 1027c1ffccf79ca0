"""Instructions at the end of a prompt."""

from __future__ import annotations

import pytest

from mmalign.errors import DataError
from mmalign.instruct import FORM, instructed
from mmalign.options import options_of
from mmalign.records import Block, Message, prompt_text, user


def test_an_instruction_is_the_last_line_of_the_question():
    assert instructed(user("How many?", images=1), "Be brief.") == user(
        "How many?\nBe brief.", images=1
    )


def test_asking_twice_asks_once():
    once = instructed(user("How many?"), FORM)
    assert instructed(once, FORM) == once
    assert instructed(user(f"How many?\n{FORM} \n"), FORM) == user(f"How many?\n{FORM} \n")


def test_only_the_last_turn_changes():
    system = Message(role="system", content=(Block(type="text", text="You see."),))
    before = (system, *user("One?"), Message(role="assistant", content=()), *user("Two?"))
    after = instructed(before, "Be brief.")
    assert after[:3] == before[:3]
    assert prompt_text(after[3:]) == "Two?\nBe brief."


def test_a_turn_without_a_text_gets_one():
    picture = Message(role="user", content=(Block(type="image"),))
    assert instructed([picture], "Look.") == user("Look.", images=1)


@pytest.mark.parametrize("prompt", [(), (Message(role="assistant", content=()),)])
def test_a_prompt_of_nobody_is_refused(prompt):
    with pytest.raises(DataError, match="user's turn"):
        instructed(prompt, "Look.")


def test_the_options_of_a_question_stay_what_they_are():
    question = "Which one?\nA. a cat\nB. a dog"
    assert options_of(prompt_text(instructed(user(question), FORM))) == options_of(question)
