"""TLS, and SuperNodes that are known by their keys."""

import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from processes import FEDERATION, SMALL, Process, Workplace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()
DAY = datetime.timedelta(days=1)


def certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *extensions: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )
    for extension in extensions:
        critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256())


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def make_certificates(folder: Path) -> None:
    """Write ca.crt, server.crt and server.key."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = certificate(
        "fedseg test CA",
        ca_key,
        "fedseg test CA",
        ca_key,
        x509.BasicConstraints(ca=True, path_length=0),
        key_usage(signs_certificates=True),
    )
    localhost = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    server = certificate(
        "localhost",
        key,
        "fedseg test CA",
        ca_key,
        x509.BasicConstraints(ca=False, path_length=None),
        key_usage(signs_certificates=False),
        x509.SubjectAlternativeName(localhost),
        x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]),
    )
    folder.mkdir()
    (folder / "ca.crt").write_bytes(ca.public_bytes(PEM))
    (folder / "server.crt").write_bytes(server.public_bytes(PEM))
    form = serialization.PrivateFormat.PKCS8
    (folder / "server.key").write_bytes(key.private_bytes(PEM, form, PLAIN))


def make_node_key(path: Path) -> None:
    """Write a node's key pair, OpenSSH's form of a NIST curve."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, PLAIN))
    path.chmod(0o600)
    form = serialization.PublicFormat.OpenSSH
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, form)
    path.with_suffix(".pub").write_bytes(public + b"\n")


@pytest.fixture(scope="module")
def keys(workplace: Workplace) -> Path:
    """A SuperLink with TLS that lets known SuperNodes in only; the folder of all keys."""
    keys = workplace.root / "keys"
    make_certificates(keys)
    workplace.superlink(
        *("--ssl-ca-certfile", keys / "ca.crt"),
        *("--ssl-certfile", keys / "server.crt"),
        *("--ssl-keyfile", keys / "server.key"),
        "--enable-supernode-auth",
    )
    workplace.connection(f'root-certificates = "{keys / "ca.crt"}"')
    return keys


def supernode(workplace: Workplace, keys: Path, name: str, folder: Path) -> Process:
    return workplace.supernode(
        name,
        {"data-dir": str(folder), "device": "cpu", "threads": 1},
        *("--root-certificates", keys / "ca.crt"),
        *("--auth-supernode-private-key", keys / name),
    )


def test_registered_nodes_train_under_their_registered_names(
    workplace: Workplace, keys: Path, phantoms: Path
) -> None:
    for number, name in enumerate(("aachen", "basel")):
        make_node_key(keys / name)
        register = ("flwr", "supernode", "register", keys / f"{name}.pub", FEDERATION)
        workplace.call(*register, "--name", name)
        # Its site.toml says site-0: the registered name wins.
        supernode(workplace, keys, name, phantoms / f"site-{number}")
    run = workplace.deploy({**SMALL, "federation.rounds": 1})
    assert run.status == "finished:completed"
    known = {"verified": True, "simulated": False}
    assert run.manifest()["sites"] == {"aachen": known, "basel": known}
    sites = run.history()[1]["sites"]
    assert {name: site["status"] for name, site in sites.items()} == {"aachen": "ok", "basel": "ok"}


def test_unregistered_node_is_turned_away(workplace: Workplace, keys: Path, phantoms: Path) -> None:
    make_node_key(keys / "stranger")
    node = supernode(workplace, keys, "stranger", phantoms / "site-2")
    assert workplace.finish(node, seconds=60) != 0
    assert "305" in node.text()


def test_node_that_trusts_another_ca_sends_nothing(
    workplace: Workplace, keys: Path, phantoms: Path
) -> None:
    make_certificates(workplace.root / "other")
    node = workplace.supernode(
        "suspicious",
        {"data-dir": str(phantoms / "site-2")},
        *("--root-certificates", workplace.root / "other" / "ca.crt"),
        *("--auth-supernode-private-key", keys / "aachen"),
        *("--max-retries", "1"),
    )
    assert workplace.finish(node, seconds=60) != 0
