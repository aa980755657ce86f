"""Experiment files: inheritance (`base:`), overrides (`a.b=v`) and sweeps (`sweep:`) on top of the schema in config.py.

A file may name another one in `base:` (relative to itself), whose values it changes; mappings are merged, everything
else is replaced, and null takes an entry out of `models` or `comparisons.configurations`. `sweep:` holds either a grid,
`grid: {seed: [0, 1, 2], ppo.kl_coef: [0.05, 0.1]}`, or a list, `list: [{ppo.kl_coef: 0.05}, {name: hot, seed: 3}]`.
"""

import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from almost_jax.config import ExperimentConfig, Section
from almost_jax.errors import InputError
from almost_jax.io.paths import local_path

Key: TypeAlias = tuple[str, ...]

# Mappings with free names, from which a file takes out what its base put in by saying null.
FREE_MAPPINGS: tuple[Key, ...] = (("models",), ("comparisons", "configurations"))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Values, and where each key of them was said ("FILE:LINE" or "override 'a.b=v'")."""

    values: dict[str, Any]
    origins: dict[Key, str]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A swept experiment: its name, and (name, config) per point; the points' names are unique and fit for folders."""

    name: str
    points: tuple[tuple[str, ExperimentConfig], ...]


def load_experiment(path: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """Read, inherit, override and validate one experiment.

    Args:
        path: the yaml file.
        overrides: `a.b=v`, the values as in yaml; later ones win.

    Raises:
        InputError: the file is missing or not yaml, a key is unknown or ill-typed, or the file is a sweep; one line
            that names file and line (or the override), key, and what would be right.
    """
    layer, sweep = _load(path, ())
    if sweep is not None:
        raise InputError(f"{path}: has a sweep; run its points with `almost-jax sweep {path}`")
    return _validate(_override(layer, overrides), path)


def load_sweep(path: Path, overrides: Sequence[str]) -> Sweep:
    """Read every point of a file's `sweep:`, in the order of the file; a grid's last key varies fastest.

    Raises:
        InputError: as `load_experiment`, or the file has no sweep, or two points would share a name.
    """
    layer, sweep = _load(path, ())
    if sweep is None:
        raise InputError(f"{path}: has no `sweep:`; run it with `almost-jax run {path}`")
    layer = _override(layer, overrides)
    points: list[tuple[str, ExperimentConfig]] = []
    for changes in _points(sweep, path):
        changes = dict(changes)
        label = str(changes.pop("name", "") or _label(changes))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
            raise InputError(f"{path}: sweep: point {label!r} needs a `name` of letters, digits, '.', '_' and '-'")
        if label in (name for name, _ in points):
            raise InputError(f"{path}: sweep: two points are called {label!r}; give one of them another `name`")
        point = layer
        for key, value in changes.items():
            point = _merge(point, _nested(key.split("."), value, f"{path}: sweep point {label}"))
        config = _validate(point, path)
        points.append((label, config.model_copy(update={"name": f"{config.name}-{label}"})))
    return Sweep(_validate(layer, path).name, tuple(points))


def dump_experiment(config: ExperimentConfig) -> str:
    """The resolved experiment as yaml that `load_experiment` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _load(path: Path, seen: tuple[Path, ...]) -> tuple[_Layer, Any]:
    """The merged values of a file and its bases, and the file's own sweep (None when it has none)."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], 1)
        raise InputError(f"{path}: there is no such experiment file{f'; did you mean {near[0]}?' if near else ''}")
    if path.resolve() in seen:
        raise InputError(f"{path}: inherits from itself through `base:`")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise InputError(f"{where}: not valid yaml: {_one_line(getattr(error, 'problem', None) or error)}") from error
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path}: must hold a mapping of keys, not {type(values).__name__}")
    own = _Layer({str(key): value for key, value in values.items()}, dict(_lines(node, (), path)))
    sweep = own.values.pop("sweep", None)
    base = own.values.pop("base", None)
    if base is None:
        return own, sweep
    if not isinstance(base, str):
        raise InputError(f"{own.origins[('base',)]}: base: must be the path of one experiment file, not {base!r}")
    parent = path.parent / local_path(base)
    if not parent.is_file():
        raise InputError(f"{own.origins[('base',)]}: base: there is no {parent}")
    inherited, _ = _load(parent, (*seen, path.resolve()))
    return _merge(inherited, own), sweep


def _lines(node: yaml.Node, key: Key, path: Path) -> Iterator[tuple[Key, str]]:
    """Where every key of a composed yaml document stands."""
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(name.value), name, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(i), value, value) for i, value in enumerate(node.value)]
    for name, marked, value in children:
        yield (*key, name), f"{path}:{marked.start_mark.line + 1}"
        yield from _lines(value, (*key, name), path)


def _merge(below: _Layer, above: _Layer) -> _Layer:
    try:
        merged = OmegaConf.merge(OmegaConf.create(below.values), OmegaConf.create(above.values))
        values = OmegaConf.to_container(merged, resolve=False)
    except OmegaConfBaseException as error:
        origin = next(iter(above.origins.values()), "experiment")
        raise InputError(f"{origin}: {_one_line(error)}") from error
    assert isinstance(values, dict)
    return _Layer({str(key): value for key, value in values.items()}, {**below.origins, **above.origins})


def _nested(parts: Sequence[str], value: Any, origin: str) -> _Layer:
    values = value
    for part in reversed(parts):
        values = {part: values}
    return _Layer(values, {tuple(parts[: i + 1]): origin for i in range(len(parts))})


def _override(layer: _Layer, overrides: Sequence[str]) -> _Layer:
    for text in overrides:
        key, equals, _ = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise InputError(f"override {text!r}: must be a.b=v, a dotted key and its value")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text.partition('=')[2]}"]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise InputError(f"override {text!r}: {_one_line(error)}") from error
        assert isinstance(value, dict)
        layer = _merge(layer, _nested(parts, value["value"], f"override {text!r}"))
    return layer


def _points(sweep: Any, path: Path) -> list[dict[str, Any]]:
    grid = sweep.get("grid") if isinstance(sweep, dict) and len(sweep) == 1 else None
    if isinstance(grid, dict) and grid and all(isinstance(values, list) and values for values in grid.values()):
        keys = [str(key) for key in grid]
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*grid.values())]
    points = sweep.get("list") if isinstance(sweep, dict) and len(sweep) == 1 else None
    if isinstance(points, list) and points and all(isinstance(point, dict) and point for point in points):
        return [{str(key): value for key, value in point.items()} for point in points]
    raise InputError(
        f"{path}: sweep: must be a grid of lists (grid: {{seed: [0, 1]}}) or a list of points (list: [{{seed: 0}}])"
    )


def _label(changes: dict[str, Any]) -> str:
    """A folder name for a point: `kl_coef-0.1_seed-2`."""
    last = [key.split(".")[-1] for key in changes]
    keys = last if len(set(last)) == len(last) else list(changes)
    parts = (f"{key}-{value}" for key, value in zip(keys, changes.values(), strict=True))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)).strip("-.")[:80]


def _validate(layer: _Layer, path: Path) -> ExperimentConfig:
    try:
        values = OmegaConf.to_container(OmegaConf.create(layer.values), resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {_one_line(error)}") from error
    assert isinstance(values, dict)
    for mapping in FREE_MAPPINGS:
        _drop_nulls(values, mapping)
    try:
        return ExperimentConfig.model_validate(values)
    except ValidationError as error:
        # An unknown key often comes with the missing one it was meant to be: it says more.
        found = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise InputError(_describe(found[0], layer, path) + more) from error


def _drop_nulls(values: dict[Any, Any], key: Key) -> None:
    for part in key[:-1]:
        values = values.get(part) or {}
        if not isinstance(values, dict):
            return
    inner = values.get(key[-1])
    if isinstance(inner, dict):
        values[key[-1]] = {name: value for name, value in inner.items() if value is not None}


def _describe(error: Any, layer: _Layer, path: Path) -> str:
    """One line for one of pydantic's errors: where, key, what is wrong."""
    key: Key = tuple(str(part) for part in error["loc"] if part != "[key]")
    kind = error["type"]
    if kind == "experiment":
        key = (*key, *error["ctx"]["key"].split("."))
        message = error["ctx"]["message"]
    elif kind == "extra_forbidden":
        message = f"unknown key; {_nearest(key)}"
    elif kind == "missing":
        message = "is missing"
    elif kind in ("model_type", "dict_type"):
        message = f"must be a section of keys, not {error['input']!r}"
    else:
        expected = error["msg"].removeprefix("Value error, ")
        expected = re.sub("^(Input|String|Tuple|Dictionary) should", "must", expected)
        given = error["input"]
        message = f"{expected}, not {repr(given) if isinstance(given, str) else str(given)[:60]}"
    origin = next((layer.origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in layer.origins), str(path))
    return _one_line(f"{origin}: {'.'.join(key)}: {message}")


def _nearest(key: Key) -> str:
    """What the unknown key was perhaps meant to be."""
    section = _section_at(key[:-1])
    siblings = list(section.model_fields) if section is not None else []
    near = difflib.get_close_matches(key[-1], siblings, 1)
    if near:
        return f"did you mean {'.'.join((*key[:-1], near[0]))}?"
    # A right name in a wrong section: look for it everywhere.
    everywhere = list(_dotted_keys(ExperimentConfig, ()))
    leaves = {candidate[-1]: candidate for candidate in reversed(everywhere)}
    near = difflib.get_close_matches(key[-1], leaves, 1, 0.8)
    if near:
        return f"did you mean {'.'.join(leaves[near[0]])}?"
    return f"known here: {', '.join(siblings)}"


def _section_at(key: Key) -> type[Section] | None:
    """The section whose keys stand below `key`."""
    annotation: Any = ExperimentConfig
    for part in key:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            if part not in annotation.model_fields:
                return None
            annotation = _inner(annotation.model_fields[part].annotation)
        elif typing.get_origin(annotation) is dict:
            annotation = _inner(typing.get_args(annotation)[1])
        else:
            return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _inner(annotation: Any) -> Any:
    """A type without its `Annotated` and without its `| None`."""
    if typing.get_origin(annotation) is Annotated:
        return _inner(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _inner(next(arg for arg in typing.get_args(annotation) if arg is not type(None)))
    return annotation


def _dotted_keys(section: type[Section], key: Key) -> Iterator[Key]:
    """Every key of the schema, sections before what is in them; free names are left out."""
    for name, field in section.model_fields.items():
        yield (*key, name)
        inner = _inner(field.annotation)
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _dotted_keys(inner, (*key, name))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
