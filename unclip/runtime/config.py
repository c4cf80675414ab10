"""Configurations: YAML sections that fill constructors, with `key=value` overrides; errors name the nearest valid key.

The schema is the constructors' own signatures: a section names no key that its class does not take.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml

# In an installed package beside this file, in a clone at its root.
CONFIGS = next(p for p in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs") if p.is_dir())


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


def nearest(word: str, options: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the option most like `word`, or "" when none is."""
    close = difflib.get_close_matches(word, list(options), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shipped(path: str | Path) -> Path:
    """The configuration file that `path` names: a file, or one that came with the package, as `emoji/prior`.

    Raises ConfigError, naming the nearest ones, for neither.
    """
    if Path(path).is_file():
        return Path(path)
    name = Path(path).as_posix().removesuffix(".yaml").removeprefix("configs/")
    found = CONFIGS / f"{name}.yaml"
    if found.is_file():
        return found
    known = sorted(map(_name, _stages()))
    raise ConfigError(f"no configuration at {path}{nearest(name, known)}; a file, or one of: {', '.join(known)}")


def maker(output_dir: str) -> str | None:
    """The name of the shipped configuration that trains into the folder `output_dir`, if that does not exist yet."""
    if Path(output_dir).exists():
        return None
    return next((_name(path) for path in sorted(_stages()) if load_config(path).get("output_dir") == output_dir), None)


def _stages() -> Iterable[Path]:
    return (p for p in CONFIGS.glob("*/*.yaml") if p.parent.name != "accelerate")


def _name(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The YAML file that `path` names, with `key=value` overrides (dots descend into sections, values are YAML)."""
    path = shipped(path)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_in_a_line(error)}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a mapping, not {type(config).__name__}")
    return apply_overrides(config, overrides)


def apply_overrides(config: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`config` with each `key=value` set in it; dots descend into sections, values are read as YAML."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not of the form key=value")
        section = config
        *parents, leaf = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{override!r}: {parent!r} is a value, not a section")
        try:
            section[leaf] = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML: {_in_a_line(error)}") from None
    return config


def _in_a_line(error: Exception) -> str:
    """The problem and its position, in one line."""
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return (getattr(error, "problem", None) or str(error).splitlines()[0]) + where


def construct(factory: Callable[..., Any], section: Mapping[str, Any] | None, where: str, **given: Any) -> Any:
    """`factory(**section, **given)`.

    An unknown or missing key is a ConfigError that names it and the nearest valid one; so is a value of another type than
    the signature's, for this package's classes.
    """
    if not isinstance(section, Mapping | None):
        raise ConfigError(f"{where} must be a section of keys, got {section!r}")
    section = dict(section or {})
    parameters = inspect.signature(factory).parameters
    options = [name for name in parameters if name not in given and name not in ("self", "args", "kwargs")]
    for key in section:
        if key not in options:
            raise ConfigError(f"unknown key {where}.{key}{nearest(key, options)}; valid keys: {', '.join(options)}")
    missing = [n for n in options if parameters[n].default is inspect.Parameter.empty and n not in section]
    if missing:
        raise ConfigError(f"missing key {where}.{missing[0]}")
    if factory.__module__.split(".")[0] not in (
        "diffusers",
        "transformers",
    ):  # their annotations are narrower than what they accept
        for key, value in section.items():
            if not _fits(value, parameters[key].annotation):
                raise ConfigError(f"{where}.{key} must be {_in_words(parameters[key].annotation)}, got {value!r}")
    try:
        return factory(**section, **given)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: {error}") from error


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null", dict: "a section"}


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value read from YAML is of the type that an annotation states; other annotations accept everything."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple) or (_sized(wanted) and len(value) != len(inner)):
            return False
        return all(_fits(one, inner[0]) for one in value)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted) if wanted in _WORDS else True


def _sized(wanted: Any) -> bool:
    return get_origin(wanted) is tuple and get_args(wanted)[-1] is not Ellipsis


def _in_words(wanted: Any) -> str:
    """An annotation in words: "a whole number or null"."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, inner)))
    if origin in (list, tuple, Sequence):
        count = f" of {len(inner)}" if _sized(wanted) else ""
        return f"a list{count} ({_in_words(inner[0])})"
    return _WORDS.get(wanted, str(wanted))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string and `no` as false: numbers with an exponent are numbers here, words are words."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if tag != "tag:yaml.org,2002:bool"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)
