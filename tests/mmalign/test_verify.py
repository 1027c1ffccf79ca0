"""Answers against truths. The tests of `math` share one child process."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.checked import Checked
from mmalign.errors import DataError, MissingExtra
from mmalign.math_verifier import legible
from mmalign.records import Verifiable, user
from mmalign.verify import Verifiers, check_extras, truth_problem

OPTIONS = "What does he do?\n(A) a dog barks\n(B) a cat sleeps\n(C) no cat sleeps"


def row(verifier: str, truth: str, question: str = "How many?") -> Verifiable:
    return Verifiable(id="q1", prompt=user(question), answer=truth, verifier=verifier)


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers(math_timeout_seconds=60) as all_of_them:
        yield all_of_them


@pytest.mark.parametrize(
    ("verifier", "truth", "answer", "correct"),
    [
        ("exact", "cat", "Cat.", True),
        ("exact", "a black cat", "\n a  black cat", True),
        ("exact", "cat", "\\text{cat}", True),
        ("exact", "cat", "“cat”", True),
        ("exact", "cat", "the cat", False),
        ("exact", "cat", "act", False),
        ("exact", "cat", ".", None),
        ("number", "12", "12 apples", True),
        ("number", "twelve", "12.0", True),
        ("number", "1/2", "0.5", True),
        ("number", "1/2", "2/4", True),
        ("number", "1000", "1,000", True),
        ("number", "1/3", "0.33", False),
        ("number", "12", "13", False),
        ("number", "12", "12 or 13", None),
        ("number", "12", "9" * 1_000_000, None),
        ("yes_no", "Yes", "yes, there is", True),
        ("yes_no", "yes", "No.", False),
        ("yes_no", "no", "yes and no", None),
        ("option", "B", "B", True),
        ("option", "B", "(B)", True),
        ("option", "B", "B.", True),
        ("option", "B", "b", True),
        ("option", "B", "(b)", True),
        ("option", "B", "\\text{B}", True),
        ("option", "B", "$B$", True),
        ("option", "B", "**B**", True),
        ("option", "B", "Option B", True),
        ("option", "B", "The answer is option B.", True),
        ("option", "B", "a cat sleeps", True),
        ("option", "B", "B. a cat sleeps", True),
        ("option", "a cat sleeps", "(B)", True),
        ("option", "(A) a dog barks", "A", True),
        ("option", "B", "A", False),
        ("option", "B", "no cat sleeps", False),
        ("option", "A", "A cat sleeps", False),
        ("option", "B", "A or B", None),
        ("option", "B", "B. a dog barks", None),
        ("option", "B", "a cow", None),
        ("option", "B", "D", None),
    ],
)
def test_without_mathematics(verifiers, verifier, truth, answer, correct):
    assert verifiers.check(answer, row(verifier, truth, OPTIONS)).correct is correct


def test_options_that_stand_in_the_picture_are_letters_only(verifiers):
    assert verifiers.check("(E)", row("option", "E", "Which?")) == Checked(True, "equal")
    assert verifiers.check("a cat", row("option", "E", "Which?")) == Checked(None, "unread")


def test_a_response_is_checked_by_its_answer(verifiers):
    twelve = row("number", "12")
    tagged = "<think>5 and 7</think><answer>The answer is $\\boxed{12}$</answer>"
    assert verifiers.check_response(tagged, twelve) == Checked(True, "equal")
    assert verifiers.check_response("so \\boxed{12}", twelve) == Checked(True, "equal")
    assert verifiers.check_response("so \\boxed{12", twelve) == Checked(False, "no_answer")
    assert verifiers.check_response("12", twelve) == Checked(False, "no_answer")


def test_a_response_without_an_answer_is_not_none(verifiers):
    none = row("exact", "None")
    assert verifiers.check_response("I do not know.", none) == Checked(False, "no_answer")
    assert verifiers.check_response("\\boxed{None}", none).correct


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (row("maths", "12"), "no verifier is called 'maths': there are exact, number, option"),
        (row("number", "many"), "the answer 'many' is nothing that the verifier number reads"),
        (row("yes_no", "maybe"), "yes_no"),
        (row("option", "a cow", OPTIONS), "option"),
        (row("math", "\\frac{1}{2"), "math"),
        (row("exact", " . "), "has 1 characters, wanted 1 to 4096"),
        (row("number", "9" * 5000), "has 5000 characters"),
    ],
)
def test_a_truth_that_nothing_can_meet_is_the_rows_fault(verifiers, bad, problem):
    assert problem in (truth_problem(bad) or "")
    with pytest.raises(DataError, match="row q1: "):
        verifiers.check("12", bad)


@pytest.mark.parametrize("verifier", ["exact", "number", "option", "yes_no"])
@given(answer=st.text(max_size=60))
def test_no_answer_raises(verifiers, verifier, answer):
    truth = {"exact": "cat", "number": "12", "option": "B", "yes_no": "no"}[verifier]
    verifiers.check(answer, row(verifier, truth, OPTIONS))


# --- mathematics ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("The answer is $12$.", "12"),
        ("Final answer: \\(x\\)", "x"),
        ("7 3/4", "7\\frac{3}{4}"),
        ("1.5e-3", "1.5\\cdot 10^{-3}"),
        ("2pi", "2\\pi "),
        ("\\{1, 2\\}", "\\{1, 2\\}"),
        ("1 2", None),
        ("12} \\boxed{13", None),
        ("{12", None),
        (" . ", None),
    ],
)
def test_what_math_verify_would_misread_is_rewritten_or_unread(text, read):
    assert legible(text) == read


@pytest.mark.parametrize(
    ("truth", "answer", "correct"),
    [
        ("1/2", "0.5", True),
        ("1/2", "2/4", True),
        ("1/2", "\\frac12", True),
        ("1000", "1,000", True),
        ("5", "5 cm", True),
        ("5", "5\\text{ cm}", True),
        ("5", "x=5", True),
        ("12", "The answer is 12.", True),
        ("31/4", "7 3/4", True),
        ("1000", "1e3", True),
        ("90", "90^\\circ", True),
        ("-5", "−5", True),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("2\\pi", "2pi", True),
        ("x^2-1", "(x-1)(x+1)", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "[1,2]", False),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", "(1,2,3)", False),
        ("(1,2]", "(1, 2]", True),
        ("(1,2]", "[1,2)", False),
        ("5", "5 degrees", True),
        ("2000000", "2 million", None),
        ("2/4", "1/2", True),  # the truth itself need not be in lowest terms
        ("\\pi", "3.141593", True),
        ("\\pi", "3.14", False),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("1,2", "2,1", True),
        ("0.5", "50%", True),
        ("50", "50\\%", True),
        ("12", "13", False),
        ("12", "12 or 13", False),
        ("12", "twelve", None),
        ("12", "12 zebras", None),
        ("12", "(12", None),
        ("12", "(" * 50 + "1", None),
        ("12", "9" * 1_000_000, None),
        # Products of the same letters, if it were mathematics.
        ("\\text{cat}", "act", None),
        ("None", "neon", None),
        ("None", "None", True),
        # The one reader of math-verify's that is not used would run this.
        ("0", "__import__('os')._exit(0)", None),
    ],
)
def test_mathematics(verifiers, truth, answer, correct):
    assert verifiers.check(answer, row("math", truth)).correct is correct


def test_one_child_serves_all_threads_and_has_its_memory_limited(verifiers):
    verifiers.check("0.25", row("math", "1/4"))
    found: dict[int, bool | None] = {}

    def check(i: int) -> None:
        found[i] = verifiers.check(f"{2 * i}/2", row("math", str(i if i % 2 else i + 1))).correct

    threads = [threading.Thread(target=check, args=(i,)) for i in range(8)]
    pid = child_of(verifiers)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: bool(i % 2) for i in range(8)}
    assert child_of(verifiers) == pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert f"Max address space         {2 * 2**30}" in limits


@pytest.mark.parametrize("endless", ["9^{9^{9^{9}}}", "9999999!"])
def test_what_hangs_sympy_is_ended_and_the_next_answer_checked(endless):
    with Verifiers(math_timeout_seconds=1) as verifiers:
        twelve = row("math", "12")
        assert verifiers.check(endless, twelve) == Checked(None, "timeout")
        # A group's other rollouts that say the same cost nothing: no child is started for them.
        assert verifiers.check(endless, twelve) == Checked(None, "timeout")
        assert verifiers._math._guarded.child is None
        # On a busy machine a second is short.
        verifiers._math.timeout_seconds = 60
        assert verifiers.check("12.0", twelve) == Checked(True, "equal")


def test_a_child_that_dies_costs_one_answer(verifiers):
    verifiers.check("0.2", row("math", "1/5"))
    pid = child_of(verifiers)
    os.kill(pid, 19)  # stopped, so that the next task is sent
    killer = threading.Timer(0.5, os.kill, (pid, 9))
    killer.start()
    assert verifiers.check("0.125", row("math", "1/8")) == Checked(None, "crashed")
    assert verifiers.check("0.0625", row("math", "1/16")) == Checked(True, "equal")
    assert child_of(verifiers) != pid


def test_a_missing_extra_names_its_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with Verifiers() as verifiers:
        assert verifiers.check("12", row("number", "12")).correct
        with pytest.raises(MissingExtra, match=r"pip install 'mmalign\[math\]'"):
            verifiers.check("12.0", row("math", "12"))
    check_extras([row("number", "12")])
    with pytest.raises(MissingExtra):
        check_extras([row("number", "12"), row("math", "12")])


def child_of(verifiers: Verifiers) -> int:
    child = verifiers._math._guarded.child
    assert child is not None
    return child._process.pid
