"""`mmalign data`, run as a user runs it: output, exit codes, files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign import cli
from mmalign.records import (
    Example,
    ImagePreference,
    Media,
    Origin,
    Preference,
    RankedResponse,
    Ranking,
    Verifiable,
    user,
)
from mmalign.store import MANIFEST, open_dataset, read_manifest, write_dataset, write_shard

Run = Any


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mmalign data …`; returns the exit code and everything printed."""
    verb = EntryPoint("data", "data_builders.data_cli:app", cli.GROUP)
    monkeypatch.setattr(cli, "verbs", lambda: {"data": verb})

    def call(*arguments: object) -> tuple[int, str]:
        code = cli.run(["data", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (32, 24), colour).save(folder / f"{name}.png")
    return folder


def pair(id: str, image: str = "a.png", **changes: Any) -> Preference:
    start = Preference(
        id=id,
        prompt=user("Is it red?", images=1),
        images=(Media(path=image),),
        chosen="Yes, it is red.",
        rejected="No.",
        origin=Origin(builder="test", version="1", source="s", reason="accepted"),
    )
    return replace(start, **changes)


def dataset(path: Path, media: Path, *records: Any) -> Path:
    write_dataset(path, type(records[0]), records, media_root=str(media))
    return path


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def row(id: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": id,
        "prompt": "Red?",
        "chosen": "Yes",
        "rejected": "No",
        "images": ["a.png"],
    } | changes


# --- the verb itself ------------------------------------------------------------------------


def test_the_module_imports_nothing_heavy() -> None:
    program = (
        "import sys, data_builders.data_cli;"
        "print([m for m in ('torch', 'pyarrow', 'PIL', 'numpy', 'jinja2') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["validate", "stats", "preview"])
def test_what_is_no_dataset_is_refused_in_a_sentence(
    run: Run, tmp_path: Path, command: str
) -> None:
    assert run(command, tmp_path / "absent") == (
        2,
        f"error: {tmp_path / 'absent'}: no such dataset. Build it, or correct the path.\n",
    )
    code, text = run(command, tmp_path)
    assert (code, "no manifest.json" in text) == (2, True)


# --- validate -------------------------------------------------------------------------------


def test_a_clean_dataset_validates(run: Run, tmp_path: Path, media: Path) -> None:
    path = dataset(
        tmp_path / "d", media, pair("1"), pair("2", contrast_images=(Media(path="b.png"),))
    )
    assert run("validate", path) == (0, f"{path}: 2 preference records, no problems\n")


def test_every_problem_is_told_with_row_id_column_and_what_to_do(
    run: Run, tmp_path: Path, media: Path
) -> None:
    (media / "empty.png").write_bytes(b"")
    records = [
        pair("1"),
        pair("2", chosen=""),
        pair("3", image="gone.png"),
        pair("4", image="../photos.txt"),
        pair("5", contrast_images=(Media(path="empty.png"),)),
        pair("6", images=(Media(path="a.png", sha256="0" * 64),)),
        pair("7", videos=(Media(path="gone.mp4"),)),
    ]
    code, text = run("validate", dataset(tmp_path / "d", media, *records))
    printed = text.splitlines()
    assert code == 1
    assert printed[0] == "row 1 (id 2): chosen is empty; drop the row"
    assert printed[1].startswith("row 2 (id 3): images gone.png cannot be read (No such file")
    assert printed[2].startswith("row 3 (id 4): images ../photos.txt climbs out of the media root")
    assert printed[3].startswith("row 4 (id 5): contrast_images empty.png is empty; replace it")
    assert printed[4].startswith("row 5 (id 6): images a.png has changed since")
    assert printed[5].startswith("row 6 (id 7): videos has 1 files for 0 places")
    assert printed[6].startswith("row 6 (id 7): videos gone.mp4 is missing")
    assert printed[7] == f"{tmp_path / 'd'}: 7 problems in 6 of 7 rows"


def test_an_answer_that_its_own_verifier_cannot_read_is_found(
    run: Run, tmp_path: Path, media: Path
) -> None:
    rows = [
        Verifiable(id=verifier + answer, prompt=user("q"), answer=answer, verifier=verifier)
        for verifier, answer in (("number", "12"), ("number", "many"), ("maths", "12"))
    ]
    code, text = run("validate", dataset(tmp_path / "d", media, *rows))
    assert code == 1
    assert "row 1 (id numbermany): answer cannot be checked: the answer 'many'" in text
    assert "row 2 (id maths12): verifier cannot be checked: no verifier is called 'maths'" in text
    assert "2 problems in 2 of 3 rows" in text


def test_pictures_are_left_alone_on_request(run: Run, tmp_path: Path, media: Path) -> None:
    path = dataset(tmp_path / "d", media, pair("1", image="gone.png"))
    assert run("validate", path)[0] == 1
    assert run("validate", path, "--skip-media")[0] == 0


def test_no_more_problems_are_printed_than_asked_for(run: Run, tmp_path: Path, media: Path) -> None:
    path = dataset(tmp_path / "d", media, *(pair(str(i), chosen="") for i in range(5)))
    code, text = run("validate", path, "--max-problems", 2)
    assert code == 1
    assert text.count("chosen is empty") == 2
    assert "… and 3 more; --max-problems shows them" in text
    assert "5 problems in 5 of 5 rows" in text


def test_an_id_in_two_shards_is_found(run: Run, tmp_path: Path, media: Path) -> None:
    path = dataset(tmp_path / "d", media, pair("1"), pair("2"))
    write_shard(path / "shard-00001.parquet", Preference, [pair("1")])
    data = json.loads((path / MANIFEST).read_text())
    data |= {"num_records": 3, "shards": [*data["shards"], "shard-00001.parquet"]}
    (path / MANIFEST).write_text(json.dumps(data))
    code, text = run("validate", path)
    assert code == 1
    assert "row 2 (id 1): id is that of row 0 too; give every row an id of its own" in text
    assert "content_hash is not that of the shards" in text


def test_a_row_that_is_no_record_does_not_stop_the_rest(
    run: Run, tmp_path: Path, media: Path
) -> None:
    path = dataset(tmp_path / "d", media, pair("1"), pair("2", chosen=""))
    shard = path / "shard-00000.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.set_column(0, "id", pa.array([None, "2"])), shard)
    code, text = run("validate", path)
    assert code == 1
    assert "column id is null" in text
    assert "row 1 (id 2): chosen is empty" in text


def test_a_missing_column_makes_a_dataset_unusable(run: Run, tmp_path: Path, media: Path) -> None:
    path = dataset(tmp_path / "d", media, pair("1"))
    shard = path / "shard-00000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["rejected"]), shard)
    code, text = run("validate", path)
    assert (code, "column rejected is missing" in text) == (2, True)


# --- stats ----------------------------------------------------------------------------------


def test_stats_by_hand(run: Run, tmp_path: Path, media: Path) -> None:
    """Words: chosen 1, 3, 2, 2; rejected 2, 1, 2, 2. So mean 2 against 1.75, gaps -1, 2, 0, 0."""
    records = [
        pair("1", chosen="Yes", rejected="not so"),
        pair("2", image="b.png", chosen="No it isn't.", rejected="yes"),
        pair("3", image="gone.png", chosen="a cat", rejected="a dog"),
        pair("4", chosen="Yes, so", rejected="Yes, so", origin=Origin()),
    ]
    code, text = run("stats", dataset(tmp_path / "d", media, *records), "--json")
    numbers = json.loads(text)
    assert code == 0
    assert (numbers["kind"], numbers["num_records"]) == ("preference", 4)
    words = numbers["lengths"]["chosen"]["words"]
    assert (words["mean"], words["median"]) == (2.0, 2.0)
    assert words["p95"] == pytest.approx(2.85)  # 0.85 of the way from 2 to 3
    assert numbers["lengths"]["rejected"]["words"]["mean"] == 1.75
    assert numbers["lengths"]["rejected"]["characters"]["mean"] == (6 + 3 + 5 + 7) / 4
    assert numbers["length_bias"] == {
        "share_chosen_longer": 0.25,
        "share_rejected_longer": 0.25,
        "mean_difference_words": 0.25,
    }
    assert numbers["duplicates"] == {"same_prompt_and_media": 1, "chosen_is_rejected": 1}
    assert numbers["yes_no"] == {"yes": 2, "no": 1, "other": 1}
    assert numbers["missing_media"] == ["gone.png"]
    assert numbers["reasons"] == {"accepted": 3, "none given": 1}


def test_reasons_are_in_the_order_of_their_numbers(run: Run, tmp_path: Path, media: Path) -> None:
    reasons = ["accepted:rank10", "quarantined", "accepted:rank2", "accepted:rank10"]
    records = [pair(str(i), origin=Origin(reason=reason)) for i, reason in enumerate(reasons)]
    path = dataset(tmp_path / "d", media, *records)
    in_order = ["accepted:rank2", "accepted:rank10", "quarantined"]
    assert list(json.loads(run("stats", path, "--json")[1])["reasons"]) == in_order
    assert [line.split()[-1] for line in run("stats", path)[1].splitlines()[-3:]] == in_order


def test_stats_read_as_text(run: Run, tmp_path: Path, media: Path) -> None:
    code, text = run(
        "stats", dataset(tmp_path / "d", media, pair("1"), pair("2", image="gone.png"))
    )
    assert code == 0
    assert "2 preference records" in text
    assert "chosen has more words than rejected in 100.0% of pairs" in text
    assert "yes/no answers: 2 yes, 0 no (100.0% yes)" in text
    assert "media files missing: 1 (gone.png)" in text
    assert "2  accepted" in text


@pytest.mark.parametrize(
    "record",
    [
        Example(id="1", prompt=user("q")),
        Ranking(
            id="1",
            prompt=user("q"),
            responses=(RankedResponse(text="x", rank=0), RankedResponse(text="y", rank=1)),
        ),
        ImagePreference(
            id="1", prompt="a cat", chosen=Media(path="a.png"), rejected=Media(path="b.png")
        ),
        Verifiable(id="1", prompt=user("q"), answer="12", verifier="number"),
    ],
    ids=lambda record: type(record).__name__,
)
def test_every_command_takes_every_kind(run: Run, tmp_path: Path, media: Path, record: Any) -> None:
    path = dataset(tmp_path / "d", media, record)
    for command in ("validate", "stats", "preview"):
        assert run(command, path)[0] == 0


def test_an_empty_dataset_has_stats_and_a_preview(run: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", Preference, [])
    assert run("stats", tmp_path / "d")[0] == 0
    assert run("preview", tmp_path / "d")[0] == 0


# --- preview --------------------------------------------------------------------------------


def test_a_preview_shows_pictures_texts_and_origins(run: Run, tmp_path: Path, media: Path) -> None:
    records = [
        pair("1", contrast_images=(Media(path="b.png"),)),
        pair("2", image="gone.png", rejected="<script>alert(1)</script>"),
    ]
    path, out = dataset(tmp_path / "d", media, *records), tmp_path / "p.html"
    assert run("preview", path, "--out", out) == (0, f"{out}\n")
    html = out.read_text()
    assert html.count('src="data:image/') == 2
    assert "pictures, in order: images, contrast_images" in html
    assert "gone.png: cannot be read" in html
    assert "test 1, s, accepted" in html
    assert "<script>" not in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_a_preview_spreads_over_the_dataset(run: Run, tmp_path: Path, media: Path) -> None:
    path = dataset(tmp_path / "d", media, *(pair(f"id-{i}-") for i in range(10)))
    run("preview", path, "--limit", 2)
    html = (path / "preview.html").read_text()
    assert [f"id-{i}-" in html for i in (0, 5, 9)] == [True, True, False]


def test_a_preview_shows_what_the_model_sees(
    run: Run, tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.errors import ModelError
    from mmalign.models import load

    @dataclass
    class Condition:
        text: str
        prompt_ids: list[int]
        num_image_tokens: int
        num_media_tokens: int

    class Preparer:
        def condition(
            self, prompt: Any, images: Any, root: Any, *, videos: Any, id: str
        ) -> Condition:
            if id == "2":
                raise ModelError("no such thing")
            if id == "3":
                return Condition("USER: <video> Is it red?", [1, 2, 3], 0, 2)
            return Condition("USER: <image> Is it red?", [1, 2, 3], 2, 2)

    monkeypatch.setattr(load, "load_processor", lambda path: Preparer())
    path = dataset(tmp_path / "d", media, pair("1"), pair("2"), pair("3"))
    assert run("preview", path, "--processor", "some/model")[0] == 0
    html = (path / "preview.html").read_text()
    assert "USER: &lt;image&gt; Is it red?" in html
    assert "3, of which 2 are image tokens" in html
    assert "3, of which 2 are image and video tokens" in html
    assert "it cannot: no such thing" in html


# --- convert --------------------------------------------------------------------------------


def test_good_rows_are_imported_and_every_bad_one_is_written_down(
    run: Run, tmp_path: Path, media: Path
) -> None:
    (media / "broken.png").write_bytes((media / "a.png").read_bytes()[:40])
    source = lines(
        tmp_path / "pairs.jsonl",
        row("1"),
        "{malformed",
        {"id": "2", "prompt": "Red?", "chosen": "Yes"},
        row("3", chosen=" "),
        row("4", images=["gone.png"]),
        row("5", images=["broken.png"]),
        row("1", chosen="again"),
        row("6", chosen="same", rejected="same"),
        row("7", images=["../secret.png"]),
        row("8", chosen="half \ud83d"),
        row("9", images=[]),
    )
    out = tmp_path / "out"
    code, text = run("convert", source, out, "--from", "trl", "--images-root", media)
    assert code == 0
    assert f"{out}: 2 preference records" in text
    assert "9 rows left out (1 duplicate_id, 1 empty_text, 1 invalid_record," in text
    assert [record.id for record in open_dataset(out)] == ["1", "9"]
    told = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["where"], entry["reason"]) for entry in told] == [
        ("pairs.jsonl line 2", "malformed_json"),
        ("pairs.jsonl line 3", "missing_column"),
        ("pairs.jsonl line 4", "empty_text"),
        ("pairs.jsonl line 5", "unreadable_media"),
        ("pairs.jsonl line 6", "unreadable_media"),
        ("pairs.jsonl line 7", "duplicate_id"),
        ("pairs.jsonl line 8", "invalid_record"),
        ("pairs.jsonl line 9", "unreadable_media"),
        ("pairs.jsonl line 10", "not_unicode"),
    ]
    assert all(entry["detail"] for entry in told)
    assert read_manifest(out).counts == {
        "imported": 2,
        "quarantined:malformed_json": 1,
        "quarantined:missing_column": 1,
        "quarantined:empty_text": 1,
        "quarantined:unreadable_media": 3,
        "quarantined:duplicate_id": 1,
        "quarantined:invalid_record": 1,
        "quarantined:not_unicode": 1,
    }
    assert run("validate", out)[0] == 0


def test_media_stay_where_they_are_unless_embedded(run: Run, tmp_path: Path, media: Path) -> None:
    source = lines(media / "pairs.jsonl", row("1"))
    assert run("convert", source, tmp_path / "by_path", "--from", "trl")[0] == 0
    options = ("--from", "trl", "--embed-media")
    assert run("convert", source, tmp_path / "embedded", *options)[0] == 0
    by_path, embedded = open_dataset(tmp_path / "by_path"), open_dataset(tmp_path / "embedded")
    assert by_path.manifest.media_root == str(media.resolve())
    assert by_path[0].images[0].bytes is None
    assert embedded[0].images[0].bytes == (media / "a.png").read_bytes()
    assert embedded[0].images[0].sha256 == by_path[0].images[0].sha256
    (media / "a.png").unlink()
    assert run("validate", tmp_path / "embedded")[0] == 0
    assert run("validate", tmp_path / "by_path")[0] == 1


@pytest.mark.parametrize(
    ("format", "content", "kind"),
    [
        (
            "llava",
            {
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat?"},
                    {"from": "gpt", "value": "Red."},
                ],
            },
            "example",
        ),
        (
            "realign",
            {
                "image": "a.png",
                "retrieved_image": "b.png",
                "chosen": [
                    {"role": "user", "content": "<image>What?"},
                    {"role": "assistant", "content": "Red."},
                ],
                "rejected": [
                    {"role": "user", "content": "<image>What?"},
                    {"role": "assistant", "content": "Blue."},
                ],
            },
            "preference",
        ),
        (
            "rlaif_v",
            {"question": "What?", "chosen": "Red.", "rejected": "Blue.", "image": "a.png"},
            "preference",
        ),
    ],
)
def test_every_format_makes_a_dataset_that_validates(
    run: Run, tmp_path: Path, media: Path, format: str, content: Any, kind: str
) -> None:
    source = media / "source.json"
    source.write_text(json.dumps([content]))
    assert run("convert", source, tmp_path / "out", "--from", format)[0] == 0
    assert read_manifest(tmp_path / "out").kind == kind
    assert run("validate", tmp_path / "out")[0] == 0
    assert all(image.sha256 for image in open_dataset(tmp_path / "out")[0].images)


def test_a_source_without_one_good_row_is_refused(run: Run, tmp_path: Path) -> None:
    source = lines(tmp_path / "pairs.jsonl", {"prompt": "q"}, "{")
    code, text = run("convert", source, tmp_path / "out", "--from", "trl")
    assert code == 2
    assert "has no usable row among 2; got 1 malformed_json, 1 missing_column" in text
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert (tmp_path / "out" / "quarantine.jsonl").read_text().count("\n") == 2


def test_a_dataset_is_not_overwritten(run: Run, tmp_path: Path, media: Path) -> None:
    path = dataset(tmp_path / "d", media, pair("1"))
    source = lines(media / "pairs.jsonl", row("2"))
    code, text = run("convert", source, path, "--from", "trl")
    assert (code, "is a dataset already" in text) == (2, True)
    assert [record.id for record in open_dataset(path)] == ["1"]


def test_wrong_arguments_are_told_in_a_sentence(run: Run, tmp_path: Path) -> None:
    code, text = run("convert", tmp_path / "absent", tmp_path / "out", "--from", "trl")
    assert (code, "no such file or folder" in text) == (2, True)
    code, text = run("convert", tmp_path, tmp_path / "out", "--from", "tlr")
    assert (code, "'trl'" in text) == (2, True)
