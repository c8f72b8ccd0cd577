"""Certificates for TLS, of an authority of the test's own, in files as libvirt names them (its ``docs/kbase``)."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFE = datetime.timedelta(days=1)
_PURPOSES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
_USES = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]  # fmt: skip


class Authority:
    """Vouches for servers and clients, for a day."""

    def __init__(self, name: str) -> None:
        """Make its key."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.certificate = self._sign(self._name, self._key.public_key(), host="", authority=True)

    def issue(self, folder: Path, role: str, host: str = "") -> None:
        """Make a folder with a certificate of its own for a ``server`` or ``client``, its key, and the authority's.

        :param host: the name by which a server is reached
        """
        folder.mkdir(mode=0o700, parents=True)
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._sign(_name(f"{role} of the tests"), key.public_key(), host=host, authority=False)
        self.vouch(folder)
        (folder / f"{role}cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
        secret = folder / f"{role}key.pem"
        secret.touch(mode=0o600)
        secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def vouch(self, folder: Path) -> None:
        """Put the authority's own certificate into a folder: whoever uses it trusts this authority."""
        (folder / "cacert.pem").write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, host: str, authority: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        allowed = {"key_cert_sign"} if authority else {"digital_signature", "key_encipherment"}
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _LIFE)
            .not_valid_after(now + _LIFE)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**{use: use in allowed for use in _USES}), critical=True)
        )
        if not authority:
            made = made.add_extension(x509.ExtendedKeyUsage(_PURPOSES), critical=False)
        if host:
            made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return made.sign(self._key, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
