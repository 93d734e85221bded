"""RECIPE -> Plan: a function's name (`recipes.tiny:stdlib`) or a YAML file, with `--set a.b=c` on top; and a Plan back to YAML."""

import difflib
import importlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from minimax_train.plan import Plan
from parallel.layout import Layout


def load_plan(recipe: str, settings: Iterable[str] = ()) -> Plan:
    """The resolved plan. ValueError, in one line, on an unknown recipe, key, type or size."""
    tree = _from_yaml(Path(recipe)) if recipe.endswith((".yaml", ".yml")) else _from_function(recipe)
    for setting in settings:
        _apply(tree, setting)
    return as_plan(tree)


def load_layout(settings: Iterable[str]) -> Layout:
    """One rank's layout with `layout.NAME=VALUE` on top. ValueError, in one line, as from load_plan."""
    tree: dict[str, Any] = {"layout": asdict(Layout())}
    for setting in settings:
        _apply(tree, setting)
    try:
        return TypeAdapter(Layout).validate_json(json.dumps(tree["layout"]))
    except ValidationError as error:
        said = [_explain(item) for item in error.errors()]
        raise ValueError("; ".join(line if line.startswith("layout.") else f"layout.{line}" for line in said)) from None


def as_plan(tree: dict[str, Any]) -> Plan:
    """Checks a tree of plain values (as YAML gives it) and makes the Plan."""
    try:
        return TypeAdapter(Plan).validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ValueError("; ".join(_explain(item) for item in error.errors())) from None
    except TypeError as error:
        raise ValueError(f"the plan holds a value that YAML cannot: {error}") from None


def as_yaml(plan: Plan) -> str:
    """The plan as YAML, which is itself a recipe."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = None, False, 120  # type: ignore[assignment]
    yaml.dump(as_tree(plan), text)
    return text.getvalue()


def as_tree(plan: Plan) -> dict[str, Any]:
    """The plan as plain dictionaries, lists and scalars."""
    tree: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    return tree


def differences(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> list[str]:
    """Every leaf in which two trees differ, as `path: theirs -> ours`; a list is a leaf where its length differs, or its items are."""
    lines = []
    for key in dict.fromkeys([*theirs, *ours]):
        one, other, name = ours.get(key), theirs.get(key), f"{path}{key}"
        if isinstance(one, list) and isinstance(other, list) and len(one) == len(other) and one and isinstance(one[0], dict):
            one, other = (dict(zip(map(str, range(len(items))), items, strict=True)) for items in (one, other))
        if isinstance(one, dict) and isinstance(other, dict):
            lines += differences(one, other, name + ".")
        elif one != other:
            lines.append(f"{name}: {other!r} -> {one!r}")
    return lines


def _from_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"recipe {path}: no such file; give a YAML file or a function such as recipes.tiny:stdlib")
    try:
        tree = YAML(typ="safe", pure=True).load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {path} holds {type(tree).__name__}, not a mapping of plan fields")
    return tree


def _from_function(recipe: str) -> dict[str, Any]:
    module_name, _, name = recipe.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError):
        module = None
    made = getattr(module, name, None) if name else None
    if not callable(made):
        known = [n for n in dir(module) if not n.startswith("_") and getattr(getattr(module, n), "__module__", "") == module_name]
        has = f"; {module_name} has {', '.join(known)}" if module is not None and known else ""
        raise ValueError(f"recipe {recipe!r} was not found: give a YAML file or MODULE:FUNCTION such as recipes.tiny:stdlib{has}")
    plan = made()
    if not isinstance(plan, Plan):
        raise ValueError(f"recipe {recipe!r} returned {type(plan).__name__}, not a Plan")
    return as_tree(plan)


def _apply(tree: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"--set {setting!r}: write --set a.b=value")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise ValueError(f"--set {setting!r}: the value is not YAML") from None
    *parents, leaf = path.split(".")
    place: Any = tree
    for depth, key in enumerate(parents):
        place = _step(place, key, ".".join(parents[:depth]))
    if isinstance(place, list):
        place[_index(place, leaf, ".".join(parents))] = value
    elif isinstance(place, dict) and leaf in place:
        place[leaf] = value
    else:
        raise ValueError(_unknown(leaf, ".".join(parents), list(place) if isinstance(place, dict) else []))


def _step(place: Any, key: str, path: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, key, path)]
    if isinstance(place, dict) and key in place:
        return place[key]
    raise ValueError(_unknown(key, path, list(place) if isinstance(place, dict) else []))


def _index(items: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ValueError(f"{path} has {len(items)} entries; {key!r} is not an index from 0 to {len(items) - 1}")
    return int(key)


def _unknown(key: str, path: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f": did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"
    return f"unknown plan key {f'{path}.{key}' if path else key!r}{hint}"


def _explain(error: Any) -> str:
    """One pydantic error as what was given, what is allowed, what to change."""
    location = [str(part) for part in error["loc"]]
    path = ".".join(location)
    if error["type"] == "unexpected_keyword_argument":
        return _unknown(location[-1], ".".join(location[:-1]), _keys_at(location[:-1]))
    if error["type"] == "missing":
        return f"plan key {path!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if location and not message.startswith(location[0]) else message
    return f"{path} is {error['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_at(location: list[str]) -> list[str]:
    """Names of the fields of the record at `location` in a Plan."""
    kind: Any = Plan
    named = False  # `part` is a key that the plan's writer chose, of a dictionary of records
    for part in location:
        if named or part.isdigit():
            named = False
            continue
        kind = next((field.type for field in fields(kind) if field.name == part), None)
        named = get_origin(kind) is dict
        kind = next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None)
        if kind is None:
            return []
    return [field.name for field in fields(kind)]
