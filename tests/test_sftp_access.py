"""Getting into an SFTP server: who it is, who we are, and the way there, each as OpenSSH has it; every refusal is one
line that names the cure.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.sshd import PASSWORD, USER, SshServer, make_key
from vmsnap.errors import DriverUnavailable, StorageError, UsageError
from vmsnap_storage_backends.sftp import SftpStorage
from vmsnap_storage_backends.sftp.address import parse_address

pytestmark = pytest.mark.sshd


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd")) as started:
        yield started


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


def configured(tmp_path: Path, server: SshServer, *lines: str) -> Path:
    """A client's configuration that lets nothing in by itself."""
    file = tmp_path / "ssh_config"
    known = () if any(line.startswith("UserKnownHostsFile") for line in lines) else (server.known_hosts,)
    text = [*lines, *(f"UserKnownHostsFile {file}" for file in known), "GlobalKnownHostsFile none", "IdentityFile none"]
    file.write_text("\n".join(["Host *", *text, ""]))
    return file


def failure(server: SshServer, config: Path, user: str = "root", **options: str) -> StorageError:
    """What a call says; the same stands in what doctor finds."""
    backend = SftpStorage(server.url("/tmp/nothing", user), {"config": str(config), **options})
    with pytest.raises(StorageError) as caught:
        list(backend.list())
    assert "\n" not in str(caught.value)
    (finding,) = backend.doctor()
    assert finding.severity == "missing"
    assert finding.cure
    backend.close()
    return caught.value


def gets_in(server: SshServer, config: Path, user: str = "root", url: str = "") -> None:
    backend = SftpStorage(url or server.url("/~/", user).rstrip("/") + "/x", {"config": str(config)})
    assert backend.doctor()[0].message == "its host key is known, and it lets us in"
    backend.close()


# -- URLs


@pytest.mark.parametrize(
    ("url", "shown", "path"),
    [
        ("sftp://host/srv/backups", "sftp://host/srv/backups", "/srv/backups"),
        ("sftp://Alias/x", "sftp://Alias/x", "/x"),
        ("sftp://me@host:2222/~/a//b/./c/", "sftp://me@host:2222/~/a/b/c", "a/b/c"),
        ("sftp://[::1]:22/x%20y", "sftp://[::1]:22/x%20y", "/x y"),
    ],
)
def test_urls(url: str, shown: str, path: str) -> None:
    assert (str(parse_address(url)), parse_address(url).path) == (shown, path)
    assert parse_address(shown) == parse_address(url)


@pytest.mark.parametrize(
    "url",
    [
        "sftp:///x",
        "sftp://host",
        "sftp://host/",
        "sftp://host/~",
        "sftp://host:99999/x",
        "sftp://-oProxyCommand=x/y",
        "sftp://host/x?y",
        "sftp://host/x#y",
        "sftp://-l@host/x",
        "sftp://a%20b/x",
        "sftp://host/a%00b",
        "sftp://host/a%0Ab",
        "http://host/x",
    ],
)
def test_urls_that_name_nothing(url: str) -> None:
    with pytest.raises(UsageError):
        SftpStorage(url)


@pytest.mark.parametrize("url", ["sftp://me:hunter22@host/x", "sftp://me:hunter22@host:bad/x", "sftp://:hunter22@/"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        SftpStorage(url)
    assert "hunter22" not in f"{caught.value} {caught.value!r} {caught.value.__cause__}"


def test_without_paramiko_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("vmsnap_storage_backends.sftp.storage.find_spec", lambda name: None)
    with pytest.raises(DriverUnavailable) as caught:
        SftpStorage("sftp://host/x")
    assert caught.value.cure == "pip install vmsnap[sftp]"


@pytest.mark.parametrize("options", [{"connections": "0"}, {"connections": "many"}, {"timeout": "-1"}])
def test_options_that_are_none(options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        SftpStorage("sftp://host/x", options)


# -- who the server is


def hashed(name: str) -> str:
    salt = secrets.token_bytes(20)
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


def known(tmp_path: Path, server: SshServer, text: str) -> Path:
    """A configuration with that known_hosts file; KEY and PORT stand for those of the server."""
    key = " ".join(server.host_key.with_suffix(".pub").read_text().split()[:2])
    make_key(tmp_path / "other")
    other = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    text = text.replace("OTHERKEY", other).replace("KEY", key).replace("PORT", str(server.port))
    (tmp_path / "known").write_text(f"# a comment\n\nnot a line\n{text}\n")
    return configured(tmp_path, server, f"UserKnownHostsFile {tmp_path}/known", f"IdentityFile {server.key}")


@pytest.mark.parametrize(
    "text",
    [
        "[127.0.0.1]:PORT KEY",
        "other,[127.0.0.*]:PORT KEY a comment",
        "[127.0.0.1]:PORT OTHERKEY\n[127.0.0.1]:PORT KEY",
        "@revoked * OTHERKEY\n[127.0.0.1]:PORT KEY",
        "!elsewhere,* KEY",
    ],
)
def test_known_host_keys(server: SshServer, tmp_path: Path, text: str) -> None:
    gets_in(server, known(tmp_path, server, text))


def test_a_hashed_name(server: SshServer, tmp_path: Path) -> None:
    gets_in(server, known(tmp_path, server, f"{hashed(f'[127.0.0.1]:{server.port}')} KEY"))


def test_a_file_that_ssh_keygen_hashed(server: SshServer, tmp_path: Path) -> None:
    config = known(tmp_path, server, "[127.0.0.1]:PORT KEY")
    (tmp_path / "known").write_text((tmp_path / "known").read_text().replace("not a line\n", ""))
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", tmp_path / "known"], check=True, capture_output=True)
    assert "127.0.0.1" not in (tmp_path / "known").read_text().split("\n")[-2]
    gets_in(server, config)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1 KEY",  # another port may be another server
        "[127.0.0.1]:1 KEY",
        "!*,[127.0.0.1]:PORT KEY",
        "|1|AAAA|AAAA KEY",
        "|1|not base64|x KEY",
        "@cert-authority [127.0.0.1]:PORT KEY",
    ],
)
def test_an_unknown_host_key_is_refused(server: SshServer, tmp_path: Path, text: str) -> None:
    error = failure(server, known(tmp_path, server, text))
    assert "is not known: ssh-ed25519 SHA256:" in error.message
    shown = subprocess.run(["ssh-keygen", "-lf", server.host_key], capture_output=True, text=True, check=True).stdout
    assert shown.split()[1] in error.message
    assert f"ssh-keyscan -p {server.port} 127.0.0.1 >> {tmp_path}/known" in error.cure


def test_a_changed_host_key_is_refused_loudly(server: SshServer, tmp_path: Path) -> None:
    error = failure(server, known(tmp_path, server, "[127.0.0.1]:PORT OTHERKEY"))
    assert "HAS CHANGED" in error.message and f"{tmp_path}/known, line 4" in error.message
    assert "ssh-keygen -R" in error.cure


def test_a_host_that_is_known_by_another_kind_of_key(server: SshServer, tmp_path: Path) -> None:
    make_key(tmp_path / "rsa", kind="rsa")
    key = " ".join((tmp_path / "rsa.pub").read_text().split()[:2])
    assert "HAS CHANGED" in failure(server, known(tmp_path, server, f"[127.0.0.1]:PORT {key}")).message


def test_a_revoked_host_key_is_refused(server: SshServer, tmp_path: Path) -> None:
    error = failure(server, known(tmp_path, server, "[127.0.0.1]:PORT KEY\n@revoked * KEY"))
    assert "REVOKED" in error.message and "line 5" in error.message


def test_a_strict_host_key_checking_of_no_changes_nothing(server: SshServer, tmp_path: Path) -> None:
    nothing = f"UserKnownHostsFile {tmp_path}/nothing"
    config = configured(tmp_path, server, "StrictHostKeyChecking no", nothing, f"IdentityFile {server.key}")
    assert "is not known" in failure(server, config).message
    assert not (tmp_path / "nothing").exists()


def test_the_kind_of_key_that_is_known_is_asked_for(tmp_path: Path) -> None:
    rsa = tmp_path / "rsa"
    make_key(rsa, kind="rsa")
    with SshServer(tmp_path / "two", lines=[f"HostKey {rsa}"]) as server:
        key = " ".join(rsa.with_suffix(".pub").read_text().split()[:2])
        server.known_hosts.write_text(f"[127.0.0.1]:{server.port} {key}\n")
        gets_in(server, server.config_file)


# -- who we are


def test_an_encrypted_key(server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "encrypted"
    key.write_bytes(server.key.read_bytes())
    key.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "hunter22", "-f", key], check=True, capture_output=True)
    config = configured(tmp_path, server, f"IdentityFile {key}")
    assert "encrypted, and no passphrase was given" in failure(server, config).message
    monkeypatch.setenv("VMSNAP_SFTP_KEY_PASSPHRASE", "wrong word")
    error = failure(server, config)
    assert "the passphrase does not open it" in error.message and "wrong word" not in str(error)
    monkeypatch.delenv("VMSNAP_SFTP_KEY_PASSPHRASE")
    (tmp_path / "word").write_text("hunter22\n")
    monkeypatch.setenv("VMSNAP_SFTP_KEY_PASSPHRASE_FILE", str(tmp_path / "word"))
    gets_in(server, config)


@pytest.mark.parametrize("only", [True, False])
def test_a_key_of_the_agent(server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: bool) -> None:
    socket = tmp_path / "agent"
    make_key(tmp_path / "useless")
    with subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL) as agent:
        try:
            while not socket.exists():
                assert agent.poll() is None
            for key in (tmp_path / "useless", server.key):
                environment = {**os.environ, "SSH_AUTH_SOCK": str(socket)}
                subprocess.run(["ssh-add", "-q", key], env=environment, check=True, capture_output=True)
            # The public half alone lies in a file, as for keys that never leave their card.
            public = tmp_path / "card.pub"
            public.write_bytes(server.key.with_suffix(".pub").read_bytes())
            monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
            lines = ["IdentitiesOnly yes", f"IdentityFile {tmp_path}/card"] if only else []
            gets_in(server, configured(tmp_path, server, *lines))
            assert "tried: nothing" in failure(server, configured(tmp_path, server, "IdentityAgent none")).message
            if only:
                error = failure(server, configured(tmp_path, server, "IdentitiesOnly yes"))
                assert "tried: nothing" in error.message
        finally:
            agent.terminate()


def test_an_agent_that_is_gone(server: SshServer, tmp_path: Path) -> None:
    config = configured(tmp_path, server, f"IdentityAgent {tmp_path}/gone", f"IdentityFile {server.key}")
    gets_in(server, config)


def test_a_password(server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tmp_path, server)
    error = failure(server, config, USER)
    assert f"does not let {USER} in" in error.message and "VMSNAP_SFTP_PASSWORD_FILE" in error.cure
    monkeypatch.setenv("VMSNAP_SFTP_PASSWORD", "another word")
    error = failure(server, config, USER)
    assert "tried: the password" in error.message and "another word" not in str(error)
    monkeypatch.setenv("VMSNAP_SFTP_PASSWORD", PASSWORD)
    gets_in(server, config, USER)
    monkeypatch.delenv("VMSNAP_SFTP_PASSWORD")
    monkeypatch.setenv("VMSNAP_SFTP_PASSWORD_COMMAND", f"echo '{PASSWORD}'")
    gets_in(server, config, USER)


def test_a_server_that_wants_key_and_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SshServer(tmp_path / "both", lines=["AuthenticationMethods publickey,password"]) as server:
        error = failure(server, server.config_file, USER)
        assert "the server wants password too" in error.message
        monkeypatch.setenv("VMSNAP_SFTP_PASSWORD", PASSWORD)
        gets_in(server, server.config_file, USER)


def test_a_server_that_takes_few_tries(tmp_path: Path) -> None:
    keys = [tmp_path / f"key{number}" for number in range(3)]
    for key in keys:
        make_key(key)
    with SshServer(tmp_path / "strict", lines=["MaxAuthTries 2"]) as server:
        config = configured(tmp_path, server, *(f"IdentityFile {key}" for key in [*keys, server.key]))
        assert "no more tries" in failure(server, config).cure


def test_a_key_that_is_none(server: SshServer, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key\n")
    error = failure(server, configured(tmp_path, server, f"IdentityFile {tmp_path}/text"))
    assert "it is no key that can be used" in error.message


# -- the way there


def test_the_configuration_counts_and_the_url_before_it(server: SshServer, tmp_path: Path) -> None:
    included = tmp_path / "included"
    included.write_text(f"Match originalhost far user root\nPort {server.port}\n")
    config = tmp_path / "config"
    config.write_text(
        f"Include {included}\n"
        f"Host far\n HostName 127.0.0.1\n User root\n IdentityFile %d/nothing\n IdentityFile {server.key}\n"
        f" HostKeyAlias called-so\n UserKnownHostsFile {tmp_path}/none {tmp_path}/known\n"
    )
    key = " ".join(server.host_key.with_suffix(".pub").read_text().split()[:2])
    (tmp_path / "known").write_text(f"called-so {key}\n")
    gets_in(server, config, url="sftp://root@far/tmp/x")
    backend = SftpStorage("sftp://far:1/tmp/x", {"config": str(config)})
    (finding,) = backend.doctor()
    assert "nothing listens at 127.0.0.1:1" in finding.message


def test_a_configuration_that_ssh_does_not_understand(server: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n  NoSuchWord yes\n")
    backend = SftpStorage(server.url("/x"), {"config": str(config)})
    (finding,) = backend.doctor()
    assert "ssh cannot understand the configuration" in finding.message
    with pytest.raises(UsageError):
        list(backend.list())


def test_a_proxy_command_is_refused(server: SshServer, tmp_path: Path) -> None:
    config = configured(tmp_path, server, f"ProxyCommand touch {tmp_path}/ran")
    backend = SftpStorage(server.url("/x"), {"config": str(config)})
    with pytest.raises(UsageError, match="ProxyJump"):
        list(backend.list())
    assert not (tmp_path / "ran").exists()


def test_without_an_ssh_program(server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "home" / ".ssh"
    folder.mkdir(parents=True)
    (folder / "id_ed25519").write_bytes(server.key.read_bytes())
    (folder / "known_hosts").write_bytes(server.known_hosts.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    backend = SftpStorage(server.url("/tmp/x"))
    assert backend.doctor()[0].severity == "ok"
    (folder / "config").write_text("")
    with pytest.raises(DriverUnavailable) as caught:
        list(SftpStorage(server.url("/tmp/x")).list())
    assert caught.value.cure == "install openssh-client"


def test_through_other_hosts(server: SshServer, tmp_path: Path) -> None:
    with SshServer(tmp_path / "first") as first, SshServer(tmp_path / "second") as second:
        servers = (server, first, second)
        (tmp_path / "known").write_text("".join(each.known_hosts.read_text() for each in servers))
        config = tmp_path / "config"
        config.write_text(
            f"Host one\n HostName 127.0.0.1\n Port {first.port}\n User root\n IdentityFile {first.key}\n"
            f"Host two\n HostName 127.0.0.1\n Port {second.port}\n IdentityFile {second.key}\n"
            f"Host far\n HostName 127.0.0.1\n Port {server.port}\n User root\n IdentityFile {server.key}\n"
            " ProxyJump one,root@two\n"
            f"Host *\n IdentitiesOnly yes\n UserKnownHostsFile {tmp_path}/known\n"
        )
        backend = SftpStorage(f"sftp://far{tmp_path}/place", {"config": str(config)})
        backend.create()
        data = os.urandom(3 << 20)
        backend.put("packs/x", data)
        assert backend.get("packs/x") == data
        assert "Accepted publickey for root" in first.log and "Accepted publickey for root" in second.log
        backend.close()
        config.write_text(config.read_text().replace("ProxyJump one,root@two", "ProxyJump far"))
        with pytest.raises(UsageError, match="circle"):
            list(SftpStorage(f"sftp://far{tmp_path}/place", {"config": str(config)}).list())


def test_what_cannot_be_reached(server: SshServer, tmp_path: Path) -> None:
    config = {"config": str(server.config_file)}
    (finding,) = SftpStorage("sftp://no-such-host.invalid/x", config).doctor()
    assert "no-such-host.invalid" in finding.message and "name" in finding.message
    with SshServer(tmp_path / "gone") as gone:
        url = gone.url("/x")
    (finding,) = SftpStorage(url, config).doctor()
    assert f"nothing listens at 127.0.0.1:{gone.port}" in finding.message


def test_a_server_that_offers_no_sftp(tmp_path: Path) -> None:
    with SshServer(tmp_path / "none", sftp="/nonexistent/sftp-server") as server:
        (finding,) = SftpStorage(server.url("/x"), {"config": str(server.config_file)}).doctor()
        assert finding.severity == "missing"
