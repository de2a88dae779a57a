"""The dialect of S3 (moto's server), and credentials (a server that looks at who signs)."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError
from pipelines.remote import RemoteError, RemoteStore
from pipelines.remote.failures import Failure
from tests.helpers.fault_server import FaultServer
from tests.helpers.s3 import s3_server, send, use

DATA = random.Random(0).randbytes(100_000)
QUICK: Any = {"silence_s": 5.0, "connect_s": 1.0, "first_wait_s": 0.02, "max_tries": 2}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def store(endpoint, monkeypatch, request) -> Iterator[RemoteStore]:
    use(monkeypatch, endpoint)
    with RemoteStore(f"s3://bucket/{request.node.name}/prefix", **QUICK) as store:
        yield store


def test_put_list_and_get(store):
    assert store.put("x.beton", DATA)
    assert store.put("deep/y.rows", DATA[:9])
    found = store.list()
    assert [(each.path, each.num_bytes) for each in found] == [("deep/y.rows", 9), ("x.beton", 100_000)]
    assert store.list(".rows") == found[:1]
    etag = found[1].etag
    assert store.info("x.beton") == found[1]
    assert store.info("z") is None
    assert store.get_whole("x.beton", 10**6) == (DATA, etag)
    assert store.get("x.beton", 5, 50, etag) == DATA[5:50]
    assert b"".join(store.stream("x.beton", 7)) == DATA[7:]
    store.put("x.beton", DATA[::-1])
    with pytest.raises(RemoteError, match=r"prefix/x\.beton: has changed"):
        store.get("x.beton", 5, 50, etag)
    with pytest.raises(RemoteError, match="z: no such object"):
        store.get("z", 5, 50)
    with pytest.raises(RemoteError, match="is shorter"):
        store.get("deep/y.rows", 5, 50)
    assert store.retries == {}


def test_only_the_prefix_is_listed(store):
    store.put("x", b"1")
    with RemoteStore(store.shown + "2", **QUICK) as other:
        other.put("y", b"2")
        assert [each.path for each in other.list()] == ["y"]
    assert [each.path for each in store.list()] == ["x"]


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("from_file", [False, True])
def test_one_writer_creates(store, tmp_path, monkeypatch, in_parts, from_file):
    """The second one sees nothing yet when it begins. (moto looks and then writes: a real race would be moto's own.)"""
    num_bytes = 1000
    if in_parts:
        num_bytes = 12 << 20
        monkeypatch.setattr("pipelines.remote.store._SINGLE_PUT_BYTES", 1 << 20)
        monkeypatch.setattr("pipelines.remote.store._PART_BYTES", 5 << 20)
    contents: list[bytes] = [random.Random(i).randbytes(num_bytes) for i in range(3)]
    paths = [tmp_path / str(i) for i in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    data = paths if from_file else contents
    assert store.put("x", data[0], create_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(store, "info", lambda path: None)
        assert not store.put("x", data[1], create_only=True)
    assert not store.put("x", data[1], create_only=True)
    assert b"".join(store.stream("x")) == contents[0]
    assert store.put("x", data[2])
    assert b"".join(store.stream("x")) == contents[2]
    assert [each.path for each in store.list()] == ["x"]  # nothing of the uploads is left
    assert in_parts == ("-" in (store.list()[0].etag or ""))


@pytest.mark.parametrize("is_own", [True, False])
def test_an_object_whose_answer_was_lost_is_our_own(store, monkeypatch, is_own):
    """The first try writes it, the connection is cut, and the second is told that it exists."""
    send_request = store._try
    num_tries = 0

    def lose_the_first(action, opened):
        nonlocal num_tries
        num_tries += 1
        if num_tries > 1:
            return send_request(action, opened)
        if is_own:
            send_request(action, opened)
        else:
            opened.put("x", DATA[:99] + b"!")
        return Failure("connection cut", is_final=False)

    monkeypatch.setattr(store, "_try", lose_the_first)
    assert store.put("x", DATA[:100], create_only=True) is is_own


def test_wrong_credentials(store, endpoint, monkeypatch):
    store.put("x", b"1")
    send(f"{endpoint}/moto-api/reset-auth", "POST", b"0")  # from now on they are checked
    try:
        with pytest.raises(RemoteError, match=r"x: not allowed \(403\)") as caught:
            store.get("x", 0, 1)
        assert "AKIAONE" not in str(caught.value)
        with pytest.raises(RemoteError, match=r"not allowed \(403\)"):
            store.list()
        assert store.retries == {}
    finally:
        send(f"{endpoint}/moto-api/reset-auth", "POST", b"inf")
    assert store.get("x", 0, 1) == b"1"


def test_a_bucket_that_is_not_there(store):
    with RemoteStore("s3://no-such-bucket/p", **QUICK) as other:
        with pytest.raises(RemoteError, match="s3://no-such-bucket/p/x: no such object"):
            other.get("x", 0, 1)
        with pytest.raises(RemoteError, match="s3://no-such-bucket/p: no such object"):
            other.list()
        with pytest.raises(RemoteError, match="s3://no-such-bucket/p/x: no such object"):
            other.put("x", b"")


# ------------------------------------------------------------------ credentials


@pytest.fixture
def signed() -> Iterator[FaultServer]:
    """A server that speaks enough of S3 for a GET."""
    with FaultServer({"bucket/p/x": DATA}) as server:
        yield server


def key_of(server: FaultServer) -> list[str]:
    """Who signed each request."""
    texts = [seen.authorization or "" for seen in server.requests]
    return [text.partition("Credential=")[2].partition("/")[0] for text in texts]


def write_profile(path: Path, key: str, name: str = "default") -> None:
    path.write_text(
        f"[{name}]\naws_access_key_id = {key}\naws_secret_access_key = secret-7f\naws_session_token = token-7f\n"
    )


def use_profile(monkeypatch: pytest.MonkeyPatch, server: FaultServer, path: Path) -> None:
    use(monkeypatch, server.url, key="")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))


def test_credentials_of_the_environment(signed, monkeypatch):
    use(monkeypatch, signed.url, key="AKIATWO")
    with RemoteStore("s3://bucket/p", **QUICK) as store:
        assert store.get("x", 0, 9) == DATA[:9]
    assert key_of(signed) == ["AKIATWO"]


def test_a_public_bucket(signed, monkeypatch):
    use(monkeypatch, signed.url, key="")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with RemoteStore("s3://bucket/p", **QUICK) as store:
        assert store.get("x", 0, 9) == DATA[:9]
    assert key_of(signed) == [""]


def test_credentials_of_a_profile(signed, monkeypatch, tmp_path):
    write_profile(tmp_path / "credentials", "AKIATHREE", "team")
    use_profile(monkeypatch, signed, tmp_path / "credentials")
    monkeypatch.setenv("AWS_PROFILE", "team")
    with RemoteStore("s3://bucket/p", **QUICK) as store:
        assert store.get("x", 0, 9) == DATA[:9]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAFOUR")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with RemoteStore("s3://bucket/p", **QUICK) as store:
        assert store.get("x", 0, 9) == DATA[:9]
    assert key_of(signed) == ["AKIATHREE", "AKIAFOUR"]


def test_a_profile_without_keys(signed, monkeypatch, tmp_path):
    write_profile(tmp_path / "credentials", "AKIATHREE", "team")
    use_profile(monkeypatch, signed, tmp_path / "credentials")
    monkeypatch.setenv("AWS_PROFILE", "other")
    with RemoteStore("s3://bucket/p", **QUICK) as store, pytest.raises(DataError, match="AWS_PROFILE=other: no aws_"):
        store.get("x", 0, 9)
    (tmp_path / "credentials").write_text("secret-7f")
    with RemoteStore("s3://bucket/p", **QUICK) as store:
        with pytest.raises(DataError, match="credentials: not a file of AWS profiles") as caught:
            store.get("x", 0, 9)
        assert "secret-7f" not in str(caught.value)
        assert caught.value.__context__ is None


@pytest.mark.parametrize("fault", ["403-expired", "400-expired", "403", "401"])
def test_new_credentials_are_taken_when_the_old_ones_have_ended(signed, monkeypatch, tmp_path, fault):
    write_profile(tmp_path / "credentials", "AKIAOLD")
    use_profile(monkeypatch, signed, tmp_path / "credentials")
    with RemoteStore("s3://bucket/p", num_threads=4, **QUICK) as store:
        store.get("x", 0, 9)
        write_profile(tmp_path / "credentials", "AKIANEW")
        assert store.get("x", 0, 9) == DATA[:9]
        signed.plan("bucket/p/x", fault)
        assert store.get("x", 9, 20) == DATA[9:20]
        assert store.retries == {"new credentials": 1}
    assert key_of(signed) == ["AKIAOLD", "AKIAOLD", "AKIAOLD", "AKIANEW"]


def test_many_threads_take_new_credentials_once(signed, monkeypatch, tmp_path):
    write_profile(tmp_path / "credentials", "AKIAOLD")
    use_profile(monkeypatch, signed, tmp_path / "credentials")
    with RemoteStore("s3://bucket/p", num_threads=4, **QUICK) as store:
        store.get("x", 0, 9)
        write_profile(tmp_path / "credentials", "AKIANEW")
        signed.plan("bucket/p/x", *4 * ["403-expired"])
        barrier = threading.Barrier(4)
        send_request = store._try
        monkeypatch.setattr(store, "_try", lambda *each: (barrier.wait(10), send_request(*each))[1])
        futures = [store.submit("x", first, first + 9) for first in range(4)]
        assert [future.result(10) for future in futures] == [DATA[first : first + 9] for first in range(4)]
        assert store.retries == {"new credentials": 1}
    assert key_of(signed) == 5 * ["AKIAOLD"] + 4 * ["AKIANEW"]


def test_credentials_that_have_ended_and_are_not_renewed(signed, monkeypatch):
    use(monkeypatch, signed.url)
    signed.always("bucket/p/x", "403-expired")
    with RemoteStore("s3://bucket/p", **QUICK) as store:
        with pytest.raises(
            RemoteError, match="s3://bucket/p/x: the credentials have ended: renew them and start again"
        ):
            store.get("x", 0, 9)
        assert len(signed.requests) == 2


def test_no_access_with_the_same_credentials_is_final(signed, monkeypatch):
    use(monkeypatch, signed.url)
    signed.always("bucket/p/x", "403")
    with RemoteStore("s3://bucket/p", **QUICK) as store, pytest.raises(RemoteError, match=r"not allowed \(403\)"):
        store.get("x", 0, 9)
    assert len(signed.requests) == 1


def test_half_a_key_is_no_credentials(signed, monkeypatch):
    use(monkeypatch, signed.url)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with (
        RemoteStore("s3://bucket/p", **QUICK) as store,
        pytest.raises(RemoteError, match="s3://bucket/p: cannot be opened: check the URL, and the credentials"),
    ):
        store.get("x", 0, 9)


def test_no_credentials_at_all(signed, monkeypatch):
    """The machine's metadata server is asked; here it is one that knows nothing."""
    use(monkeypatch, signed.url, key="")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://169.254.1.1:1")
    with RemoteStore("s3://bucket/p", **QUICK) as store, pytest.raises(RemoteError, match="no credentials: none in"):
        store.get("x", 0, 9)
    assert signed.requests == []
