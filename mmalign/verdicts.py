"""Verdicts of a language model, read without ever guessing: a value, or Unread with the reason."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

Quality = Literal["good", "bad"]

NO_VERDICT, TWO_VERDICTS, WRONG_FORM = "no_verdict", "two_verdicts", "wrong_form"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankVerdict:
    """Scores, ranks and critiques, one for each response; rank 0 is the best, ties are equal."""

    scores: tuple[float, ...]
    ranks: tuple[int, ...]
    critiques: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unread:
    """Why a reply holds no verdict."""

    reason: str


def read_object(text: str, code: str) -> dict[str, Any] | Unread:
    """The one JSON object in a reply that repeats the code, other text around it allowed.

    Objects without the code are none of the judge's. The same verdict twice is one. Unread are two
    that differ, a name twice in one object, and a verdict whose texts have copied our marks.
    """
    found: list[dict[str, Any]] = []
    decoder = json.JSONDecoder(object_pairs_hook=_once_each)
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError:
            return Unread(NO_VERDICT)
        except ValueError:
            end = place + 1
        else:
            if value.get("code") == code and value not in found:
                found.append(value)
        place = text.find("{", end)
    if len(found) != 1:
        return Unread(TWO_VERDICTS if found else NO_VERDICT)
    verdict = {name: value for name, value in found[0].items() if name != "code"}
    return Unread(WRONG_FORM) if code in json.dumps(verdict) else verdict


def read_correct(reply: Mapping[str, Any]) -> bool | Unread:
    """Whether the judge finds a response correct."""
    return _read_either(reply, {"correct": True, "incorrect": False})


def read_consistent(reply: Mapping[str, Any]) -> bool | Unread:
    """Whether the judge finds that reasoning and answer belong together."""
    return _read_either(reply, {"consistent": True, "inconsistent": False})


def read_differences(reply: Mapping[str, Any]) -> str | Unread:
    """The differences that the judge names; "" where it finds none."""
    if "differences" not in reply:
        return Unread(WRONG_FORM)
    named = reply["differences"]
    if named is None or (isinstance(named, str) and named.strip().rstrip(".").lower() == "none"):
        return ""
    return named.strip() if _is_text(named) else Unread(WRONG_FORM)


def read_sentence(reply: Mapping[str, Any], answer: str) -> str | Unread:
    """The rewritten sentence, which must not be the answer itself."""
    sentence = reply.get("sentence")
    if not isinstance(sentence, str) or not sentence.strip():
        return Unread(WRONG_FORM)
    return Unread("unchanged") if sentence.split() == answer.split() else sentence.strip()


def read_rank(text: str, num_responses: int) -> tuple[int, ...] | Unread:
    """Ranks from a string such as "1>2=3>4", which gives (0, 1, 1, 2).

    Unread where a response stands in it twice (a cycle must), is missing, or is not there.
    """
    if not re.fullmatch(r"\s*\d+(\s*[>=]\s*\d+)*\s*", text, re.ASCII):
        return Unread("rank_unreadable")
    groups = [[int(number) for number in group.split("=")] for group in text.split(">")]
    named = [number for group in groups for number in group]
    if any(not 1 <= number <= num_responses for number in named):
        return Unread("rank_unknown_response")
    if len(set(named)) < len(named):
        return Unread("rank_repeats_response")
    if len(named) < num_responses:
        return Unread("rank_misses_response")
    rank = {number: place for place, group in enumerate(groups) for number in group}
    return tuple(rank[number] for number in range(1, num_responses + 1))


def read_ranking(reply: Mapping[str, Any], num_responses: int) -> RankVerdict | Unread:
    """Scores, ranks and critiques that agree with each other."""
    scores, critiques = reply.get("scores"), reply.get("critiques")
    if not isinstance(scores, list) or not isinstance(critiques, list):
        return Unread(WRONG_FORM)
    if not len(scores) == len(critiques) == num_responses or not all(map(_is_text, critiques)):
        return Unread(WRONG_FORM)
    if any(
        isinstance(s, bool) or not isinstance(s, int | float) or not 1 <= s <= 5 for s in scores
    ):
        return Unread("score_unreadable")
    if not isinstance(text := reply.get("rank"), str):
        return Unread("rank_unreadable")
    ranks = read_rank(text, num_responses)
    if isinstance(ranks, Unread):
        return ranks
    judged = sorted(zip(ranks, scores, strict=True))
    for (rank, score), (worse, lower) in itertools.pairwise(judged):
        if lower > score or (rank == worse and lower != score):
            return Unread("scores_contradict_rank")
    return RankVerdict(
        scores=tuple(map(float, scores)),
        ranks=ranks,
        critiques=tuple(critique.strip() for critique in critiques),
    )


def read_critique(reply: Mapping[str, Any], verdict: Quality) -> str | Unread:
    """The critique, where the judge's own verdict on the response is the one that was given."""
    critique = reply.get("critique")
    if not _is_text(critique) or reply.get("verdict") not in ("good", "bad"):
        return Unread(WRONG_FORM)
    return critique.strip() if reply["verdict"] == verdict else Unread("verdict_changed")


def _read_either(reply: Mapping[str, Any], verdicts: Mapping[str, bool]) -> bool | Unread:
    verdict = reply.get("verdict")
    return verdicts.get(verdict, Unread(WRONG_FORM)) if _is_text(verdict) else Unread(WRONG_FORM)


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return made
