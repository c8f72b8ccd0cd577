"""What is wrong with an S3 repository is said precisely, by the doctor and by whatever else is tried."""

from __future__ import annotations

import datetime
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.lab.ports import free_port
from tests.proxy import Proxy
from tests.servers.s3 import S3Server
from tests.servers.swift import STRANGER_KEY
from tests.test_cli import Scripts
from vmsnap.errors import DriverUnavailable, StorageError, UsageError, VmsnapError
from vmsnap.model import Finding
from vmsnap.places import create_repository, open_repository, storage_for
from vmsnap_storage_backends.s3 import S3Storage

SECRET = "wJalrXUtnFEMI"


@pytest.fixture
def server(swift_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in swift_server.environment().items():
        monkeypatch.setenv(name, value)
    return swift_server


def diagnosis(url: str, **options: str) -> Finding:
    """The one thing that is wrong, which every use of the place fails with too."""
    storage = S3Storage(url, options)
    wrong = [finding for finding in storage.doctor() if finding.severity == "missing"]
    assert len(wrong) == 1
    assert wrong[0].cure
    storage.close()
    with pytest.raises(VmsnapError):
        create_repository(url, options=options)
    return wrong[0]


def test_a_bucket_that_is_fine(server: S3Server) -> None:
    url = f"s3://{server.new_bucket()}/vmsnap"
    create_repository(url)
    storage = S3Storage(url)
    findings = {finding.message: finding.severity for finding in storage.doctor()}
    assert findings.pop("is reached without TLS: object names and sizes can be seen, and answers changed") == "note"
    assert set(findings.values()) == {"ok"}
    assert {"holds a repository", "can be written to"} <= set(findings)


def test_a_name_that_is_not_resolved(server: S3Server) -> None:
    found = diagnosis("s3://bucket", endpoint="http://s3.nowhere.invalid")
    assert "name of the service is not resolved" in found.message


def test_a_port_that_nobody_listens_on(server: S3Server) -> None:
    found = diagnosis("s3://bucket", endpoint=f"http://127.0.0.1:{free_port()}")
    assert "refuses the connection" in found.message


def test_a_service_that_says_nothing(server: S3Server) -> None:
    with Proxy(("127.0.0.1", server.port)) as proxy:
        server.processes.stop_for_a_while(True)
        try:
            storage = S3Storage("s3://bucket", {"endpoint": f"http://127.0.0.1:{proxy.port}", "timeout": "0.5"})
            [found] = storage.doctor()
        finally:
            server.processes.stop_for_a_while(False)
    assert found.severity == "missing" and "timeout" in found.message.lower()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    import ipaddress

    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def test_a_certificate_that_nobody_trusts_until_its_authority_is_given(server: S3Server, certificate: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with Proxy(("127.0.0.1", server.port), tls=tls) as proxy:
        endpoint, url = f"https://127.0.0.1:{proxy.port}", f"s3://{server.new_bucket()}"
        found = diagnosis(url, endpoint=endpoint)
        assert "certificate of the service is not trusted: self" in found.message
        assert "ca_bundle" in found.cure
        options = {"endpoint": endpoint, "ca_bundle": str(certificate)}
        create_repository(url, options=options)
        assert all(finding.severity == "ok" for finding in S3Storage(url, options).doctor())


def test_keys_that_are_wrong(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{server.new_bucket()}"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    found = diagnosis(url)
    assert "SignatureDoesNotMatch" in found.message and "AWS_SECRET_ACCESS_KEY" in found.cure
    assert SECRET not in str(found)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test:nobody")
    found = diagnosis(url)
    assert "InvalidAccessKeyId" in found.message or "SignatureDoesNotMatch" in found.message
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials" in diagnosis(url).message
    monkeypatch.setenv("AWS_PROFILE", "production")
    assert "production" in diagnosis(url).message


def test_a_clock_that_is_wrong(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.auth

    url, right = f"s3://{server.new_bucket()}", botocore.auth.get_current_datetime
    # The clock that requests are signed by: this machine's own cannot be set for one test.
    monkeypatch.setattr(
        botocore.auth, "get_current_datetime", lambda *a, **k: right(*a, **k) + datetime.timedelta(hours=1)
    )
    found = diagnosis(url)
    assert "clock" in found.message and "NTP" in found.cure


def test_a_bucket_that_is_not_there(server: S3Server) -> None:
    found = diagnosis("s3://no-such-bucket/prefix")
    assert "NoSuchBucket" in found.message and "aws s3 mb" in found.cure


def test_a_bucket_that_others_own(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = server.new_bucket()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", STRANGER_KEY)
    assert "AccessDenied" in diagnosis(f"s3://{bucket}").message
    server.client().put_bucket_acl(Bucket=bucket, ACL="public-read")
    found = diagnosis(f"s3://{bucket}")
    assert "cannot be written to" in found.message and "AccessDenied" in found.message


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["config", "data/00/0011", "snapshots/abc"], "restic"),
        (["kopia.repository.f"], "Kopia"),
        (["photos/1.jpg"], "holds what is not vmsnap's: photos/"),
    ],
)
def test_a_bucket_that_another_tool_uses(server: S3Server, keys: list[str], said: str) -> None:
    bucket = server.new_bucket()
    for key in keys:
        server.client().put_object(Bucket=bucket, Key=key, Body=b"theirs")
    assert said in diagnosis(f"s3://{bucket}").message
    left = server.client().list_objects_v2(Bucket=bucket)["Contents"]
    assert sorted(entry["Key"] for entry in left) == sorted(keys)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/prefix",
        f"s3://{SECRET}@bucket",
        f"s3://bucket/prefix?secret={SECRET}",
        f"s3://bucket#{SECRET}",
        f"sftp://user:{SECRET}@host/path",
    ],
)
def test_a_url_with_a_secret_is_refused(url: str) -> None:
    for use in (open_repository, create_repository, storage_for):
        with pytest.raises(UsageError) as caught:
            use(url)
        assert SECRET not in f"{caught.value!r} {caught.value}"


def test_a_url_with_a_secret_is_shown_nowhere(tmp_path: Path) -> None:
    url, scripts = f"s3://AKIAEXAMPLE:{SECRET}@bucket/prefix", Scripts(tmp_path)
    (tmp_path / "config.toml").write_text(f'repository = "{url}"\n')
    for words in (["doctor", "-r", url], ["init", "-r", f"s3://{SECRET}@bucket", "--debug"], ["list"]):
        done = scripts.run(*words, environment={"VMSNAP_CONFIG": str(tmp_path / "config.toml")})
        assert done.returncode == 2
        assert SECRET not in done.stdout + done.stderr
    (tmp_path / "config.toml").unlink()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()
    scripts.close()


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("s3://", {}, "bucket"),
        ("s3://b!", {}, "bucket name"),
        ("s3:///prefix", {}, "bucket name"),
        ("s3://bucket/a/../b", {}, "prefix"),
        ("s3://bucket/" + "x" * 900, {}, "too long"),
        ("s3://bucket", {"endpoint": "s3.example.com"}, "no URL"),
        ("s3://bucket", {"endpoint": f"https://user:{SECRET}@host"}, "user or password"),
        ("s3://bucket", {"timeout": "soon"}, "timeout"),
        ("s3://bucket", {"object_lock": "compliance"}, "go together"),
        ("s3://bucket", {"object_lock": "compliance", "object_lock_days": "-1"}, "object_lock_days"),
        ("s3://bucket", {"addressing": "sideways"}, "is no choice"),
        ("s3://bucket", {"endpont": "x"}, "has no option"),
    ],
)
def test_wrong_urls_and_options(url: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        storage_for(url, options)
    assert SECRET not in str(caught.value)


def test_without_boto3_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(DriverUnavailable, match=r"pip install 'vmsnap\[s3\]'"):
        open_repository("s3://bucket")


def test_wasting_no_time_on_a_service_that_was_never_there(server: S3Server) -> None:
    storage = storage_for("s3://bucket", {"endpoint": f"http://127.0.0.1:{free_port()}"})
    with pytest.raises(StorageError, match="refuses the connection") as caught:
        storage.get("config")
    assert not getattr(caught.value, "__notes__", ())  # it was not tried again


@pytest.fixture
def scripts(tmp_path: Path, server: S3Server) -> Iterator[Scripts]:
    made = Scripts(tmp_path)
    made.environment |= server.environment()
    yield made
    made.close()


def test_the_console_script(scripts: Scripts, server: S3Server) -> None:
    url = f"s3://{server.new_bucket()}/vmsnap"
    del scripts.environment["AWS_ENDPOINT_URL"]
    endpoint = f"endpoint={server.endpoint}"
    config = scripts.folder / "config.toml"
    made = scripts.json("init", url, "-o", endpoint, script="vmsnap-s3")
    assert (made["repository"], made["encryption"]) == (url, "none")
    config.write_text(f'repository = "{url}"\n[storage.s3]\nendpoint = "{server.endpoint}"\n')
    assert scripts.json("list", VMSNAP_CONFIG=str(config)) == []
    assert scripts.json("list", "-r", url, "--storage-option", endpoint) == []
    assert scripts.json("list", url, "-o", endpoint, script="vmsnap-s3") == []
    assert scripts.json("check", url, "-o", endpoint, script="vmsnap-s3")["damaged"] is False
    found = scripts.json("doctor", url, "-o", endpoint, script="vmsnap-s3")
    assert "holds a repository" in {finding["message"] for finding in found}
    bench = scripts.json("bench", url, "-o", endpoint, "--size", "20M", script="vmsnap-s3")
    assert bench["objects"] == 2 and bench["put_bytes_per_second"] > 0
    assert "serves s3:// only" in scripts.error(2, "list", "/srv/backups", script="vmsnap-s3")
    assert "has no option" in scripts.error(2, "list", url, "-o", "endpont=x", script="vmsnap-s3")
    shown = scripts.text("drivers", "show", "s3")
    assert "object_lock_days" in shown
