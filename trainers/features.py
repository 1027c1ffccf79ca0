"""The features of every picture of a run: stored ones found, missing ones made, under a cap."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

import torch
from accelerate import Accelerator
from torch import nn

from mmalign.errors import TrainingError
from mmalign.log import get_logger, progress
from mmalign.models.load import Policy
from mmalign.scoring.candidates import EncodedMedia, Features
from trainers.config import FeaturesConfig, Recipe
from trainers.feature_key import check_frozen, features_address, features_folder, features_key
from trainers.feature_store import ELSEWHERE, FeatureStore, PictureFeatures
from trainers.rows import Rows, Survey
from trainers.sampler import even_share
from trainers.together import from_first

logger = get_logger("trainers.features")

SHARD_BYTES = 2**28
SHARD_PICTURES = 64
GB = 10**9
MB = 10**6


def open_features(recipe: Recipe, policy: Policy, accelerator: Accelerator) -> PictureFeatures:
    """The recipe's store, looked into, not yet checked. Takes the policy as loaded, before devices.

    Raises TrainingError where features must not be stored.
    """
    check_frozen(policy)
    key = from_first(accelerator, lambda: features_key(recipe, policy))
    about = {
        "of": features_address(recipe),
        "made with": {
            "device": accelerator.device.type,
            "versions": {name: version(name) for name in ("mmalign", "torch", "transformers")},
        },
    }
    store = FeatureStore(features_folder(recipe), key, about)
    store.look()
    return PictureFeatures(store)


def check_features(pictures: PictureFeatures, accelerator: Accelerator) -> None:
    """Raise TrainingError where what is stored is stale, which `make_features` finds out too."""
    from_first(accelerator, pictures.store.check)


def make_features(
    config: FeaturesConfig,
    rows: Rows,
    survey: Survey,
    scorer: nn.Module,
    accelerator: Accelerator,
) -> None:
    """Store the features of every surveyed picture that has none, each made by one process.

    Every picture goes through the tower alone, so that its features do not depend on which others
    were missing. Processes make equally many forward passes. All of them must see the folder.
    Raises TrainingError where the features would take more than the cap, before they are made.
    """
    assert rows.pictures is not None
    store = rows.pictures.store
    tokens: dict[str, int] = {}
    row_of: dict[str, int] = {}
    for row, pictures in zip(survey.rows, survey.pictures, strict=True):
        for digest, size in pictures.items():
            tokens.setdefault(digest, size)
            row_of.setdefault(digest, row)
    if from_first(accelerator, lambda: store.missing(tokens)):
        todo = from_first(accelerator, lambda: store.claim(tokens))
        try:
            if todo:
                _fill(
                    config, {digest: row_of[digest] for digest in todo}, tokens,
                    rows, scorer, accelerator,
                )  # fmt: skip
        finally:
            store.release()
    store.look()
    if unseen := [digest for digest in tokens if digest not in store.index]:
        raise TrainingError(
            "other processes stored vision features here that this one does not see",
            where=str(store.folder),
            got=f"{len(unseen)} pictures missing",
            fix=f"{ELSEWHERE}, one that all machines share",
        )
    logger.info("vision features of %d pictures read from %s", len(tokens), store.folder)
    rows.drop_pixels()


def _fill(
    config: FeaturesConfig,
    row_of: Mapping[str, int],
    tokens: Mapping[str, int],
    rows: Rows,
    scorer: nn.Module,
    accelerator: Accelerator,
) -> None:
    """Make the features of the pictures `row_of`, of which each stands in that row."""
    assert rows.pictures is not None
    store, todo = rows.pictures.store, list(row_of)
    first = rows.pictures.find(rows.prepared(row_of[todo[0]]), todo[0])
    one = _features(first, scorer, accelerator)
    # As many features as tokens, in every family.
    needed = sum(tokens[digest] for digest in todo) * one.num_bytes // tokens[todo[0]]
    stored = from_first(accelerator, lambda: store.num_bytes)
    each = needed / len(todo)
    logger.info(
        "vision features: %d of %d pictures to be made, %.3g MB each, %.3g GB in all with "
        "%.3g GB that are stored; cap %.3g GB; in %s",
        len(todo), len(tokens), each / MB, (needed + stored) / GB, stored / GB, config.cap_gb,
        store.folder,
    )  # fmt: skip
    if needed + stored > config.cap_gb * GB:
        raise TrainingError(
            "the pictures' features would not fit under their cap",
            where=str(store.folder),
            got=f"{(needed + stored) / GB:.3g} GB: {stored / GB:.3g} GB that are stored, and "
            f"{len(todo)} pictures of {each / MB:.3g} MB",
            wanted=f"at most features.cap_gb={config.cap_gb:g}",
            fix="raise features.cap_gb, lower data.limit, or drop features; "
            "`mmalign precompute RECIPE --fresh` deletes what other pictures have stored here",
        )
    from_first(accelerator, store.write_key)
    size = max(1, min(SHARD_PICTURES, int(SHARD_BYTES // each)))
    rank, world = accelerator.process_index, accelerator.num_processes
    turns = even_share(len(todo), rank=rank, world_size=world)
    pictures = rows.encodable([(row_of[todo[turn]], todo[turn]) for turn in turns])
    started = time.perf_counter()
    made: dict[str, Features] = {}
    for number, picture in enumerate(progress(pictures, label="features", total=len(turns))):
        features = _features(picture, scorer, accelerator)
        if number * world + rank < len(todo):  # Else another process's, for the passes alone.
            made[todo[turns[number]]] = features
        if len(made) == size:
            store.write(made)
            made = {}
    if made:
        store.write(made)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seconds = time.perf_counter() - started
        logger.info(
            "vision features: %d pictures in %.1f s, %.1f per second; %.3g GB on disk",
            len(todo), seconds, len(todo) / seconds, store.num_bytes / GB,
        )  # fmt: skip


def _features(picture: EncodedMedia, scorer: nn.Module, accelerator: Accelerator) -> Features:
    inputs = {name: tensor.to(accelerator.device) for name, tensor in picture.inputs.items()}
    with torch.no_grad():
        return scorer(replace(picture, inputs=inputs)).to("cpu")
