"""From ConfigDicts to frozen dataclasses: unknown keys and wrong types are errors.

Each dataclass is defined next to the code that reads it; this module only builds them.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import runpy
import types
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from vadapter.errors import ConfigError, RenamedWarning

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Build a dataclass from a dict or ConfigDict, recursively and strictly.

    Its fields may be dataclasses, or dicts and tuples of them. If it has a
    `RENAMED: ClassVar[dict[str, str]]` of old to new keys, old ones still work, with a warning.

    Raises:
      ConfigError: unknown key (with the nearest known one), missing key, wrong type, values that
        the dataclass itself refuses; messages begin with `path`, the dotted path of `values`.
    """
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    renamed = {old: new for old, new in getattr(cls, "RENAMED", {}).items() if old in values}
    for old, new in renamed.items():
        if new in values:
            raise ConfigError(f"{path}.{old} is the old name of {new}: remove one of the two")
        _warn_renamed(f"{path}.{old}", new)
    values = {renamed.get(key, key): value for key, value in values.items()}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{path}.{key}: unknown key{nearest(key, fields)}")
    out = {key: _convert(hints[key], value, f"{path}.{key}") for key, value in values.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in out:
            raise ConfigError(f"{path}.{name}: missing; it has no default")
    try:
        return cls(**out)
    except ConfigError as error:  # of its own check: values that do not fit together
        raise ConfigError(f"{path}: {error}") from None


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is now {new}; the old name will be removed in the next release",
        RenamedWarning,
        stacklevel=2,
    )


def with_new_keys(hint: Any, value: Any) -> Any:
    """Return a stored value of type `hint` with renamed keys under their new names, at all depths.

    For files that earlier versions wrote: no warning, since nobody can be expected to edit them.
    """
    if not isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(hint):
        renamed = getattr(hint, "RENAMED", {})
        value = {renamed.get(key, key): item for key, item in value.items()}
    return {key: with_new_keys(_hint_of(hint, key), item) for key, item in value.items()}


def with_defaults(
    cls: type, values: Mapping[str, Any], leave_out: typing.Collection[str] = ()
) -> Any:
    """Return stored values of a dataclass with the defaults of keys that it had not yet.

    The keys of `leave_out` are not added. Dataclasses within are completed, too.
    """
    out = dict(values)
    for f in dataclasses.fields(cls):
        if f.name not in out and f.name not in leave_out:
            if f.default is not dataclasses.MISSING:
                out[f.name] = plain(f.default)
            elif f.default_factory is not dataclasses.MISSING:
                out[f.name] = plain(f.default_factory())
        elif dataclasses.is_dataclass(hint := _hint_of(cls, f.name)) and f.name in out:
            out[f.name] = with_defaults(hint, out[f.name])  # type: ignore[arg-type]
    return out


_hints = functools.cache(typing.get_type_hints)


def _hint_of(hint: Any, key: str) -> Any:
    """Return the type of a key of a dataclass or of a dict; None if it is neither."""
    if dataclasses.is_dataclass(hint):
        return _hints(hint).get(key)
    if typing.get_origin(hint) in (dict, Mapping):
        return typing.get_args(hint)[1]
    return None


def nearest(key: str, names: typing.Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the known names, at most 15."""
    names = sorted(names)
    close = difflib.get_close_matches(key, names, 1, 0.65)
    known = ", ".join(names[:15]) + f" and {len(names) - 15} more" * (len(names) > 15)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {known}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return build(hint, _group(value, path), path)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (dict, Mapping) or hint is dict:
        item = args[1] if args else Any
        return {str(k): _convert(item, v, f"{path}.{k}") for k, v in _group(value, path).items()}
    if origin is tuple:
        if isinstance(value, str) and args[0] is str:  # as on the command line
            value = [item for item in value.split(",") if item]
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is typing.Literal:
        require_one_of(f"{path}={value!r}", value, args)
        return value
    return plain(value) if hint is Any else _scalar(hint, value, path)


def _group(value: Any, path: str) -> Mapping[str, Any] | ConfigDict:
    if not isinstance(value, Mapping | ConfigDict):
        raise ConfigError(f"{path}: expected a group of keys, got {value!r}")
    return value


def require_one_of(setting: str, value: Any, choices: typing.Iterable[Any]) -> None:
    """Raise ConfigError, with the nearest choice, if the value of a `key=value` is not a choice."""
    if value not in (choices := tuple(choices)):
        names = filter(None, map(str, choices))  # "": the default
        raise ConfigError(f"{setting}: unknown{nearest(str(value), names)}")


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: expected {hint.__name__}, got {type(value).__name__} {value!r}")
    if hint is float and value != value:
        raise ConfigError(f"{path}: not a number")
    return value


def plain(value: Any) -> Any:
    """Return dataclasses, ConfigDicts and tuples as JSON-able dicts and lists, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping | ConfigDict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def digest(value: Any) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of `plain(value)`."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return the leaves in which plain values differ: (dotted path, in a, in b); `—`: missing."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        rows = []
        for key in sorted(a.keys() | b.keys()):
            name = f"{path}.{key}" if path else str(key)
            rows += differences(a.get(key, "—"), b.get(key, "—"), name)
        return rows
    return [] if a == b else [(path, a, b)]


_FLAGS = {"": True, "1": True, "true": True, "0": False, "false": False}


def parse_arg(arg: str | None, **defaults: Any) -> Any:
    """Parse the argument of a recipe, `a=1,b=x,y`, against typed defaults.

    A default that is a tuple takes several values, of the type of its first element, text if it is
    empty: items without `=` continue it, as `y` does above.

    Raises:
      ConfigError: an argument without a default, or a value of another type.
    """
    values = dict(defaults)
    for key, items in _items(arg, defaults):
        require_one_of(f"config argument {key!r}", key, defaults)
        default = defaults[key]
        if isinstance(default, tuple):
            kind = type(default[0]) if default else str
            values[key] = tuple(_typed(key, text, kind) for text in items if text)
        else:
            values[key] = _typed(key, *items, kind=type(default))
    return types.SimpleNamespace(**values)


def split_arg(arg: str | None, **defaults: Any) -> tuple[str, str]:
    """Divide the argument of a recipe into that with the keys of `defaults` and the rest.

    For a recipe over another one: `parse_arg` reads the first part, the other recipe the second.
    """
    parts: tuple[list[str], list[str]] = [], []
    for key, items in _items(arg, defaults):
        text = ",".join(item for item in items if item is not None)
        parts[key not in defaults].append(key if items == [None] else f"{key}={text}")
    return ",".join(parts[0]), ",".join(parts[1])


def _items(arg: str | None, defaults: Mapping[str, Any]) -> list[tuple[str, list[str | None]]]:
    """Return every key of a recipe's argument with its values; None is a key without `=`."""
    out: list[tuple[str, list[str | None]]] = []
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if not equals and out and isinstance(defaults.get(out[-1][0]), tuple):
            out[-1][1].append(item)
        else:
            out.append((key, [text if equals else None]))
    return out


def _typed(key: str, text: str | None, kind: type) -> Any:
    try:
        value = _FLAGS[(text or "").lower()] if kind is bool else kind(text or "")
        if (kind is str and text is None) or value != value:  # not a number
            raise ValueError
    except (KeyError, ValueError):
        raise ConfigError(
            f"config argument {key!r}: {text or ''!r} is not of type {kind.__name__}"
        ) from None
    return value


def resolve(value: Any, key: str = "path") -> Any:
    """Expand `~` and `$VARIABLES` in a string, or in the strings of a list.

    Raises:
      ConfigError: a variable that is not set.
    """
    if isinstance(value, list | tuple):
        return [resolve(v, key) for v in value]
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{?(\w+)\}?", value):
        if name not in os.environ:
            raise ConfigError(
                f"{key}={value!r}: the environment variable {name} is not set; set it to the "
                f"folder that holds the data, or give the path itself with --config.{key}=PATH"
            )
    return os.path.expandvars(os.path.expanduser(value))


def choose(key: str, value: Any, choices: typing.Iterable[Any]) -> None:
    """Raise ConfigError, with the nearest choice, unless the argument of a recipe is a choice."""
    require_one_of(f"config argument {key}={value!r}", value, choices)


def load(spec: str) -> ConfigDict:
    """Return the ConfigDict of `get_config(arg)` in a `FILE.py[:arg]` spec.

    A relative file is looked up in the working directory, then among the packaged recipes.

    Raises:
      ConfigError: there is no such file, or it defines no `get_config`.
    """
    name, _, arg = spec.partition(":")
    path = find_recipe(name)
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise ConfigError(f"{path}: no function get_config(arg); a recipe must define it")
    return _separate(get_config(arg or None))


def _separate(group: Any) -> Any:
    """Return a copy in which no two groups are the same object, so that overrides are separate."""
    if not isinstance(group, Mapping | ConfigDict):
        return group
    return ConfigDict({key: _separate(value) for key, value in group.items()})


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: as given, or packaged (`configs/x.py`)."""
    here = Path(__file__).resolve().parent
    for path in (Path(name), here.parent / name, here / name):
        if path.is_file():
            return path
    folder = next((d for d in (here.parent / "configs", here / "configs") if d.is_dir()), None)
    recipes = sorted(path.stem for path in folder.glob("*.py")) if folder else []
    hint = nearest(Path(name).stem, recipes) if recipes else ""
    raise ConfigError(f"--config={name}: no such file{hint}")


def override(
    config: ConfigDict, assignments: typing.Iterable[str], schema: type | None = None
) -> None:
    """Apply `a.b=v` overrides in place to what `load` returns.

    A value is JSON or a Python literal where it reads as one (`[1, 2]`, `("a",)`, `true`, `None`),
    else text; a list may also be given as `x,y`. The first group, `a`, must be in the recipe; what
    it leaves at its default below is added, and refused by `build` if there is no such key. Renamed
    keys of `schema`, the dataclass that `config` is read into, still work, with a warning.

    Raises:
      ConfigError: an unknown group (with the nearest one) or a value of another type.
    """
    for item in assignments:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--config.{key}: needs a value, --config.{key}=VALUE")
        *parents, leaf = key.split(".")
        node: Any = config
        hint: Any = schema
        if parents and parents[0] not in config:
            first = parents[0]
            raise ConfigError(f"--config.{first}: unknown key{nearest(first, config.keys())}")
        for i, part in enumerate(parents, 1):
            if part not in node:  # a group that the recipe leaves out
                with node.unlocked():
                    node[part] = ConfigDict()
            node, hint = node[part], _hint_of(hint, part)
            if not isinstance(node, ConfigDict):
                path = ".".join([*parents, leaf][: i + 1])
                raise ConfigError(f"--config.{path}: unknown key; {part} is not a group of keys")
        _assign(node, _new_leaf(node, hint, leaf, key), text, key)


def _new_leaf(node: ConfigDict, hint: Any, leaf: str, key: str) -> str:
    """Return the current name of a key that is overridden; rename it in the recipe, too."""
    for old, new in getattr(hint, "RENAMED", {}).items():
        if leaf == old:
            _warn_renamed(f"--config.{key}", new)
            leaf = new
        if leaf == new and old in node:
            with node.unlocked():
                node[new] = node[old]
                del node[old]
    return leaf


def _assign(node: ConfigDict, leaf: str, text: str, key: str) -> None:
    value = _literal(text)
    if leaf not in node:
        with node.unlocked():
            node[leaf] = value
        return
    before = node[leaf]
    if isinstance(before, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(before, str) and not isinstance(value, str):
        value = text  # a name may look like a number
    if isinstance(before, tuple) and isinstance(value, str):
        value = tuple(filter(None, value.split(",")))
    try:
        node[leaf] = value
    except TypeError as error:
        raise ConfigError(f"--config.{key}={text}: {error}") from None


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        return tuple(value) if isinstance(value, list) else value
    return text
