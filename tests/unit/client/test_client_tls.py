"""TLS and mutual TLS with certificates made for the test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from understudy import Retry, Tls, errors
from understudy.cli import main
from understudy.testing import FakeServer

ONCE = Retry(attempts=1)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca, server and client, each as .pem and .key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("pem")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    (folder / "names").write_text("subjectAltName=DNS:service.test\n")
    for name in ("server", "client"):
        openssl("req", "-new", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-out", f"{name}.pem", "-days", "2", "-extfile", "names"),
        )
    return folder


@pytest.fixture(params=[False, True], ids=["tls", "mutual"])
def secured(request: pytest.FixtureRequest, pem: Path) -> Iterator[tuple[FakeServer, bool]]:
    pair = ((pem / "server.key").read_bytes(), (pem / "server.pem").read_bytes())
    roots = (pem / "ca.pem").read_bytes() if request.param else None
    credentials = grpc.ssl_server_credentials([pair], roots, request.param)
    with FakeServer(credentials=credentials) as server:
        yield server, request.param


def test_a_client_with_the_right_files_is_served(connect: Any, secured: tuple[FakeServer, bool], pem: Path) -> None:
    server, mutual = secured
    own = {"cert": pem / "client.pem", "key": str(pem / "client.key")} if mutual else {}
    tls = Tls(ca=pem / "ca.pem", server_name="service.test", **own)
    assert connect(server.address, tls=tls).call("complete", "Hi").text == "Hello, world"


def test_the_command_line_without_them_speaks_of_tls(secured: tuple[FakeServer, bool]) -> None:
    server, _ = secured
    done = CliRunner().invoke(main.app, ["models", "--address", server.address])
    assert done.exit_code == 1
    assert "--tls-ca" in done.stderr or "TLS" in done.stderr
    assert "make serve" not in done.stderr


def test_a_client_without_them_is_not(connect: Any, secured: tuple[FakeServer, bool], pem: Path) -> None:
    server, mutual = secured
    wrong: list[Tls | bool] = [False, True, Tls(ca=pem / "ca.pem")]  # plaintext, other roots, another name
    if mutual:
        wrong.append(Tls(ca=pem / "ca.pem", server_name="service.test"))
    for tls in wrong:
        with pytest.raises(errors.Unavailable, match=server.address):
            connect(server.address, tls=tls, retry=ONCE).call("complete", "Hi")


def test_files_that_are_not_there_are_named(connect: Any, tmp_path: Path) -> None:
    missing = tmp_path / "no.pem"
    with pytest.raises(errors.ConfigError, match=r"tls\.ca: cannot read .*no\.pem"):
        connect("127.0.0.1:1", tls=Tls(ca=missing)).call("models")
    with pytest.raises(errors.ConfigError, match=r"tls\.cert, tls\.key"):
        connect("127.0.0.1:1", tls=Tls(cert=missing)).call("models")
