"""TLS, mutual TLS, and the operators' server."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from router_stage import Stage, until

from router.admin import AdminServer
from router.server import GatewayConfig
from understudy.errors import ConfigError, Unavailable
from understudy.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from understudy.v1 import inference_pb2 as pb

x509 = pytest.importorskip("cryptography.x509")


@dataclass
class Pair:
    """A key and its certificate, as PEM files."""

    key: Path
    cert: Path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """An authority, a server and a client, by name; made for this test."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    root_key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    pairs = {}
    for name in ("root", "server", "client"):
        key = root_key if name == "root" else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        cert = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(name == "root", None), critical=True)
            .add_extension(names, critical=False)
            .sign(root_key, hashes.SHA256())
        )
        pairs[name] = Pair(folder / f"{name}.key", folder / f"{name}.pem")
        pairs[name].cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        pairs[name].key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return pairs


def channel(stage: Stage, root: Pair, own: Pair | None = None) -> grpc.aio.Channel:
    assert stage.gateway is not None
    credentials = grpc.ssl_channel_credentials(
        root.cert.read_bytes(), own.key.read_bytes() if own else None, own.cert.read_bytes() if own else None
    )
    return grpc.aio.secure_channel(f"127.0.0.1:{stage.gateway.port}", credentials)


async def test_tls(stage: Stage, authority: dict[str, Pair]) -> None:
    server = authority["server"]
    await stage.open(GatewayConfig(port=0, tls_cert=server.cert, tls_key=server.key))
    async with channel(stage, authority["root"]) as safe:
        stub = inference_pb2_grpc.InferenceStub(safe)  # type: ignore[no-untyped-call]
        assert (await stub.ListModels(pb.ListModelsRequest())).models[0].name == "fake"
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # without TLS
        await stage.stub.ListModels(pb.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls_names_the_tenant(stage: Stage, authority: dict[str, Pair]) -> None:
    replica = stage.add_replica()
    server, root = authority["server"], authority["root"]
    config = GatewayConfig(port=0, tls_cert=server.cert, tls_key=server.key, tls_client_ca=root.cert)
    await stage.open(config)
    request = pb.GenerateRequest(text="hi", stopping=pb.Stopping(max_tokens=1))
    async with channel(stage, root, authority["client"]) as known:
        stub = inference_pb2_grpc.InferenceStub(known)  # type: ignore[no-untyped-call]
        async for _ in stub.Generate(request):
            pass
    assert replica.channels[0].sent[0].cache_salt == "client"
    async with channel(stage, root) as unknown:
        stub = inference_pb2_grpc.InferenceStub(unknown)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(pb.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tls_key": None}, "tls_cert and tls_key: give both"),
        ({"tls_cert": Path("/nowhere")}, "tls_cert: /nowhere cannot be read"),
        ({"tls_cert": Path(__file__)}, "is not a PEM file"),
        ({"tls_cert": None, "tls_client_ca": Path("x")}, "tls_client_ca: needs tls_cert"),
    ],
)
async def test_certificates_that_are_none(
    stage: Stage, authority: dict[str, Pair], change: dict[str, Path | None], message: str
) -> None:
    server = authority["server"]
    fields: dict[str, Path | None] = {"tls_cert": server.cert, "tls_key": server.key}
    with pytest.raises(ConfigError, match=message):
        await stage.open(GatewayConfig(port=0, **(fields | change)))  # type: ignore[arg-type]


class Source:
    """What a test says about the service."""

    def __init__(self, answer: admin_pb2.GetStatusResponse | Exception) -> None:
        self.answer = answer

    async def status(self) -> admin_pb2.GetStatusResponse:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def scale_experts(self, model: str, hosts: int) -> str:
        if hosts > 8:
            raise ConfigError(f"{hosts} expert hosts for 8 experts in a layer; 1 to 8 can be had")
        return model or "demo"


async def test_the_operators_server() -> None:
    source = Source(admin_pb2.GetStatusResponse(version="1", uptime_s=2.0))
    server = AdminServer(GatewayConfig(port=0), source)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as plain:
        stub = admin_pb2_grpc.AdminStub(plain)  # type: ignore[no-untyped-call]
        assert await stub.GetStatus(admin_pb2.GetStatusRequest()) == source.answer
        source.answer = Unavailable("the router is gone")
        with pytest.raises(grpc.aio.AioRpcError, match="the router is gone") as caught:
            await stub.GetStatus(admin_pb2.GetStatusRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        source.answer = ConnectionError("the router did not answer within 1 s")
        with pytest.raises(grpc.aio.AioRpcError, match="did not answer within 1 s; try again") as caught:
            await stub.GetStatus(admin_pb2.GetStatusRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        scaled = await stub.ScaleExperts(admin_pb2.ScaleExpertsRequest(hosts=3))
        assert (scaled.model, scaled.hosts) == ("demo", 3)
        with pytest.raises(grpc.aio.AioRpcError, match="hosts: 9 expert hosts for 8 experts") as caught:
            await stub.ScaleExperts(admin_pb2.ScaleExpertsRequest(hosts=9))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        inference = inference_pb2_grpc.InferenceStub(plain)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference.ListModels(pb.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop()
    await server.stop()


async def test_operators_are_not_on_the_clients_port(stage: Stage) -> None:
    gateway = await stage.open()
    assert stage.channel is not None
    stub = admin_pb2_grpc.AdminStub(stage.channel)  # type: ignore[no-untyped-call]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetStatus(admin_pb2.GetStatusRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await until(gateway.pool.alive)
