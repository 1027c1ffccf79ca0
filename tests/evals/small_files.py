"""Every benchmark's files in their released form, with a question or two, and its settings."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Settings = dict[str, Any]
TEN = [{"answer": text, "answer_confidence": "yes"} for text in ["red"] * 6 + ["blue"] * 4]
CHOICE = {"A": "a cat", "B": "a dog"}


def _json(file: Path, content: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return str(file)


def _lines(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def pope(root: Path) -> Settings:
    rows = [
        {"question_id": n, "image": "a.jpg", "text": f"Is there {n}?", "label": label}
        for n, label in enumerate(("yes", "no"))
    ]
    return {"split": "random", "questions": _lines(root / "q.jsonl", *rows), "images": root}


def chair(root: Path) -> Settings:
    (root / "synonyms.txt").write_text("dog, puppy\ncat\n")
    rows = {"image": "a.jpg", "objects": ["dog"]}, {"image": "b.jpg", "objects": ["cat"]}
    objects = _lines(root / "objects.jsonl", *rows)
    return {"objects": objects, "images": root, "synonyms": root / "synonyms.txt"}


def amber(root: Path) -> Settings:
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["dog"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 3, "type": "discriminative-relation", "truth": "yes"},
    ]
    queries = [{"id": n, "image": f"{n}.jpg", "query": f"Question {n}?"} for n in (1, 2, 3)]
    (root / "safe.txt").write_text("light\n")
    return {
        "images": root,
        "queries": [_json(root / "queries.json", queries)],
        "annotations": _json(root / "annotations.json", annotations),
        "relations": _json(root / "relations.json", {"sky": [], "dog": ["puppy"]}),
        "safe_words": root / "safe.txt",
    }


def object_halbench(root: Path) -> Settings:
    boxes = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": 7, "category_id": 1}],
    }
    captions = {"annotations": [{"image_id": 7, "caption": "A puppy."}]}
    row = {"image_id": 7, "question": "Describe it.", "image": "7.jpg"}
    return {
        "data": _lines(root / "q.jsonl", row),
        "images": root,
        "instances": [_json(root / "boxes.json", boxes)],
        "captions": [_json(root / "captions.json", captions)],
        "synonyms": chair(root)["synonyms"],
    }


def hallusion_bench(root: Path) -> Settings:
    rows = [
        {
            "category": "VD",
            "subcategory": "illusion",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": str(figure),
            "question_id": "0",
            "question": "Is it?",
            "gt_answer": str(1 - figure),
            "filename": f"./{figure}.png",
        }
        for figure in (0, 1)
    ]
    return {"data": _json(root / "HallusionBench.json", rows), "images": root}


def mme(root: Path) -> Settings:
    for task in ("count", "code_reasoning"):
        (root / task).mkdir(parents=True)
        (root / task / "1.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
        (root / task / "1.png").write_bytes(b"")
    return {"data": str(root)}


def mmhal(root: Path) -> Settings:
    row = {"image_src": "http://h/1.jpg", "image_content": ["Cat"], "question": "What?"}
    row |= {"question_type": "attribute", "gt_answer": "A cat."}
    return {"data": _json(root / "data.json", [row]), "images": root}


def mm_vet(root: Path) -> Settings:
    row = {"imagename": "1.jpg", "question": "What?", "answer": "a cat", "capability": ["rec"]}
    row |= {"imagesource": "web"}
    return {"data": _json(root / "mm-vet.json", {"v1_0": row}), "images": root}


def llava_bench(root: Path) -> Settings:
    ask = {"question_id": 0, "image": "1.jpg", "text": "What?", "category": "conv"}
    return {
        "questions": _lines(root / "questions.jsonl", ask),
        "context": _lines(root / "context.jsonl", {"image": "1.jpg", "caption": "A cat."}),
        "references": _lines(root / "answers.jsonl", {"question_id": 0, "text": "A cat."}),
        "images": root,
    }


def reward_bench(root: Path) -> Settings:
    row = {"id": "1", "prompt": "What?", "image": "long/1.jpg", "chosen": "a", "rejected": "b"}
    return {"data": _lines(root / "pairs.jsonl", row), "critiques": "none"}


def vl_reward_bench(root: Path) -> Settings:
    row = {"id": "RLAIF-V-1", "query": "<image>\nWhat?", "response": ["a", "b"]}
    row |= {"human_ranking": [0, 1], "image_path": "rlaif-v/1.jpg"}
    return {"data": _lines(root / "pairs.jsonl", row), "critiques": "none"}


def multimodal_reward_bench(root: Path) -> Settings:
    row = {"ID": "nocaps_1", "Category": "open_generation/correctness_task", "Text": "What?"}
    row |= {"Image": "1.jpg", "Output1": "a", "Output2": "b", "Better": "Output2"}
    return {"data": _json(root / "all_data.json", [row]), "critiques": "none"}


def safety_vlguard(root: Path) -> Settings:
    row = {"question_id": 1, "question": "Do it.", "image": "1.png", "answer": "Yes"}
    row |= {"category": "unsafe", "l2-category": "Fraud"}
    return {"task": "unsafes", "data": _lines(root / "rows.jsonl", row), "images": root}


def safety_jailbreak(root: Path) -> Settings:
    row = {"question_id": 1, "question": "Do it.", "image": "1.png", "answer": "Yes"}
    row |= {"category": "typographic-jailbreaking", "l2-category": "Fraud"}
    return {"task": "typographic", "data": _lines(root / "rows.jsonl", row), "images": root}


def video_hallucer(root: Path) -> Settings:
    pair = {
        "basic": {"video": "a.mp4", "question": "A bird?", "answer": "yes"},
        "hallucination": {"video": "a.mp4", "question": "A crow?", "answer": "no"},
    }
    _json(root / "temporal" / "temporal.json", [pair])
    return {"videos": root, "subsets": ["temporal"]}


def vidhalluc_binary(root: Path) -> Settings:
    content = {"1": [{"q": "Is it?", "a": {"a": "Yes", "b": "No"}}]}
    return {"data": _json(root / "data.json", content), "videos": root}


def vidhalluc_choice(root: Path) -> Settings:
    content = {"1": {"a": {"Question": "What?", "Choices": CHOICE, "Correct Answer": "B"}}}
    return {"data": _json(root / "data.json", content), "videos": root}


def vidhalluc_order(root: Path) -> Settings:
    content = {"1": {"video": "a", "Question": "First?", "Correct Answer": "AB"}}
    return {"data": _json(root / "data.json", content), "videos": root}


def vidhalluc_scenes(root: Path) -> Settings:
    content = {"a": {"Scene change": "Yes", "Locations": "from a room to a street."}}
    content["b"] = {"Scene change": "No", "Locations": "None"}
    measure = {"name": "token_overlap"}
    return {"data": _json(root / "sth.json", content), "videos": root, "similarity": measure}


def tempcompass(root: Path) -> Settings:
    ask = [{"question": "Is it?", "answer": "yes"}]
    _json(root / "yes_no.json", {"1": {"action": ask}})
    return {"questions": root, "tasks": ["yes_no"], "videos": root}


def tempcompass_captioning(root: Path) -> Settings:
    choice = [{"question": "What?\nA. a cat\nB. a dog", "answer": "B. a dog"}]
    _json(root / "multi-choice.json", {"1": {"action": choice}})
    ask = [{"question": "Generated Caption:", "answer": "A. a dog"}]
    _json(root / "captioning.json", {"1": {"action": ask}})
    return {"questions": root, "videos": root}


def _tasks(root: Path, first: str) -> Settings:
    row = {"video": "v.mp4", "question": "What?", "candidates": [*CHOICE.values()]}
    row |= {"answer": "a dog", "start": 2, "end": 7.5}
    from evals.benchmarks.video_choices import MLVU, MVBENCH, TVBENCH

    for task in {*TVBENCH, *MVBENCH, *MLVU}:
        _json(root / f"{task}.json", [row] if task == first else [])
    return {"data": root, "videos": root}


def longvideobench(root: Path) -> Settings:
    row = {"id": "1", "question": "What?", "candidates": [*CHOICE.values()], "correct_choice": 1}
    row |= {"duration_group": 15, "video_path": "v.mp4", "question_category": "S2E"}
    return {"data": _json(root / "val.json", [row]), "videos": root}


def videomme(root: Path) -> Settings:
    row = {"question_id": "1", "videoID": "v", "question": "What?", "answer": "B"}
    row |= {"options": ["A. a cat", "B. a dog"]}
    row |= dict.fromkeys(("duration", "domain", "task_type"), "short")
    return {"data": _lines(root / "rows.jsonl", row), "videos": root}


def vqav2(root: Path) -> Settings:
    ask = {"image_id": 7, "question": "What colour?", "question_id": 70}
    told = {"question_id": 70, "answer_type": "other", "question_type": "what", "answers": TEN}
    return {
        "questions": _json(root / "q.json", {"data_subtype": "val2014", "questions": [ask]}),
        "annotations": _json(root / "a.json", {"annotations": [told]}),
        "images": root,
    }


def textvqa(root: Path) -> Settings:
    row = {"question_id": 1, "image_id": "0a", "question": "What?"}
    row |= {"answers": [one["answer"] for one in TEN]}
    return {"data": _json(root / "val.json", {"data": [row]}), "images": root}


def vizwiz(root: Path) -> Settings:
    row = {"image": "1.jpg", "question": "What?", "answers": TEN}
    row |= {"answerable": 1, "answer_type": "other"}
    return {"data": _json(root / "val.json", [row]), "images": root}


def gqa(root: Path) -> Settings:
    row = {"imageId": "n1", "question": "What colour?", "answer": "red", "isBalanced": True}
    row |= {"types": {"structural": "query", "semantic": "attr"}}
    return {"questions": _json(root / "q.json", {"201": row}), "images": root}


def mathvista(root: Path) -> Settings:
    about = {"task": "t", "category": "c", "context": "x", "grade": "g", "skills": ["s"]}
    row = {"pid": "1", "question": "Which?", "image": "1.jpg", "choices": [*CHOICE.values()]}
    row |= {"unit": None, "precision": None, "answer": "a dog", "question_type": "multi_choice"}
    row |= {"answer_type": "text", "metadata": about | {"source": "s", "language": "english"}}
    return {"data": _json(root / "testmini.json", {"1": row}), "images": root}


def mathverse(root: Path) -> Settings:
    row = {"sample_index": "1", "problem_index": "7", "problem_version": "Text Dominant"}
    row |= {"question": "Which?\nChoices:\nA:1\nB:2", "image": "1.png", "answer": "B"}
    row |= {"question_type": "multi-choice", "metadata": {"subject": "s", "subfield": "f"}}
    row |= {"query_wo": "Which?", "query_cot": "Why?"}
    return {"data": _json(root / "testmini.json", [row]), "images": root}


def mathvision(root: Path) -> Settings:
    row = {"id": "7", "question": "How many?\n<image1>", "options": [], "answer": "6"}
    row |= {"level": 1, "subject": "counting", "image": "7.jpg"}
    return {"data": _lines(root / "test.jsonl", row), "images": root}


def science_qa(root: Path) -> Settings:
    row = {"question": "Which?", "choices": [*CHOICE.values()], "answer": 1, "hint": ""}
    row |= {"image": "image.png", "subject": "natural science", "grade": "grade2"}
    _json(root / "problems.json", {"5": row | {"lecture": "", "split": "test"}})
    _json(root / "pid_splits.json", {"test": ["5"]})
    return {"data": str(root), "images": root}


def mmbench(root: Path) -> Settings:
    row = {"index": "1", "question": "Which?", **CHOICE, "answer": "B", "category": "c"}
    row |= {"l2-category": "d", "split": "dev", "image": base64.b64encode(b"x" * 99).decode()}
    (root / "dev.tsv").write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
    return {"data": str(root / "dev.tsv")}


def mmmu(root: Path) -> Settings:
    row = {"id": "validation_Math_1", "question": "What is <image 1>?", "answer": "B"}
    row |= {"options": str([*CHOICE.values()]), "question_type": "multiple-choice"}
    row |= {"image_1": {"bytes": b"png", "path": "1.png"}}
    (root / "Math").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), root / "Math" / "validation-0.parquet")
    return {"data": str(root)}


FILES: dict[str, Callable[[Path], Settings]] = {
    "pope": pope,
    "chair": chair,
    "amber": amber,
    "object_halbench": object_halbench,
    "hallusion_bench": hallusion_bench,
    "mme": mme,
    "mmhal": mmhal,
    "mm_vet": mm_vet,
    "llava_bench": llava_bench,
    "reward_bench": reward_bench,
    "vl_reward_bench": vl_reward_bench,
    "multimodal_reward_bench": multimodal_reward_bench,
    "safety_vlguard": safety_vlguard,
    "safety_jailbreak": safety_jailbreak,
    "video_hallucer": video_hallucer,
    "vidhalluc_binary": vidhalluc_binary,
    "vidhalluc_choice": vidhalluc_choice,
    "vidhalluc_order": vidhalluc_order,
    "vidhalluc_scenes": vidhalluc_scenes,
    "tempcompass": tempcompass,
    "tempcompass_captioning": tempcompass_captioning,
    "tvbench": lambda root: _tasks(root, "action_count"),
    "mvbench": lambda root: _tasks(root, "state_change"),
    "mlvu": lambda root: _tasks(root, "4_count"),
    "longvideobench": longvideobench,
    "videomme": videomme,
    "vqav2": vqav2,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "mathvista": mathvista,
    "mathverse": mathverse,
    "mathvision": mathvision,
    "science_qa": science_qa,
    "mmbench": mmbench,
    "mmmu": mmmu,
}
