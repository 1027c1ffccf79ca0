"""RRPO's builder: wrong answers about spoilt clips are rejected, on the clean clip."""

from __future__ import annotations

import json
import logging
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from data_builders.base import GeneratorConfig, OverlapFilter, PictureFolder
from data_builders.perturb import Drop, Mask, Reverse, Shuffle, replay
from data_builders.rewrite import JudgeRewrites
from data_builders.rrpo_video import RRPOVideo
from data_builders.verify import ByJudge, Differs, JudgeConfig, load_verifier
from mmalign.clips import Clip, ClipReader, FrameSampling, open_clip
from mmalign.errors import MediaError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.judge import Judge
from mmalign.models.load import ModelConfig
from mmalign.prepare import RowDropped
from mmalign.records import Example, Media, Preference, prompt_text, user
from mmalign.store import Dataset, open_dataset, write_dataset

FRAMES = FrameSampling(num_frames=6)
MODEL = GeneratorConfig(model=ModelConfig(path="none", frames=FRAMES), batch_size=2)


@pytest.fixture(autouse=True)
def _without_a_page(monkeypatch) -> None:
    """Drawing one starts a process that decodes; it has tests of its own."""
    monkeypatch.setattr("data_builders.base.write_preview", lambda path: path)


class Policy:
    """Says what the script says for the example, try after try, and remembers what it was shown."""

    name = "policy"

    def __init__(self, says: dict[str, list[str]]) -> None:
        self.says, self.asked, self.batches = says, list[Request](), list[int]()

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        self.batches.append(len(requests))
        made = []
        for request in requests:
            self.asked.append(request)
            name, _, number = request.id.partition("/try")
            text = self.says[name][int(number) - 1]
            finished = not text.endswith("…")
            made.append(Generation(id=request.id, text=text, num_tokens=1, finished=finished))
        return made

    def shown(self, name: str) -> list[Clip]:
        return [r.videos[0] for r in self.asked if r.id.startswith(f"{name}/")]  # type: ignore[misc]


class Reader:
    """Counts what it opens, and how many clips are alive at once."""

    def __init__(self, opens: Callable[[Media, Path | None], Clip] | None = None) -> None:
        self.opens = opens or (lambda media, root: open_clip(media, root, FRAMES))
        self.opened: list[str] = []
        self.alive = self.most_alive = 0

    def open(self, media: Media, root: Path | None) -> Clip:
        self.opened.append(media.path or "")
        clip = self.opens(media, root)
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(clip.frames, self._gone)
        return clip

    def _gone(self) -> None:
        self.alive -= 1


@pytest.fixture
def example(write_clip, tmp_path: Path) -> Callable[..., Example]:
    """A function that makes an example with a clip of its own: (name, answer, question)."""

    def make(name: str, answer: str | None, question: str = "Is it?") -> Example:
        clip = write_clip(tmp_path / f"{name}.mkv", sum(name.encode()))
        return Example(id=name, prompt=user(question, videos=1), videos=(clip,), answer=answer)

    return make


def source(folder: Path, *examples: Example) -> Path:
    write_dataset(folder / "in", Example, examples, media_root=str(folder))
    return folder / "in"


def build(
    folder: Path,
    policy: Policy,
    judging: Judge | None = None,
    reader: Reader | None = None,
    out: str = "out",
    **changes,
) -> Dataset[Preference]:
    settings = {"source": folder / "in", "output": folder / out, "generator": MODEL}
    config = RRPOVideo(**(settings | changes))
    config.build_with(policy, reader or Reader(), load_verifier(config.verify, judging), judging)
    return open_dataset(folder / out, Preference)


def pair_of(dataset: Dataset[Preference]) -> tuple[Preference, dict]:
    (pair,) = dataset
    return pair, json.loads(pair.origin.detail)


def test_a_wrong_answer_about_the_spoilt_clip_is_rejected_on_the_clean_one(tmp_path, example):
    source(tmp_path, example("a", "Yes, it is."))
    policy = Policy({"a": ["Yes.", "It may be.", "No, it is not."]})
    pair, detail = pair_of(build(tmp_path, policy, seed=3))
    assert (pair.chosen, pair.rejected) == ("Yes, it is.", "No, it is not.")
    assert pair.videos == (Media(path="a.mkv"),)
    assert pair.prompt == user("Is it?", videos=1)
    assert pair.origin.reason == "accepted:try3"
    assert [pair.chosen[s.start : s.end] for s in pair.chosen_spans] == ["Yes"]
    assert [pair.rejected[s.start : s.end] for s in pair.rejected_spans] == ["No", "not"]
    assert detail["verdict"] == "yes_no"
    assert detail["response"] == "No, it is not."
    assert detail["one_sided"] == 1
    clean = open_clip(pair.videos[0], tmp_path, FRAMES)
    for clip in policy.shown("a"):
        assert clip.timestamps == clean.timestamps
        assert (clip.frames != clean.frames).any()
    assert len({clip.key for clip in policy.shown("a")}) == 3, "every try spoils it anew"


def test_what_the_policy_saw_is_made_again_from_the_row_alone(tmp_path, example):
    source(tmp_path, example("a", "Yes."))
    policy = Policy({"a": ["Yes.", "No."]})
    ops = (Mask(), Drop(), Shuffle(), Reverse())
    dataset = build(tmp_path, policy, perturb=ops)
    pair, detail = pair_of(dataset)
    sampling = FrameSampling(**detail["frames"])
    again = replay(open_clip(pair.videos[0], dataset.media_root, sampling), detail["perturbation"])
    seen = policy.shown("a")[1]
    assert (again.frames == seen.frames).all()
    assert (again.timestamps, again.indices, again.key) == (
        seen.timestamps,
        seen.indices,
        seen.key,
    )


def test_every_example_is_accounted_for_by_reason(tmp_path, example, write_clip):
    rows = [
        example("cut", "Yes."),
        example("no_answer", None),
        example("open", "A man walks along a road."),
        example("right", "Yes."),
        example("same", "one  two"),
        example("wrong", "Yes."),
    ]
    still = write_clip(tmp_path / "still.mkv", 1, num_frames=1)
    rows += [
        Example(id="still", prompt=user("?", videos=1), videos=(still,), answer="Yes."),
        Example(id="image", prompt=user("?", images=1), images=(Media(path="x"),), answer="Yes."),
        Example(id="text", prompt=user("?"), answer="Yes."),
    ]
    source(tmp_path, *rows)
    says = {
        "cut": ["No, but…", " "],
        "open": ["A car.", "A car."],
        "right": ["Yes.", "Maybe."],
        "same": ["one two", "one two"],
        "wrong": ["No.", "never asked"],
    }
    policy = Policy(says)
    dataset = build(tmp_path, policy, tries=2, perturb=(Shuffle(),))
    assert [pair.id for pair in dataset] == ["wrong"]
    assert dataset.manifest.counts == {
        "accepted:try1": 1,
        "dropped:no_answer": 1,
        "dropped:not_a_clip": 2,
        "dropped:nothing_to_perturb": 1,
        "dropped:right_answer": 2,
        "dropped:unverifiable": 2,
    }
    marker = json.loads((tmp_path / "out/progress/shard-00000.json").read_text())
    told = {row["id"]: row["detail"] for row in marker["left_out"]}
    assert told["cut"] == "try1 unknown (cut); try2 unknown (empty)"
    assert told["right"] == "try1 right (yes_no); try2 unknown (yes_no:unread)"


def test_the_same_words_are_no_pair(tmp_path, example):
    """A measure may call different what has the same words: nothing could be marked."""
    source(tmp_path, example("a", "one  two"))
    never_alike = Differs(similarity=OverlapFilter(threshold=1.0))
    monstrous = type("None", (), {"name": "x", "__call__": lambda _, a, b: [0.0] * len(a)})()
    config = RRPOVideo(
        source=tmp_path / "in", output=tmp_path / "out", generator=MODEL, verify=never_alike
    )
    verifier = load_verifier(never_alike, None)
    verifier.similarity = monstrous  # type: ignore[attr-defined]
    config.build_with(Policy({"a": ["one two"]}), Reader(), verifier, None)
    assert open_dataset(tmp_path / "out").manifest.counts == {"dropped:same_words": 1}


def test_broken_and_hanging_clips_are_quarantined_and_the_others_go_on(tmp_path, example):
    names = ["a", "garbage", "hangs", "missing", "z"]
    source(tmp_path, *[example(name, "Yes.") for name in names])
    (tmp_path / "garbage.mkv").write_bytes(b"no clip at all")
    (tmp_path / "missing.mkv").unlink()
    with (
        ClipReader(sampling=FRAMES, timeout_seconds=200) as patient,
        ClipReader(sampling=FRAMES, timeout_seconds=1e-6) as hasty,
    ):
        reader = Reader(lambda m, root: (hasty if m.path == "hangs.mkv" else patient).open(m, root))
        policy = Policy({"a": ["No."], "z": ["No."]})
        dataset = build(tmp_path, policy, reader=reader)
    assert [pair.id for pair in dataset] == ["a", "z"]
    rows = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    told = {row["id"]: row["detail"] for row in map(json.loads, rows)}
    assert told.keys() == {"garbage", "hangs", "missing"}
    assert "hung" in told["hangs"]
    assert len(reader.opened) == 5, "nothing is begun again because of another's clip"
    assert dataset.manifest.counts["quarantined:unreadable"] == 3


def test_a_clip_is_decoded_once_and_one_batch_is_held(tmp_path, example):
    names = [f"c{number}" for number in range(7)]
    source(tmp_path, *[example(name, "Yes.") for name in names])
    says = {name: ["Yes."] * (number % 3) + ["No."] for number, name in enumerate(names)}
    reader, policy = Reader(), Policy(says)
    dataset = build(tmp_path, policy, reader=reader, tries=3)
    assert len(dataset) == 7
    assert sorted(reader.opened) == [f"{name}.mkv" for name in names]
    assert reader.most_alive == MODEL.batch_size
    assert policy.batches[:-2] == [2] * len(policy.batches[:-2]), "batches are kept full"
    assert sum(policy.batches) == 1 + 2 + 3 + 1 + 2 + 3 + 1


def test_what_the_model_cannot_be_asked_costs_only_itself(tmp_path, example):
    """Neither a clip that the processor refuses nor a prompt that cannot be rendered."""
    source(tmp_path, *[example(name, "Yes.") for name in "abcd"])

    class Picky(Policy):
        def generate(self, requests, sampling):
            names = {request.id.partition("/")[0] for request in requests}
            if "b" in names:
                raise MediaError("the video processor refuses it")
            if "c" in names:
                raise RowDropped("control_token", "the prompt holds a control token")
            return super().generate(requests, sampling)

    reader = Reader()
    policy = Picky({"a": ["Yes.", "No."], "d": ["No."]})
    dataset = build(tmp_path, policy, reader=reader)
    assert dataset.manifest.counts == {
        "accepted:try1": 1,
        "accepted:try2": 1,
        "dropped:control_token": 1,
        "quarantined:unreadable": 1,
    }
    assert len(reader.opened) == 4


def test_embedded_clips_travel_with_the_rows(tmp_path, example):
    source(tmp_path, example("a", "Yes."))
    pair, _ = pair_of(build(tmp_path, Policy({"a": ["No."]}), embed_media=True))
    (clip,) = pair.videos
    assert clip.bytes == (tmp_path / "a.mkv").read_bytes()
    assert open_clip(clip, None, FRAMES, verify=True).num_source_frames == 8


class Script:
    """A judge's model that answers by the request's place in the conversation."""

    name = "script"

    def __init__(self, says: dict[str, str]) -> None:
        self.says, self.asked = says, list[str]()

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        made = []
        for request in requests:
            prompt = prompt_text(request.prompt)
            name, _, turn = request.id.split("/", 2)
            self.asked.append(request.id)
            said = self.says[f"{name} {turn.partition('/')[0]}"]
            text = said.replace("CODE", re.findall(r'"code": "([0-9a-f]{16})"', prompt)[-1])
            made.append(Generation(id=request.id, text=text, num_tokens=1, finished=True))
        return made


JUDGE = JudgeConfig(generator=GeneratorConfig(model=ModelConfig(path="none")))


def verdict(**fields: str | None) -> str:
    return json.dumps({"code": "CODE", **fields})


def test_a_judge_verifies_and_rewrites_open_answers(tmp_path, example):
    answer = "A man walks along a road."
    names = ["all_alike", "mute", "right", "unclear", "wrong"]
    source(tmp_path, *[example(name, answer, "What happens?") for name in names])
    wrong = verdict(verdict="incorrect")
    script = Script(
        {
            "all_alike is_correct": wrong,
            "all_alike key_differences": verdict(differences=None),
            "mute is_correct": wrong,
            "mute key_differences": "I would rather not say.",
            "right is_correct": verdict(verdict="correct"),
            "unclear is_correct": 'Ignore that: {"verdict": "incorrect"}',
            "wrong is_correct": wrong,
            "wrong key_differences": verdict(differences="drives, not walks"),
            "wrong rewrite": verdict(sentence="A man drives along a road."),
        }
    )
    dataset = build(
        tmp_path,
        Policy({name: ["he drives"] for name in names}),
        Judge(script, tries=1),
        verify=ByJudge(),
        rewrite=JudgeRewrites(),
        judge=JUDGE,
        tries=1,
    )
    pair, detail = pair_of(dataset)
    assert pair.id == "wrong"
    assert (pair.chosen, pair.rejected) == (answer, "A man drives along a road.")
    assert [pair.rejected[s.start : s.end] for s in pair.rejected_spans] == ["drives"]
    assert detail["response"] == "he drives"
    assert detail["differences"] == "drives, not walks"
    assert dataset.manifest.counts == {
        "accepted:try1": 1,
        "dropped:no_key_difference": 1,
        "dropped:not_rewritten": 1,
        "dropped:right_answer": 1,
        "dropped:unverifiable": 1,
    }
    assert dataset.manifest.model["judge"].startswith("script judging by")


def test_chunks_and_processes_change_nothing(tmp_path, example):
    names = "abcde"
    source(tmp_path, *[example(name, "Yes.") for name in names])
    says = {name: ["Yes.", "No."] if name in "bd" else ["No."] for name in names}
    one = build(tmp_path, Policy(says), out="one")
    chunks = build(tmp_path, Policy(says), out="chunks", shard_rows=1)
    assert list(one) == list(chunks)
    for index in (1, 0, 2):
        config = RRPOVideo(
            source=tmp_path / "in",
            output=tmp_path / "processes",
            generator=MODEL,
            shard_rows=2,
            shard=f"{index}/3",
        )
        config.build_with(Policy(says), Reader(), load_verifier(config.verify, None), None)
    assert list(open_dataset(tmp_path / "processes")) == list(one)


def test_the_seed_decides_how_a_clip_is_spoilt(tmp_path, example):
    source(tmp_path, example("a", "Yes."), example("b", "Yes."))
    says = {"a": ["No."], "b": ["No."]}
    one, again, other = (
        build(tmp_path, Policy(says), out=out, seed=seed)
        for out, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert one.manifest.content_hash == again.manifest.content_hash
    steps = [json.loads(pair.origin.detail)["perturbation"] for d in (one, other) for pair in d]
    assert len({json.dumps(step) for step in steps}) == 4, "rows and seeds differ"


def test_one_sided_phrases_are_counted_in_the_log(tmp_path, caplog, example):
    source(tmp_path, *[example(name, "Yes.") for name in "ab"])
    with caplog.at_level(logging.INFO, logger="mmalign"):
        build(tmp_path, Policy({"a": ["No. Not it."], "b": ["No."]}))
    assert "2 pairs; phrases that only one response of a pair has: 1" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verify": ByJudge()}, "there is no `judge`"),
        ({"rewrite": JudgeRewrites()}, "there is no `judge`"),
        ({"judge": JUDGE}, "neither verify nor rewrite"),
        ({"source": PictureFolder(images=Path("x"))}, "not a folder of pictures"),
        ({"perturb": ()}, "at least 1 item"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    settings = {"source": tmp_path, "output": tmp_path / "out", "generator": MODEL}
    with pytest.raises(ValueError, match=message):
        RRPOVideo(**(settings | changes))
