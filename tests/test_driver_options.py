"""Options are declared once with their types: what is wrong is told in one line before the driver is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmsnap import registry
from vmsnap.errors import UsageError
from vmsnap.roles import (
    PATH,
    SIZE,
    TEXT,
    YES_NO,
    Option,
    OptionType,
    check_options,
    number,
    seconds,
    whole_number,
    with_defaults,
)

GOOD: list[tuple[OptionType[Any], str, object]] = [
    (TEXT, "", ""),
    (PATH, "a/b", Path("a/b")),
    (YES_NO, "yes", True),
    (YES_NO, "no", False),
    (SIZE, "4096", 4096),
    (SIZE, "64M", 64 << 20),
    (SIZE, "8 GiB", 8 << 30),
    (SIZE, "512 b", 512),
    (seconds(), "2.5", 2.5),
    (seconds(), "86400", 86400.0),
    (number(10, "days"), "10", 10.0),
    (whole_number(), "0", 0),
    (whole_number(1, 3), "003", 3),
]
BAD: list[tuple[OptionType[Any], str]] = [
    (PATH, ""),
    (PATH, "a\0b"),
    (YES_NO, "true"),
    (YES_NO, ""),
    (SIZE, "much"),
    (SIZE, "-1"),
    (SIZE, "1.5G"),
    *((seconds(60), text) for text in ("", "soon", "0", "-1", "inf", "nan", "1e1", "1_0", "60.1", " 1", "\u0663")),
    *((whole_number(1, 64), text) for text in ("", "0", "65", "1.0", "+1", "1_0", "\u00b2", "9" * 5000)),
]
TIMEOUT = Option("timeout", "how long to wait", "60", type=seconds(3600))
WAY = Option("way", "how", "auto", ("auto", "copy"))
PLACE = Option("place", "where it is", required=True, type=PATH)
BUILT_IN = [
    pytest.param(found.kind, found.name, option, id=f"{found.kind} {found.name} {option.name}")
    for found in registry.installed()
    if found.distribution == "vmsnap" and found.driver is not None
    for option in found.driver.options
]


@pytest.mark.parametrize(("kind", "text", "value"), GOOD, ids=str)
def test_a_value_is_read_by_its_type(kind: OptionType[Any], text: str, value: object) -> None:
    assert kind.read(text) == value and type(kind.read(text)) in (type(value), type(Path()))


@pytest.mark.parametrize(("kind", "text"), BAD, ids=lambda given: str(given)[:40])
def test_what_is_no_value_is_told_with_what_would_be_one(kind: OptionType[Any], text: str) -> None:
    with pytest.raises(UsageError) as refused:
        kind.read(text, "some")
    assert refused.value.message == f"some={text!r} is no {kind.meaning}"


@pytest.mark.parametrize(
    ("given", "message", "cure"),
    [
        (
            {"place": "/x", "timeout": "soon"},
            "option timeout='soon' of driver 'd' is no number of seconds above 0 and up to 3600",
            "write -o timeout=60, for example",
        ),
        ({"place": "/x", "way": "up"}, "option way='up' of driver 'd' is no choice", "choose one of: auto, copy"),
        ({"place": ""}, "option place='' of driver 'd' is no path", "where it is"),
        ({}, "driver 'd' needs -o place=…", "where it is"),
        (
            {"plaice": "/x"},
            "driver 'd' has no option 'plaice'",
            "it knows: place, timeout, way; see: vmsnap drivers show d",
        ),
    ],
)
def test_what_is_wrong_is_one_line_with_its_cure(given: dict[str, str], message: str, cure: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_options("d", (TIMEOUT, WAY, PLACE), given)
    assert (refused.value.message, refused.value.cure) == (message, cure)
    assert "\n" not in str(refused.value)


def test_defaults_complete_what_is_given() -> None:
    declared = (TIMEOUT, WAY, PLACE)
    assert check_options("d", declared, {"place": "/x"}) == {"place": "/x", "timeout": "60", "way": "auto"}
    assert with_defaults(declared, {"way": "copy"}) == {"timeout": "60", "way": "copy"}


@pytest.mark.parametrize(
    "declared", [{"default": "soon"}, {"default": "1", "choices": ("2", "3")}, {"choices": ("1", "often")}], ids=str
)
def test_a_declaration_that_contradicts_itself_is_refused(declared: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="option 'a' is declared with a value that is no"):
        Option("a", "x", type=whole_number(), **declared)


@pytest.mark.parametrize(("kind", "name", "option"), BUILT_IN)
def test_every_option_that_is_no_text_refuses_what_is_none(kind: str, name: str, option: Option) -> None:
    wrong = "" if option.type is PATH else "\N{SNOWMAN}"
    if option.type is TEXT and not option.choices:
        assert check_options(name, (option,), {option.name: wrong}) == {option.name: wrong}
        return
    with pytest.raises(UsageError, match=option.name):
        check_options(name, (option,), {option.name: wrong})


def test_every_built_in_driver_says_what_its_numbers_are() -> None:
    texts = {param.values[2].name for param in BUILT_IN if param.values[2].type is TEXT and not param.values[2].choices}  # type: ignore[attr-defined]
    assert texts == {
        "appliances",
        "chap_user",
        "domain",
        "endpoint",
        "initiators",
        "profile",
        "qemu_img",
        "region",
        "storage_class",
        "uri",
    }
