"""The configuration file and the passphrase: where they come from, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli import Scripts, on_terminal
from vmsnap.configuration import Configuration, load, parse_size
from vmsnap.errors import UsageError


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    made = Scripts(tmp_path)
    yield made
    made.close()


def test_everything_that_can_be_configured(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        'repository = "file:///backups"\n'
        'state_dir = "/state"\n'
        'spool_dir = "~/spool"\n'
        'memory_budget = "8GiB"\n'
        "compression_level = -3\n"
        'freeze = "overlay"\n'
        'passphrase_command = "pass show backups"\n'
        "[mechanism.qcow2]\n"
        "workers = 4\n"
        "fast = true\n"
    )
    found = load(file)
    assert found == Configuration(
        source=file,
        repository="file:///backups",
        state_dir=Path("/state"),
        spool_dir=Path("~/spool").expanduser(),
        memory_budget_bytes=8 << 30,
        compression_level=-3,
        freeze="overlay",
        passphrase_command="pass show backups",
        mechanism_options={"qcow2": {"workers": "4", "fast": "yes"}},
    )
    assert "pass show" not in repr(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('repositry = "/backups"', "unknown key 'repositry'"),
        ('repository = "backups"', "absolute"),
        ("repository = 1", "must be a text"),
        ('state_dir = ""', "not empty"),
        ('memory_budget = "much"', "is no size"),
        ("memory_budget = 0", "more than 0"),
        ("memory_budget = true", "must be a size"),
        ("compression_level = 20", "from -7 to 19"),
        ("compression_level = '3'", "from -7 to 19"),
        ("compression_level = true", "from -7 to 19"),
        ('freeze = "ice"', "must be 'none' or 'overlay'"),
        ('mechanism = "qcow2"', "must be tables"),
        ("[mechanism]\nqcow2 = 1", "must be a table"),
        ("[mechanism.qcow2]\nx = [1]", "a text or a number"),
        ('passphrase_file = "/a"\npassphrase_command = "b"', "exclude each other"),
        ("repository = ", "is no TOML"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load(file)
    assert said in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("64M", 64 << 20), ("8GiB", 8 << 30), ("1 kb", 1024), ("2T", 2 << 40), ("5B", 5)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "64X", "0x10"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_the_file_is_found_where_it_was_named(scripts: Scripts) -> None:
    repository = scripts.folder / "repository"
    for folder in (scripts.folder / ".config" / "vmsnap", scripts.folder / "xdg" / "vmsnap", scripts.folder / "named"):
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(f'repository = "{repository}-{folder.parent.name}"\n')
    named = str(scripts.folder / "named" / "config.toml")
    assert "repository-.config" in scripts.error(3, "list")
    assert "repository-xdg" in scripts.error(3, "list", XDG_CONFIG_HOME=str(scripts.folder / "xdg"))
    assert f"repository-{scripts.folder.name}" in scripts.error(3, "list", VMSNAP_CONFIG=named)
    assert f"repository-{scripts.folder.name}" in scripts.error(3, "list", "--config", named)
    assert "elsewhere" in scripts.error(3, "list", "--config", named, VMSNAP_REPOSITORY="/elsewhere")
    assert "here" in scripts.error(3, "list", "-r", "/here", VMSNAP_REPOSITORY="/elsewhere")


def test_a_file_that_was_named_must_be_there(scripts: Scripts) -> None:
    assert "no configuration file" in scripts.error(2, "list", "--config", "/nowhere.toml")
    assert "no configuration file" in scripts.error(2, "vm", "list", VMSNAP_CONFIG="/nowhere.toml")


def test_the_state_folder_can_be_configured(scripts: Scripts) -> None:
    file = scripts.folder / "config.toml"
    file.write_text(f'state_dir = "{scripts.folder}/configured"\n')
    scripts.json("vm", "list", "--config", str(file), VMSNAP_STATE_DIR="")
    assert (scripts.folder / "configured" / "vmsnap.db").exists()


# -- the passphrase

SECRET = "correct horse, battery=staple"


@pytest.fixture
def encrypted(scripts: Scripts) -> str:
    repository = str(scripts.folder / "repository")
    made = scripts.json("init", "-r", repository, VMSNAP_PASSPHRASE=SECRET)
    assert made["encryption"] == "aes256-gcm" and made["repository"] == repository and made["id"]
    return repository


def test_the_passphrase_comes_from_environment_file_command_and_configuration(scripts: Scripts, encrypted: str) -> None:
    file = scripts.folder / "passphrase"
    file.write_text(SECRET + "\n")
    command = f"cat '{file}'"
    configuration = scripts.folder / "config.toml"
    assert scripts.json("list", "-r", encrypted, VMSNAP_PASSPHRASE=SECRET) == []
    assert scripts.json("list", "-r", encrypted, VMSNAP_PASSPHRASE_FILE=str(file)) == []
    assert scripts.json("list", "-r", encrypted, VMSNAP_PASSPHRASE_COMMAND=command) == []
    for line in (f'passphrase_file = "{file}"', f'passphrase_command = "{command}"'):
        configuration.write_text(line)
        assert scripts.json("list", "-r", encrypted, "--config", str(configuration)) == []


def test_a_wrong_or_missing_passphrase_is_2(scripts: Scripts, encrypted: str) -> None:
    assert "no key of the repository opens" in scripts.error(2, "list", "-r", encrypted, VMSNAP_PASSPHRASE="wrong")
    assert "no passphrase was given" in scripts.error(2, "list", "-r", encrypted)
    assert "cannot read" in scripts.error(2, "list", "-r", encrypted, VMSNAP_PASSPHRASE_FILE="/nowhere")


@pytest.mark.parametrize("command", ["false", "/no/such/command", "true", "echo 'open quote", " "])
def test_a_passphrase_command_that_fails_is_not_repeated(scripts: Scripts, encrypted: str, command: str) -> None:
    line = scripts.error(2, "list", "-r", encrypted, VMSNAP_PASSPHRASE_COMMAND=command)
    assert "passphrase command" in line and "/no/such" not in line and "open quote" not in line


def test_a_passphrase_command_meets_no_shell(scripts: Scripts, encrypted: str) -> None:
    scripts.error(2, "list", "-r", encrypted, VMSNAP_PASSPHRASE_COMMAND=f"echo $(touch {scripts.folder}/shell)")
    assert not (scripts.folder / "shell").exists()


def test_encryption_none_needs_no_passphrase(scripts: Scripts) -> None:
    repository = str(scripts.folder / "plain")
    made = scripts.json("init", "-r", repository, "--encryption", "none", VMSNAP_PASSPHRASE=SECRET)
    assert made["encryption"] == "none"
    assert scripts.json("list", "-r", repository) == []
    assert "already" in scripts.error(1, "init", "-r", repository)


def test_at_a_terminal_the_passphrase_is_asked_for(scripts: Scripts) -> None:
    repository = str(scripts.folder / "asked")
    shown = on_terminal(scripts, "init", "-r", repository, typed=[SECRET, SECRET])
    assert "Passphrase" in shown and SECRET not in shown
    assert scripts.json("list", "-r", repository, VMSNAP_PASSPHRASE=SECRET) == []
