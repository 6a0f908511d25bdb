"""Certificates for the tests, made by openssl(1): an authority, a server's, clients' and a list of those revoked."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

from harness import Client, Site

CONF = """\
[ca]
default_ca = this
[this]
database = index
new_certs_dir = .
certificate = ca.pem
private_key = ca.key
serial = serial
crlnumber = crlnumber
default_md = sha256
default_days = 2
unique_subject = no
default_crl_days = 2
policy = any
copy_extensions = copy
x509_extensions = signed
[any]
commonName = supplied
[signed]
authorityKeyIdentifier = keyid
"""


class Authority:
    """An authority in a scratch folder that the store's owner can read.

    Its certificates have the extensions without which Python trusts none, from 3.13 on.
    """

    def __init__(self, site: Site) -> None:
        self.folder = site.root / "authority"
        self.folder.mkdir()
        for name, content in {"index": "", "serial": "01\n", "crlnumber": "01\n", "conf": CONF}.items():
            (self.folder / name).write_text(content)
        self.file = self.folder / "ca.pem"
        self._request("ca", "Test authority", "-x509", "-days", "2", "-addext", "keyUsage=critical,keyCertSign,cRLSign")

    def openssl(self, *arguments: str) -> None:
        result = subprocess.run(["openssl", *arguments], cwd=self.folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    def _request(self, name: str, common_name: str, *options: str) -> None:
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={common_name}"]
        out = f"{name}.pem" if "-x509" in options else f"{name}.csr"
        self.openssl("req", "-new", *kind, "-keyout", f"{name}.key", "-out", out, *options)

    def sign(self, common_name: str) -> tuple[Path, Path]:
        """A certificate for that name, and its key."""
        self._request(common_name, common_name, "-addext", f"subjectAltName=DNS:{common_name}")
        pem = self.folder / f"{common_name}.pem"
        self.openssl("ca", "-batch", "-notext", "-config", "conf", "-in", f"{common_name}.csr", "-out", str(pem))
        return pem, self.folder / f"{common_name}.key"

    def revoked(self, *certificates: Path) -> Path:
        """The list of revoked certificates, with these on it."""
        for certificate in certificates:
            self.openssl("ca", "-config", "conf", "-revoke", str(certificate))
        self.openssl("ca", "-config", "conf", "-gencrl", "-out", "crl.pem")
        return self.folder / "crl.pem"

    def hashed(self) -> Path:
        """A folder with the authority's certificate as openssl rehash leaves it."""
        folder = self.folder / "hashed"
        folder.mkdir()
        shutil.copy(self.file, folder)
        self.openssl("rehash", str(folder))
        return folder

    def client_context(self, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """The settings of a client that trusts nobody else, and shows that certificate."""
        context = ssl.create_default_context(cafile=str(self.file))
        if certificate:
            context.load_cert_chain(*certificate)
        return context


def secure(client: Client, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Says STARTTLS and shakes hands; the socket, which the client uses from now on."""
    assert client.command("STARTTLS") == "220 2.0.0 Ready to start TLS"
    secured = context.wrap_socket(client.sock, server_hostname="mx.example.com")
    client.sock = secured
    return secured
