"""Configuration: typos and wrong types stop at once, and say where."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from ml_collections import ConfigDict

from vadapter import config
from vadapter.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Texts:
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int
    rate: float = 0.5
    name: str = "x"
    on: bool = False


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    table: Mapping[str, Inner] = dataclasses.field(default_factory=dict)
    items: tuple[Inner, ...] = ()
    sizes: tuple[int, ...] = ()
    maybe: int | None = None
    choice: Literal["left", "right"] = "left"
    free: Any = None
    spec: dict[str, Any] = dataclasses.field(default_factory=dict)


FULL = {
    "inner": {"width": 3, "rate": 1},
    "table": {"a": {"width": 1}, "b": {"width": 2}},
    "items": [{"width": 4}],
    "sizes": [1, 2],
    "maybe": 7,
    "choice": "right",
    "free": {"any": ["thing"]},
    "spec": {"kind": "vit", "deep": {"x": (1, 2)}},
}


@pytest.mark.parametrize("wrap", [dict, ConfigDict], ids=["dict", "ConfigDict"])
def test_nested_dataclasses_dicts_and_tuples_are_built(wrap):
    built = config.build(Outer, wrap(FULL))
    assert built.inner == Inner(3, 1.0)
    assert isinstance(built.inner.rate, float)
    assert built.table == {"a": Inner(1), "b": Inner(2)}
    assert built.items == (Inner(4),)
    assert (built.sizes, built.maybe, built.choice) == ((1, 2), 7, "right")
    assert built.free == {"any": ["thing"]}
    assert built.spec == {"kind": "vit", "deep": {"x": [1, 2]}}


def test_a_built_object_round_trips_through_json():
    built = config.build(Outer, FULL)
    text = json.dumps(config.plain(built))
    assert config.build(Outer, json.loads(text)) == built
    assert config.digest(built) == config.digest(json.loads(text))
    changed = dataclasses.replace(built, maybe=8)
    assert config.digest(changed) != config.digest(built)


def test_a_dataclass_that_is_built_already_is_taken_as_it_is():
    inner = Inner(3)
    assert config.build(Outer, {"inner": inner}).inner is inner
    with pytest.raises(ConfigError, match=r"config\.inner: expected a group of keys"):
        config.build(Outer, {"inner": Outer(inner)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iner": {}}, r"config\.iner: unknown key; did you mean 'inner'\?"),
        ({"zzz": 1}, r"config\.zzz: unknown key; known: .*sizes"),
        (
            {"inner": {"width": 1, "rat": 2}},
            r"config\.inner\.rat: unknown key; did you mean 'rate'",
        ),
        ({"inner": {}}, r"config\.inner\.width: missing"),
        ({"inner": 3}, r"config\.inner: expected a group of keys, got 3"),
        ({"inner": {"width": "3"}}, r"config\.inner\.width: expected int, got str '3'"),
        ({"inner": {"width": 2.5}}, r"config\.inner\.width: expected int, got float 2\.5"),
        ({"inner": {"width": float("inf")}}, r"config\.inner\.width: expected int, got float inf"),
        ({"inner": {"width": float("nan")}}, r"config\.inner\.width: expected int, got float nan"),
        ({"inner": {"width": True}}, r"config\.inner\.width: expected int, got bool"),
        ({"inner": {"width": None}}, r"config\.inner\.width: expected int, got NoneType"),
        ({"inner": {"width": 1, "rate": True}}, r"config\.inner\.rate: expected float, got bool"),
        ({"inner": {"width": 1, "rate": float("nan")}}, r"config\.inner\.rate: not a number"),
        ({"inner": {"width": 1, "on": 1}}, r"config\.inner\.on: expected bool, got int"),
        ({"inner": {"width": 1, "name": 1}}, r"config\.inner\.name: expected str, got int"),
        ({"table": {"a": {"wdth": 1}}}, r"config\.table\.a\.wdth: unknown key; did you mean 'w"),
        ({"table": [1]}, r"config\.table: expected a group of keys"),
        ({"items": [{"width": 1}, {"width": "x"}]}, r"config\.items\[1\]\.width: expected int"),
        ({"sizes": "12"}, r"config\.sizes: expected a list, got '12'"),
        ({"sizes": 12}, r"config\.sizes: expected a list, got 12"),
        ({"sizes": [1, "2"]}, r"config\.sizes\[1\]: expected int"),
        ({"maybe": "7"}, r"config\.maybe: expected int"),
        ({"choice": "lft"}, r"config\.choice='lft': unknown; did you mean 'left'\?"),
        ({"choice": 3}, r"config\.choice=3: unknown; known: left, right"),
    ],
)
def test_a_value_that_does_not_fit_says_where_it_is_and_what_was_expected(change, message):
    with pytest.raises(ConfigError, match=message):
        config.build(Outer, {"inner": {"width": 1}} | change)


def test_a_missing_group_is_named():
    with pytest.raises(ConfigError, match=r"stage\.inner: missing; it has no default"):
        config.build(Outer, {}, "stage")


def test_an_optional_value_may_be_none_and_a_whole_float_is_an_int():
    assert config.build(Outer, {"inner": {"width": 3.0}, "maybe": None}) == Outer(Inner(3))
    assert isinstance(config.build(Inner, {"width": 3.0}).width, int)


def make():
    return ConfigDict({
        "a": {"b": 1, "rate": 0.5, "name": "x", "on": False, "sizes": (1, 2)},
        "spec": {"depth": 2},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("a.b=5", "b", 5),
        ("a.rate=1e-3", "rate", 1e-3),
        ("a.rate=2", "rate", 2.0),
        ("a.name=hello world", "name", "hello world"),
        ("a.name=2024", "name", "2024"),
        ("a.name=k=v", "name", "k=v"),
        ("a.name=true", "name", "true"),
        ('a.name="7"', "name", "7"),
        ("a.name=", "name", ""),
        ("a.on=true", "on", True),
        ("a.on=True", "on", True),
        ("a.sizes=[3,4,5]", "sizes", (3, 4, 5)),
        ("a.sizes=(3,)", "sizes", (3,)),
        ("a.sizes=x,y", "sizes", ("x", "y")),
        ("a.sizes=x", "sizes", ("x",)),
        ("a.new=1e-3", "new", 1e-3),
        ("a.b=1e3", "b", 1000),
    ],
)
def test_an_override_takes_the_type_of_what_it_replaces(assignment, key, value):
    c = make()
    config.override(c, [assignment])
    assert c.a[key] == value
    assert type(c.a[key]) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("spce.depth=1", r"--config\.spce: unknown key; did you mean 'spec'"),
        ("a.b.c=1", r"--config\.a\.b\.c: unknown key"),
        ("a.b", r"--config\.a\.b: needs a value"),
        ("a.b=x", r"--config\.a\.b=x: "),
        ("a.b=1.5", r"--config\.a\.b=1\.5: "),
        ("a.rate=fast", r"--config\.a\.rate=fast: "),
        ("a.on=maybe", r"--config\.a\.on=maybe: "),
        ("a=3", r"--config\.a=3: "),
    ],
)
def test_an_override_that_does_not_fit_is_an_error(assignment, message):
    c = make()
    with pytest.raises(ConfigError, match=message):
        config.override(c, [assignment])
    assert c == make(), "and changes nothing"


def test_an_override_may_reach_into_a_group_that_the_recipe_leaves_out():
    c = make()
    config.override(c, ["a.deep.er=2", "a.deep.too=x", "a.odd={[]:1}"])
    assert c.a.deep.to_dict() == {"er": 2, "too": "x"}
    assert c.a.odd == "{[]:1}"


def test_text_with_commas_is_a_list_where_texts_are_expected():
    assert config.build(Texts, {"names": "a/b,c"}) == Texts(("a/b", "c"))


def test_a_config_argument_is_read_in_the_type_of_its_default():
    arg = config.parse_arg("size=small,steps=20,fast,rate=1e-3", size="x", steps=1, fast=False,
                           rate=0.5, other="kept")  # fmt: skip
    assert vars(arg) == {"size": "small", "steps": 20, "fast": True, "rate": 1e-3, "other": "kept"}
    assert config.parse_arg("fast=0", fast=True).fast is False
    assert vars(config.parse_arg(None, a=1)) == vars(config.parse_arg("", a=1)) == {"a": 1}


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("stps=3", "'stps': unknown; did you mean 'steps'"),
        ("steps=3.5", "'steps': '3.5' is not of type int"),
        ("steps", "'steps': '' is not of type int"),
        ("fast=maybe", "'fast': 'maybe' is not of type bool"),
        ("rate=nan", "'rate': 'nan' is not"),
    ],
)
def test_a_config_argument_that_does_not_fit_is_an_error(arg, message):
    with pytest.raises(ConfigError, match=message):
        config.parse_arg(arg, steps=1, fast=False, rate=0.5)


@pytest.mark.parametrize(
    ("arg", "values"),
    [
        ("names=a,b,c,n=2", (("a", "b", "c"), (1.0,), 2, False)),
        ("n=2,names=a,on", (("a", "on"), (1.0,), 2, False)),
        ("on,rates=1,2e-3,names=x", (("x",), (1.0, 2e-3), 0, True)),
        ("rates=3,names=", ((), (3.0,), 0, False)),
        ("names=a,names=b", (("b",), (1.0,), 0, False)),
        ("", ((), (1.0,), 0, False)),
    ],
)
def test_a_config_argument_with_several_values_ends_at_the_next_key(arg, values):
    got = config.parse_arg(arg, names=(), rates=(1.0,), n=0, on=False)
    assert (got.names, got.rates, got.n, got.on) == values


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("n=1,x", "'x': unknown; known: n, names, rates"),
        ("names=a,b,nmes=c", "'nmes': unknown; did you mean 'names'"),
        ("rates=1,x", "'rates': 'x' is not of type float"),
    ],
)
def test_a_value_that_continues_nothing_is_an_error(arg, message):
    with pytest.raises(ConfigError, match=message):
        config.parse_arg(arg, names=(), rates=(1.0,), n=0)


@pytest.mark.parametrize(
    ("arg", "own", "rest"),
    [
        ("base=b,scale=2,names=x,y,fast", "base=b,names=x,y,fast", "scale=2"),
        ("fast,base=b", "base=b", "fast"),
        ("names=,q=", "names=", "q="),
        ("base", "base", ""),
        (None, "", ""),
    ],
)
def test_an_argument_is_divided_into_that_of_a_recipe_and_that_of_its_base(arg, own, rest):
    assert config.split_arg(arg, base="", names=()) == (own, rest)


def test_differences_are_dotted_paths_with_both_values():
    a = {"x": {"y": 1, "z": [1, 2]}, "only": 3}
    b = {"x": {"y": 2, "z": [1, 2]}, "new": {"k": 4}}
    assert config.differences(a, b) == [
        ("new", "—", {"k": 4}),
        ("only", 3, "—"),
        ("x.y", 1, 2),
    ]
    assert config.differences(a, a) == []


def test_a_recipe_is_a_file_with_get_config(tmp_path: Path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def get_config(arg=None):\n    return {'arg': arg}\n")
    assert config.load(str(recipe)).to_dict() == {"arg": None}
    assert config.load(f"{recipe}:a=1,b=2").to_dict() == {"arg": "a=1,b=2"}
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="no function get_config"):
        config.load(str(tmp_path / "empty.py"))
    with pytest.raises(ConfigError, match="no such file"):
        config.load(str(tmp_path / "nowhere.py"))


# -- renamed keys ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
    RENAMED: ClassVar = {"old": "new"}
    new: int = 0
    other: int = 0


@dataclasses.dataclass(frozen=True)
class Groups:
    groups: dict[str, Group]


def test_a_renamed_key_still_works_and_says_its_new_name():
    with pytest.warns(FutureWarning, match=r"c\.groups\.a\.old is now new; the old name"):
        assert config.build(Groups, {"groups": {"a": {"old": 3}}}, "c").groups["a"] == Group(3)
    with pytest.raises(ConfigError, match=r"c\.groups\.a\.old is the old name of new: remove one"):
        config.build(Groups, {"groups": {"a": {"old": 3, "new": 3}}}, "c")


@pytest.mark.parametrize("written", ["old", "new"])
@pytest.mark.parametrize("given", ["old", "new"])
def test_an_override_finds_a_key_by_both_names(written, given):
    values = ConfigDict({"groups": {"a": {written: 3}}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config.override(values, [f"groups.a.{given}=4"], Groups)
        assert config.build(Groups, values).groups["a"] == Group(4)
    said = [str(warning.message).split(";")[0] for warning in caught]
    assert said == ["--config.groups.a.old is now new"] * (given == "old")


@dataclasses.dataclass(frozen=True)
class Later:
    first: int
    group: Group = dataclasses.field(default_factory=Group)
    items: tuple[str, ...] = ("a",)
    free: int = 0


def test_stored_values_take_the_defaults_of_keys_that_were_added_since():
    stored = {"first": 1, "group": {"new": 3}}
    expected = {"first": 1, "group": {"new": 3, "other": 0}, "items": ["a"]}
    assert config.with_defaults(Later, stored, ("free",)) == expected
    assert config.with_defaults(Later, {"free": 2}) == {
        "free": 2, "group": {"new": 0, "other": 0}, "items": ["a"],
    }  # fmt: skip


def test_stored_values_are_read_under_new_names_without_a_warning():
    stored = {"groups": {"a": {"old": 3, "other": 1}}, "unknown": [{"old": 1}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = config.with_new_keys(Groups, stored)
    assert new == {"groups": {"a": {"new": 3, "other": 1}}, "unknown": [{"old": 1}]}
