"""Groups of responses to one prompt: how they are asked for, counted and written out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.generate.base import Generation, Request, request_for
from mmalign.records import Verifiable
from mmalign.rewards import Rollout, Scored
from mmalign.store import write_atomically


def group_requests(
    record: Verifiable, name: str, size: int, media_root: Path | None
) -> list[Request]:
    """`size` requests for one prompt. Each draws its noise from (seed, `name`, its number)."""
    return [request_for(record, id=f"{name}/{turn}", media_root=media_root) for turn in range(size)]


def rollouts_of(record: Verifiable, replies: Sequence[Generation]) -> list[Rollout]:
    """The responses as rewards read them."""
    return [
        Rollout(
            id=str(turn),
            row=record,
            text=reply.text,
            num_tokens=len(reply.token_ids),
            finished=reply.finished,
        )
        for turn, reply in enumerate(replies)
    ]


def reply_counts(replies: Sequence[Generation]) -> dict[str, float]:
    """Sums over a group's responses, for the log."""
    return {
        "response_tokens": float(sum(len(reply.token_ids) for reply in replies)),
        "finished": float(sum(reply.finished for reply in replies)),
    }


def reward_counts(scored: Sequence[Scored]) -> dict[str, float]:
    """Sums over a group's rewards, for the log: the whole, each part, and what is undecided."""
    counts = {
        "reward": float(sum(one.total for one in scored)),
        "undecided": float(sum(one.undecided for one in scored)),
    }
    for name in scored[0].parts:
        counts[f"reward/{name}"] = float(sum(one.parts[name] for one in scored))
    return counts


def write_lines(folder: Path, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write responses sampled for step `step`, counted from 1, to be read by people."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(folder / f"step-{step:06d}.jsonl", text)
