"""The same verifiable rows, asked with an instruction at the end of each prompt.

GRPO and evaluations take prompts as the rows have them, so what all stages of SPECS are to ask
alike is made once, here. Other instructions over the same rows tell whether the form is followed
where it is asked for in other words.

Launch: mmalign build configs/build/instruct_form.yaml
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.instruct import FORM, instructed
from mmalign.jobs import Outcome, run_job
from mmalign.records import Verifiable
from mmalign.store import open_dataset, read_manifest

VERSION = "1"


class Instruct(Strict):
    """Settings of the builder. A prompt that ends with the instruction already stays as it is."""

    name: Literal["instruct"] = "instruct"
    source: Path
    output: Path
    instruction: str = Field(default=FORM, min_length=1)
    limit: PositiveInt | None = None
    shard_rows: PositiveInt = 1024

    def build(self) -> Path:
        """Write the dataset; returns its directory."""
        made_from = read_manifest(self.source)
        dataset = open_dataset(self.source, Verifiable)
        run_job(
            sorted(dataset, key=lambda row: row.id)[: self.limit],
            lambda rows: [self._asked(row) for row in rows],
            self.output,
            Verifiable,
            shard_rows=self.shard_rows,
            builder=self.name,
            builder_version=VERSION,
            config=self.model_dump(mode="json", exclude={"output"}),
            model={"source": made_from.content_hash},
            media_root=str(dataset.media_root),
        )
        return self.output

    def _asked(self, row: Verifiable) -> Outcome:
        try:
            prompt = instructed(row.prompt, self.instruction)
        except DataError as error:
            return Outcome(id=row.id, reason="quarantined:bad_prompt", detail=str(error))
        if prompt == row.prompt:
            return Outcome(id=row.id, record=row, reason="accepted:as_it_was")
        return Outcome(id=row.id, record=replace(row, prompt=prompt), reason="accepted")
