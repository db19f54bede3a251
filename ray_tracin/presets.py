"""Where a configuration comes from: a preset, a YAML document, single overrides, in this order.

It doesn't know what settings there are, only that `config` does: an unknown one is an error that lists the known ones.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ray_tracin.config import RunConfig

PRESETS: dict[str, dict[str, Any]] = {
    # Synthetic patients at 2 mm, a small UNet, minutes on two CPU cores.
    "demo": {
        "data": {"size": 96, "slices": {"count": 8}},
        "model": {"width": 8},
        "training": {"epochs": 12, "adam_learning_rate": 5e-3},
        "influence": {"tile_slices": 88},
    },
    # The text of the paper and, where it is silent, the authors' public code.
    "paper": {
        "seed": 1234,
        "data": {
            "grade": "HGG",
            "cohort": "brats2019",
            "slices": {"selection": "list", "indices": list(range(90, 100))},
            "crop_start": 27,
            "intensity": "maximum",
        },
        "training": {"dice": "batch"},
        "gradients": {"dtype": "bfloat16", "shard_slices": 8},
        "influence": {"tile_slices": 207},
        "resources": {"memory_per_worker": 48.0},
    },
}


def build_config(
    preset: str | None = None, document: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration of a preset, changed by a YAML document, changed by ``key.path=value`` overrides.

    Raises:
        ValueError: an unknown preset, an unknown key (the known ones are listed), or a value out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    values = _merged(PRESETS[preset] if preset else {}, document or {})
    for override in overrides:
        values = _merged(values, _parsed(override))
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """A validated configuration of plain values.

    Raises:
        ValueError: with one line an error, each naming the key, what was found, and what is known or expected.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_lines(error.errors()))) from None


def read_document(path: Path | None) -> dict[str, Any] | None:
    """The settings of a configuration file; None without one.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no YAML.
    """
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}: expected a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected YAML in UTF-8, found other bytes: save it as UTF-8 ({error})") from None
    document = parse_yaml(text, str(path))
    data = document.get("data")
    if isinstance(data, dict) and isinstance(data.get("root"), str):
        beside = path.parent / data["root"]
        if not Path(data["root"]).is_absolute() and beside.exists():
            data["root"] = str(beside.absolute())  # As seen from the file, wherever the command is given.
    return document


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping of a YAML document.

    Raises:
        ValueError: the text is no YAML, or no mapping; the message names ``where`` it came from.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{where} must hold a mapping of settings such as `data:`, got {type(document).__name__}")
    return document


def _parsed(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"an override reads key.path=value, got {override!r}")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {override!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(value, str) and text.strip()[:1] not in "'\"|>":
        value = text.strip()  # A path may hold what begins a comment in YAML.
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return dict(value)


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        # Label maps are replaced whole: merging two of them would mix two schemes.
        nested = isinstance(old, Mapping) and isinstance(value, Mapping) and key != "labels"
        result[key] = _merged(old, value) if nested else value  # type: ignore[arg-type]
    return result


def _lines(problems: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a setting: of one that may be of several types there is a problem with each."""
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for problem in problems:
        alike.setdefault((_setting(problem["loc"]), repr(problem["input"])), []).append(problem)
    for (setting, _), found in alike.items():
        if len(found) == 1:
            yield _explained(found[0])
        else:
            yield f"{setting}: " + ", or ".join(_message(problem) for problem in found) + _got(found[0])


def _setting(location: Sequence[str | int]) -> str:
    """Where a problem is, without what pydantic adds for types and elements."""
    path = [str(part) for part in location]
    return ".".join(path[: len(list(_sections(path)))])


def _message(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "tuple_type":
        return "expected a list such as [a, b]"
    return str(problem["msg"]).removeprefix("Value error, ")


def _got(problem: Mapping[str, Any]) -> str:
    return "" if isinstance(problem["input"], BaseModel | Mapping) else f", got {problem['input']!r}"


def _explained(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location) or "configuration"
    if problem["type"] != "extra_forbidden":
        hint = "; YAML wants a space after a colon" if any(":" in part for part in location) else ""
        return f"{where}: {_message(problem)}{_got(problem)}{hint}"
    *_, section = _sections(location[:-1])
    return f"unknown setting {where!r}; known here: {', '.join(sorted(section.model_fields))}"


def _sections(path: Iterable[str]) -> Iterator[type[BaseModel]]:
    """The sections of the configuration that a path goes through, from the whole on."""
    section: type[BaseModel] = RunConfig
    yield section
    for part in path:
        field = section.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return
        section = field.annotation
        yield section
