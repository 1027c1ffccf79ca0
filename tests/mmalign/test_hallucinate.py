"""Sampling negatives: what is asked, what is kept, and that neighbours change nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.generate.base import (
    Generation,
    MaskImageTokens,
    NoisePixels,
    Request,
    Sampling,
)
from mmalign.hallucinate import (
    AlikeWords,
    Bias,
    BiasItem,
    Guided,
    MaskTokens,
    Negative,
    Noise,
    Unguided,
    is_refusal,
    sample_negatives,
    share_blind,
)
from mmalign.records import Media, user
from mmalign.sentences import split_sentences
from mmalign.similarity import TokenOverlap

TEXT = "A man rides a horse.  He wears a red hat, e.g. a cap.\n- Yes, it is sunny"
SAMPLING = Sampling(max_new_tokens=200, temperature=1.0, seed=3)


class Writer:
    """Answers each request by a rule, and remembers what it was asked, call by call."""

    name = "writer"

    def __init__(self, rule: Callable[[Request], str]) -> None:
        self.rule = rule
        self.calls: list[list[Request]] = []
        self.samplings: list[Sampling] = []

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        self.calls.append(list(requests))
        self.samplings.append(sampling)
        texts = [self.rule(request) for request in requests]
        return [
            Generation(
                id=request.id, text=text.removesuffix("|"), num_tokens=1,
                finished=not text.endswith("|"),
            )
            for request, text in zip(requests, texts, strict=True)
        ]  # fmt: skip


def item(id: str = "a", chosen: str = TEXT) -> BiasItem:
    return BiasItem(
        id=id,
        prompt=user("What is to be seen?", images=1),
        images=(Media(path="a.jpg"),),
        media_root=Path("photos"),
        chosen=chosen,
    )


def sample(writer: Writer, *items: BiasItem, tag: str = "", **changes) -> list[Negative]:
    bias = Bias(**({"similarity": AlikeWords()} | changes))
    return sample_negatives(
        items, writer, similarity=TokenOverlap(), settings=bias, sampling=SAMPLING, tag=tag
    )


def truth(request: Request) -> str:
    """What the chosen response goes on with after the prefill, its later sentences too."""
    start = TEXT.find(request.prefill) + len(request.prefill)
    assert TEXT.startswith(request.prefill)
    return TEXT[start:] if request.prefill else TEXT.strip()


def test_true_continuations_give_the_chosen_text_back():
    """Whatever the cuts: the joined sentences are the chosen text, and that is no negative."""
    for seed in range(20):
        chosen = item(f"item-{seed}")
        made = sample(Writer(truth), chosen, tries=1, guidance=Guided(swap=0.0))
        assert made[0].reason == "same_text"
        assert made[0].text is None
        assert made[0].similarity == 1.0


def test_every_sentence_is_asked_after_the_true_ones():
    writer = Writer(lambda request: " blue. More")
    (made,) = sample(writer, item(), guidance=Guided(swap=0.0))
    sentences = split_sentences(TEXT)
    assert len(sentences) == 3
    (asked,) = writer.calls
    assert [request.id for request in asked] == [f"a/try1/sentence{k}" for k in (1, 2, 3)]
    prefixes = []
    for k, request in enumerate(asked):
        before = "".join(sentences[:k])
        assert (before + sentences[k]).startswith(request.prefill)
        assert len(request.prefill) >= len(before.rstrip())
        assert request.prefill == request.prefill.rstrip()
        assert request.prompt == item().prompt
        assert request.images == item().images
        assert request.media_root == Path("photos")
        prefixes.append(request.prefill[len(before) :])
    wanted = [f"{prefix} blue.".lstrip() for prefix in prefixes]
    assert made.text == wanted[0] + "  " + wanted[1] + "\n" + wanted[2]
    assert made.reason == "try1"
    assert made.try_number == 1


def test_one_sentence_does_not_know_what_another_became():
    """Only the first continuation differs; all requests stay what they were."""
    calls = []
    for word in ("blue", "green"):
        writer = Writer(lambda r, w=word: f" {w}." if r.id.endswith("e1") else " red.")
        sample(writer, item())
        calls.append(writer.calls)
    assert calls[0] == calls[1]


def test_one_mask_a_try_and_another_for_the_next():
    writer = Writer(truth)
    sample(writer, item("a"), item("b"), tries=3, guidance=Guided(swap=0.0))
    keys = [{r.corruption.key for r in call if r.id.startswith("a/")} for call in writer.calls]
    assert keys == [{"a/try1"}, {"a/try2"}, {"a/try3"}]
    for call in writer.calls:
        assert {type(r.corruption) for r in call} == {MaskImageTokens}
        assert {r.corruption.threshold for r in call} == {0.99}
        assert {r.corruption.key.split("/")[0] for r in call} == {"a", "b"}
    first, second = ([r.prefill for r in call] for call in writer.calls[:2])
    assert first != second, "another try has other cuts"


def test_the_last_try_is_free_and_not_checked():
    writer = Writer(lambda r: truth(r) if r.prefill or "sentence" in r.id else TEXT + " A man.")
    (made,) = sample(writer, item(), tries=3, guidance=Guided(swap=0.0))
    assert [len(call) for call in writer.calls] == [3, 3, 1]
    (last,) = writer.calls[2]
    assert (last.id, last.prefill) == ("a/try3/free", "")
    assert last.corruption == MaskImageTokens(threshold=0.99, key="a/try3")
    assert (made.text, made.reason, made.try_number) == (TEXT + " A man.", "free", 3)
    assert made.similarity >= 0.9
    assert made.first_try_similarity == 1.0


def test_a_single_try_is_guided_and_not_checked():
    writer = Writer(lambda r: truth(r).replace("sunny", "rainy"))
    alike = AlikeWords(threshold=0.1)
    (made,) = sample(writer, item(), tries=1, guidance=Guided(swap=0.0), similarity=alike)
    assert len(writer.calls) == 1
    assert len(writer.calls[0]) == 3
    assert made.reason == "unchecked"
    assert made.text == TEXT.replace("sunny", "rainy")
    assert made.similarity > 0.1


def test_the_threshold_parts_alike_from_not():
    """The rule changes one word of 18, counted by hand: F1 = 17/18 = 0.944."""
    words = TokenOverlap()([TEXT], [TEXT.replace("sunny", "rainy")])[0]
    assert words == pytest.approx(17 / 18)
    for threshold, reason in ((0.94, "free"), (0.95, "try1"), (17 / 18, "free")):
        writer = Writer(lambda r: truth(r).replace("sunny", "rainy"))
        limit = AlikeWords(threshold=threshold)
        (made,) = sample(writer, item(), tries=2, guidance=Guided(swap=0.0), similarity=limit)
        assert made.reason == reason, threshold


def test_unguided_tries_are_all_free():
    answers = {"a/try1/free": TEXT, "a/try2/free": "A cat."}
    writer = Writer(lambda r: answers[r.id])
    (made,) = sample(writer, item(), guidance=Unguided())
    assert (made.text, made.reason, made.try_number) == ("A cat.", "try2", 2)
    assert all(r.prefill == "" for call in writer.calls for r in call)


def test_only_open_items_are_tried_again():
    texts = {"a": " blue.", "b": None, "c": " red."}

    def rule(request: Request) -> str:
        return texts[request.id[0]] or (truth(request) if "try3" not in request.id else "Else.")

    writer = Writer(rule)
    made = sample(writer, *map(item, "abc"), tries=4, guidance=Guided(swap=0.0))
    assert [negative.reason for negative in made] == ["try1", "try3", "try1"]
    assert [negative.id for negative in made] == ["a", "b", "c"]
    assert [{r.id[0] for r in call} for call in writer.calls] == [{"a", "b", "c"}, {"b"}, {"b"}]


def hashed(request: Request) -> str:
    """A text that depends on the request alone, as a generator's does."""
    rng = random.Random(f"{request.id}|{request.prefill}|{request.corruption}")
    return " ".join(["", *(rng.choice(["a", "red", "dog", "runs"]) for _ in range(5))]) + "."


def test_neighbours_and_their_order_change_nothing():
    items = [item("a"), item("b", "Yes."), item("c", "A dog sits. So.")]
    together = sample(Writer(hashed), *items)
    for one, wanted in zip(items[::-1], together[::-1], strict=True):
        assert sample(Writer(hashed), one) == [wanted]


def test_tag_and_seed_draw_anew():
    plain = sample(Writer(hashed), item())
    assert sample(Writer(hashed), item()) == plain
    writer = Writer(hashed)
    assert sample(writer, item(), tag="step7") != plain
    assert {r.corruption.key for r in writer.calls[0]} == {"step7/a/try1"}
    reseeded = sample_negatives(
        [item()],
        Writer(hashed),
        similarity=TokenOverlap(),
        settings=Bias(similarity=AlikeWords()),
        sampling=Sampling(seed=4),
    )
    assert reseeded != plain


def test_noise_takes_the_place_of_the_mask():
    writer = Writer(lambda r: " blue.")
    sample(writer, item(), corruption=Noise())
    assert {r.corruption for r in writer.calls[0]} == {NoisePixels(steps=500, key="a/try1")}


def test_a_sentence_is_short_and_a_response_is_not():
    writer = Writer(truth)
    sample(writer, item(), tries=2, guidance=Guided(swap=0.0, sentence_tokens=30))
    assert [s.max_new_tokens for s in writer.samplings] == [30, 200]
    assert {s.temperature for s in writer.samplings} == {1.0}


def test_half_of_the_yes_become_no():
    writer = Writer(lambda r: ", blue.")
    made = sample(writer, *(item(f"i{n}", "Yes.") for n in range(400)))
    # Cut before the full stop in half of the cases, and swapped in half of these.
    prefills = [r.prefill for r in writer.calls[0]]
    counts = {word: prefills.count(word) / 400 for word in ("", "Yes", "No")}
    assert counts == pytest.approx({"": 0.5, "Yes": 0.25, "No": 0.25}, abs=0.08)
    assert {n.text for n in made} == {", blue.", "Yes, blue.", "No, blue."}


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (" mat. It purrs.", "The cat is on the mat."),
        (" 3.5 m mat", "The cat is on the 3.5 m mat"),
        ("", None),
        ("\n- a list", None),
        ("mal side! Yes", "The cat is on themal side!"),
        (" mat by Dr. Who. So", "The cat is on the mat by Dr. Who."),
    ],
)
def test_a_continuation_ends_with_its_sentence(reply: str, text: str):
    """The cut lies before the last word, for a seed that is looked for."""
    chosen = "The cat is on the couch"
    for seed in range(100):
        writer = Writer(lambda r: reply)
        (made,) = sample(writer, item(f"i{seed}", chosen), tries=1)
        if writer.calls[0][0].prefill == "The cat is on the":
            assert made.text == text
            return
    raise AssertionError("no such cut")


def test_nothing_may_follow_where_no_word_is_due():
    """A swapped word may be all, also without its full stop; half a sentence may not."""
    for chosen, kept in (("Yes.", "No"), ("Yes", "No"), ("Yes, it is", "No, it is")):
        made = [
            sample(Writer(lambda r: ""), item(f"i{n}", chosen), tries=1, guidance=Guided(swap=1.0))
            for n in range(50)
        ]
        assert {one.text for (one,) in made} == {kept, None}
        assert {one.reason for (one,) in made if one.text is None} == {"empty"}


def test_one_sentence_without_end_spoils_its_try():
    writer = Writer(lambda r: "" if "try1/sentence2" in r.id else " blue.")
    (made,) = sample(writer, item())
    assert made.reason == "try2"


def test_what_is_no_response_is_tried_again_and_dropped_at_last():
    def reason(rule: Callable[[Request], str], **changes) -> str:
        (made,) = sample(Writer(rule), item("a", "A dog."), **changes)
        assert (made.text is None) == (made.reason not in {"free", "try1", "try2", "unchecked"})
        return made.reason

    assert reason(lambda r: "", guidance=Unguided()) == "empty"
    assert reason(lambda r: " and on and|") == "cut_short"
    assert reason(lambda r: "and on|" if "try1" in r.id else "A cat.") == "try2"
    assert reason(lambda r: " A  dog.\n", guidance=Unguided()) == "same_text"
    assert reason(lambda r: "The image is blurry.", guidance=Unguided()) == "refusal"
    blurry = sample(
        Writer(lambda r: "The image is blurry."), item("a", "A dog."), drop_refusals=False,
        guidance=Unguided(),
    )  # fmt: skip
    assert (blurry[0].reason, blurry[0].text) == ("refusal", "The image is blurry.")


def test_an_empty_answer_is_not_asked_about():
    writer = Writer(hashed)
    made = sample(writer, item("a", " \n"), item("b"))
    assert [negative.reason for negative in made] == ["no_answer", "try1"]
    assert {r.id[0] for call in writer.calls for r in call} == {"b"}
    assert sample(Writer(hashed)) == []


@pytest.mark.parametrize(
    "text",
    [
        "The image is very blurry, so it is hard to see.",
        "The image appears to be completely black.",
        "This is a blurry picture of something.",
        "I cannot see any details here.",
        "I'm sorry, but no image was provided.",
        "It is difficult to determine what the man holds.",
        "The photo is too dark.",
    ],
)
def test_answers_about_not_seeing_are_refusals(text: str):
    assert is_refusal(text)
    assert not is_refusal(text, chosen=f"Well. {text}")


@pytest.mark.parametrize(
    "text",
    [
        "The image is a black and white photo of a dog.",
        "The dog is black, and it is white below.",
        "The background of the image is softly lit.",
        "There is no image of a cat on the wall.",
        "A blurred crowd stands behind the player.",
        "The man cannot see the ball.",
        "The scene is dark, with a lamp.",
    ],
)
def test_answers_about_what_is_seen_are_none(text: str):
    assert not is_refusal(text)


def test_the_share_of_blind_draws():
    assert share_blind(0.99, 576) == pytest.approx(0.0031, abs=0.0001)
    assert share_blind(0.9, 16) == pytest.approx(0.185, abs=0.001)
    assert share_blind(1.0, 576) == 1.0
    assert share_blind(0.0, 576) == 0.0


def test_the_defaults_are_the_papers():
    bias = Bias()
    assert bias.corruption == MaskTokens(threshold=0.99)
    assert bias.tries == 5
    assert bias.similarity.name == "sentence"
    assert bias.similarity.model.endswith("all-mpnet-base-v2")
    assert bias.similarity.threshold == 0.97
    assert isinstance(bias.guidance, Guided)
    assert bias.guidance.swap == 0.5
    assert Noise().steps == 500
    with pytest.raises(ValueError, match="less than or equal to 1"):
        MaskTokens(threshold=1.1)
