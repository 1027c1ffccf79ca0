"""Config files: pydantic models from YAML plus dotted overrides, every problem reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmalign.errors import ConfigError


class Strict(BaseModel):
    """Base of every config: frozen, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(path: str | Path, kind: type[ConfigT], overrides: Iterable[str] = ()) -> ConfigT:
    """Read a YAML file into `kind`, after applying `dotted.key=value` overrides.

    A file is read whole: there is no inheritance between files. Override values are parsed as
    YAML, so `a.b=0.1`, `a.b=[1, 2]` and `a.b=null` mean what they look like.
    Raises ConfigError listing every problem in the file, with the nearest known key on a typo.
    """
    path = Path(path)
    return validate(apply_overrides(read_yaml(path), overrides, str(path)), kind, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if it is missing, malformed or no mapping."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError("no such config file", where=str(path), fix=_nearby(path)) from None
    except IsADirectoryError:
        raise ConfigError("is a directory", where=str(path), wanted="a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"is not valid YAML ({error})".replace("\n", " "), where=str(path)
        ) from None
    if not isinstance(data, dict):
        got = type(data).__name__
        raise ConfigError(
            "must hold a mapping", where=str(path), got=got, wanted="key: value lines"
        )
    return data


def apply_overrides(
    data: Mapping[str, Any], overrides: Iterable[str], where: str
) -> dict[str, Any]:
    """A copy of `data` with each `dotted.key=value` written into it."""
    result = _deep_copy(data)
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(
                f"cannot read the override {text!r}", where=where, wanted="dotted.key=value"
            )
        *parents, leaf = key.strip().split(".")
        node: Any = result
        for parent in parents:
            node = _descend(node, parent, text, where)
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        try:
            node[int(leaf) if isinstance(node, list) else leaf] = parsed
        except (ValueError, IndexError):
            raise _no_such_item(leaf, node, text, where) from None
    return result


def _descend(node: Any, key: str, text: str, where: str) -> Any:
    """The mapping or list under `key`, made if it is not there; a list takes a number."""
    if isinstance(node, list):
        try:
            return node[int(key)]
        except (ValueError, IndexError):
            raise _no_such_item(key, node, text, where) from None
    if not isinstance(node.get(key), dict | list):
        node[key] = {}
    return node[key]


def _no_such_item(key: str, items: list[Any], text: str, where: str) -> ConfigError:
    return ConfigError(
        f"the override {text!r} names no item of a list",
        where=where,
        got=key,
        wanted=f"a number from 0 to {len(items) - 1}",
    )


def validate(data: Mapping[str, Any], kind: type[ConfigT], where: str) -> ConfigT:
    """Validate a mapping, turning pydantic's errors into one readable ConfigError."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [_explain(problem, kind) for problem in error.errors()]
        what = lines[0] if len(lines) == 1 else "\n  - ".join([f"{len(lines)} problems", *lines])
        raise ConfigError(what, where=where) from None


def dump_yaml(config: BaseModel) -> str:
    """The resolved config as YAML, stored beside every dataset, checkpoint and report."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(problem: Any, kind: type[BaseModel]) -> str:
    location = _spelled(problem["loc"], kind)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(kind, [str(part) for part in problem["loc"][:-1]])
        guess = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        prefix = ".".join(location[:-1])
        dotted = ".".join(location)
        if guess:
            return f"{dotted}: did you mean {prefix + '.' if prefix else ''}{guess[0]}?"
        return f"{dotted}: unknown key; known here: {', '.join(sorted(known))}"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = problem["ctx"]["discriminator"].strip("'")
        found = problem["input"].get(tag) if isinstance(problem["input"], dict) else None
        tags = problem["ctx"].get("expected_tags") or ", ".join(_tags_at(kind, location, tag))
        got = "is missing" if found is None else f"is {found!r}"
        return f"{'.'.join([*location, tag])}: {got}; one of {tags}"
    message = problem["msg"].removeprefix("Value error, ")
    got = problem.get("input")
    shown = "" if problem["type"] == "missing" or isinstance(got, dict) else f" (got {got!r})"
    return f"{'.'.join(location) or 'config'}: {message[0].lower()}{message[1:]}{shown}"


def _keys_at(kind: type[BaseModel], location: Sequence[str]) -> set[str]:
    """Field names of the models found by walking `location` down from `kind`."""
    return {name for model in _models_at(kind, location) for name in model.model_fields}


def _tags_at(kind: type[BaseModel], location: Sequence[str], tag: str) -> list[str]:
    """The values that tell the models of a union apart."""
    fields = [model.model_fields.get(tag) for model in _models_at(kind, location)]
    return [repr(field.default) for field in fields if field is not None]


def _models_at(kind: type[BaseModel], location: Sequence[str]) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = [kind]
    for part in location:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        elif not part.isdigit():
            # pydantic names the branch of a union by its tag.
            models = [m for m in models if any(f.default == part for f in m.model_fields.values())]
    return models


def _spelled(parts: Sequence[Any], kind: type[BaseModel]) -> list[str]:
    """A problem's place as the file spells it: pydantic adds a union's tag, which no key says."""
    location: list[str] = []
    for part in map(str, parts):
        models = _models_at(kind, location)
        known = part.isdigit() or any(part in model.model_fields for model in models)
        tags = [f.default for model in models for f in model.model_fields.values()]
        if known or part not in tags:
            location.append(part)
    return location


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, tuple, list, dict) or get_args(annotation):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    return [_deep_copy(item) for item in value] if isinstance(value, list) else value


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = [item.name for item in folder.glob("*.y*ml")]
    guess = difflib.get_close_matches(path.name, names, n=1)
    return (
        f"did you mean {folder / guess[0]}?" if guess else f"{folder} holds {len(names)} YAML files"
    )
