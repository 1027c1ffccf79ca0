"""The reference's scores of a dataset, and the features of its pictures where the recipe stores
them, made ahead of training, to be read by every run after it.

`accelerate launch -m trainers.precompute RECIPE [key=value]... [--fresh]` spreads the work of
`mmalign precompute` over many processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mmalign.cli import run as command
from mmalign.config import validate
from mmalign.errors import ConfigError
from mmalign.log import is_main_process
from mmalign.losses.base import Need
from mmalign.store import open_dataset
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.feature_key import features_folder
from trainers.feature_store import FeatureStore
from trainers.keyed_folder import KeyedFolder
from trainers.objectives.base import check_dataset
from trainers.reference_key import cache_folder
from trainers.reference_store import ReferenceCache
from trainers.setup import set_up


def precompute(recipe: Recipe, *, fresh: bool = False) -> Path:
    """Fill the recipe's reference cache and its store of features.

    Returns the folder of the scores, or that of the features for a loss without a reference.

    This is a training run with reference=cached that stops before its first step, in a folder of
    its own, so that model, rows and batches are those of training and `run.output` is not touched.
    fresh: delete what is stored for this model and these candidates, and its features, first.
    Raises ConfigError where the loss has no use for stored scores, and what `train` raises.
    """
    compares = Need.REFERENCE in recipe.loss.needs
    if not compares and recipe.features is None:
        raise ConfigError(
            f"loss {recipe.loss.name!r} compares with no reference: there is nothing to store"
        )
    dataset = open_dataset(recipe.data.path)
    check_dataset(dataset, recipe.loss)
    with TemporaryDirectory(prefix="mmalign-precompute-") as scratch:
        values = recipe.model_dump(mode="json")
        values |= {"reference": "cached", "run": values["run"] | {"output": scratch}}
        cached = validate(values, Recipe, "mmalign precompute")
        stores: list[KeyedFolder] = []
        if compares:
            stores.append(ReferenceCache(cache_folder(cached), key={}, about={}))
        if cached.features is not None:
            stores.append(FeatureStore(features_folder(cached), key={}, about={}))
        if fresh and is_main_process():
            # Before the first exchange between processes, and so before any of them reads.
            for store in stores:
                store.clear()
        run = RunDirectory(cached)
        try:
            set_up(cached, dataset, run)
        finally:
            run.release()
    return stores[0].folder


if __name__ == "__main__":
    sys.exit(command(["precompute", *sys.argv[1:]]))
