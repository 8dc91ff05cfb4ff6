"""Files: kept within a quota, piece by piece, seen by their own organization alone, and never left half done."""

import dataclasses
import io
import json
from typing import Any

import pytest

from apps.accounts.callers import on_thread
from apps.gateway.files import keeping, upkeep
from apps.gateway.models import IdempotentRequest, StoredFile
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange

BOUNDARY = "xxBOUNDARYxx"


def make_body(file: bytes | None = b'{"a": 1}\n', filename: str = "lines.jsonl", **fields: str) -> bytes:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    if file is not None:
        head = f'Content-Disposition: form-data; name="file"; filename="{filename}"\r\nContent-Type: text/plain'
        parts.append(f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + file + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def upload(cast: Cast, body: bytes, parts: list[bytes] | None = None, **headers: str) -> Exchange:
    kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"} | headers
    return Exchange("POST", "/v1/files", key=cast.raw, body=body, parts=parts, headers=kind)


async def get(cast: Cast, path: str, method: str = "GET") -> tuple[int, bytes]:
    head, _, query = path.partition("?")
    exchange = Exchange(method, head, key=cast.raw, query=query)
    body = await exchange.read()
    return exchange.status, body


@pytest.fixture(autouse=True)
def storage(settings: Any, tmp_path: Any) -> Any:
    backend = {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": str(tmp_path)}}
    settings.STORAGES = {**settings.STORAGES, "files": backend}
    return tmp_path


async def test_a_file_comes_back_as_it_went(cast: Cast, storage: Any) -> None:
    data = bytes(range(256)) * 20_000  # 5 MB, and every byte there is
    body = make_body(data, "../../etc/a \u00e9.jsonl", purpose="batch")
    pieces = [body[start : start + 70_001] for start in range(0, len(body), 70_001)]
    exchange = upload(cast, b"", pieces)
    made = await exchange.read_json()
    assert exchange.status == 200, made
    assert (made["object"], made["bytes"], made["filename"]) == ("file", len(data), "a \u00e9.jsonl")
    status, content = await get(cast, f"/v1/files/{made['id']}/content")
    assert status == 200 and content == data
    assert json.loads((await get(cast, f"/v1/files/{made['id']}"))[1]) == made
    assert json.loads((await get(cast, "/v1/files?purpose=batch"))[1])["data"] == [made]
    assert (await get(cast, f"/v1/files/{made['id']}", "DELETE"))[0] == 200
    assert [path for path in storage.rglob("*") if path.is_file()] == []
    for path in (f"/v1/files/{made['id']}", f"/v1/files/{made['id']}/content"):
        assert (await get(cast, path))[0] == 404


RANGES: list[tuple[str, int, slice]] = [
    ("bytes=0-9", 206, slice(0, 10)),
    ("bytes=990-", 206, slice(990, 1000)),
    ("bytes=5-5000", 206, slice(5, 1000)),
    ("Bytes = -7", 206, slice(993, 1000)),
    ("bytes=-5000", 206, slice(0, 1000)),
    ("bytes=1000-", 416, slice(0)),
    ("bytes=-0", 416, slice(0)),
    ("bytes=9-5", 200, slice(0, 1000)),
    ("bytes=0-1,5-6", 200, slice(0, 1000)),
    ("lines=0-1", 200, slice(0, 1000)),
    ("bytes=a-b", 200, slice(0, 1000)),
]


@pytest.mark.parametrize(("wanted", "status", "part"), RANGES)
async def test_a_part_of_a_file(cast: Cast, wanted: str, status: int, part: slice) -> None:
    data = bytes(number % 251 for number in range(1000))
    made = await upload(cast, make_body(data, purpose="batch")).read_json()
    path = f"/v1/files/{made['id']}/content"
    exchange = Exchange("GET", path, key=cast.raw, headers={"range": wanted})
    body = await exchange.read()
    assert exchange.status == status
    if status == 416:
        assert exchange.headers["content-range"] == "bytes */1000"
        assert json.loads(body)["error"]["code"] == "range_not_satisfiable"
        return
    assert body == data[part] and exchange.headers["content-length"] == str(len(body))
    ends = f"bytes {part.start}-{part.stop - 1}/1000" if status == 206 else None
    assert exchange.headers.get("content-range") == ends and exchange.headers["accept-ranges"] == "bytes"
    whole = Exchange("GET", path, key=cast.raw, headers={"range": wanted, "if-range": '"x"'})
    assert await whole.read() == data and whole.status == 200


async def test_lists_come_in_pages(cast: Cast) -> None:
    ids = [(await upload(cast, make_body(purpose="batch")).read_json())["id"] for _ in range(3)]
    first = json.loads((await get(cast, "/v1/files?limit=2"))[1])
    assert [file["id"] for file in first["data"]] == ids[:0:-1] and first["has_more"]
    rest = json.loads((await get(cast, f"/v1/files?limit=2&after={first['last_id']}"))[1])
    assert [file["id"] for file in rest["data"]] == ids[:1] and not rest["has_more"]
    assert json.loads((await get(cast, "/v1/files?order=asc&limit=1"))[1])["data"][0]["id"] == ids[0]
    await on_thread(lambda: StoredFile.objects.filter(public_id=ids[0]).update(expires_at="2026-01-01T00:00:00Z"))
    left = json.loads((await get(cast, "/v1/files"))[1])["data"]
    assert [file["id"] for file in left] == ids[:0:-1], "what has expired does not exist any more"
    for query in ("limit=0", "limit=x", "order=up", "after=file_nope", "purpose=tea", "what=1"):
        assert (await get(cast, f"/v1/files?{query}"))[0] in (400, 404), query


async def test_another_organizations_file_does_not_exist(cast: Cast) -> None:
    made = await upload(cast, make_body(purpose="batch")).read_json()
    stranger = await on_thread(lambda: Cast("bob@example.com"))
    for method, rest in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert (await get(stranger, f"/v1/files/{made['id']}{rest}", method))[0] == 404
    assert json.loads((await get(stranger, "/v1/files"))[1])["data"] == []


BAD: list[tuple[bytes, str | None]] = [
    (make_body(), "purpose"),
    (make_body(purpose="fine-tune"), "purpose"),
    (make_body(None, purpose="batch"), "file"),
    (make_body(purpose="batch", colour="red"), "colour"),
    (make_body(purpose="batch", **{"expires_after[anchor]": "created_at"}), "expires_after"),
    (make_body(purpose="x" * 5000), "purpose"),
    (make_body(purpose="batch")[:-20], "file"),
    (b"nonsense", "file"),
    (b"", "file"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
async def test_bad_uploads(cast: Cast, storage: Any, body: bytes, param: str | None) -> None:
    exchange = upload(cast, body)
    error = (await exchange.read_json())["error"]
    assert (exchange.status, error["param"]) == (400, param), error
    assert await on_thread(StoredFile.objects.count) == 0 and list(storage.rglob("*")) == []


async def test_limits_of_one_file_and_of_all(cast: Cast, settings: Any) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, file_limit_bytes=1000, files_quota_bytes=1500)
    large = upload(cast, make_body(b"x" * 1001, purpose="batch"))
    assert (await large.read_json())["error"]["code"] == "body_too_large" and large.status == 413
    huge = upload(cast, make_body(b"x" * 100_000, purpose="batch"))
    assert (await huge.read_json())["error"]["code"] == "body_too_large"
    first = await upload(cast, make_body(b"x" * 1000, purpose="batch")).read_json()
    full = upload(cast, make_body(b"x" * 501, purpose="batch"))
    assert (await full.read_json())["error"]["code"] == "storage_full" and full.status == 400
    await get(cast, f"/v1/files/{first['id']}", "DELETE")
    assert (await upload(cast, make_body(b"x" * 501, purpose="batch")).read_json())["bytes"] == 501


async def test_what_died_half_way_is_taken_away(cast: Cast, storage: Any) -> None:
    organization_id = cast.organization.public_id

    def make(state: str, **fields: Any) -> StoredFile:
        row = keeping.keep(organization_id, io.BytesIO(b"abc"), filename="f", purpose="batch", size_bytes=3)
        StoredFile.objects.filter(pk=row.pk).update(state=state, **fields)
        return row

    old = "2026-01-01T00:00:00Z"
    await on_thread(lambda: make("uploading", updated_at=old))
    await on_thread(lambda: make("deleting", updated_at=old))
    await on_thread(lambda: make("ready", expires_at=old))
    young = await on_thread(lambda: make("uploading"))
    assert (await get(cast, f"/v1/files/{young.public_id}"))[0] == 404
    assert await on_thread(upkeep.tidy) == 3
    assert await on_thread(lambda: [row.pk for row in StoredFile.objects.all()]) == [young.pk]
    assert len([path for path in storage.rglob("*") if path.is_file()]) == 1


async def test_an_upload_sent_again_is_one_file(cast: Cast) -> None:
    body = make_body(purpose="batch")
    first = await upload(cast, body, **{"idempotency-key": "k"}).read_json()
    again_headers = {"content-type": "multipart/form-data; boundary=other", "idempotency-key": "k"}
    again = Exchange(
        "POST", "/v1/files", key=cast.raw, body=body.replace(BOUNDARY.encode(), b"other"), headers=again_headers
    )
    assert await again.read_json() == first and again.headers["idempotent-replayed"] == "true"
    for changed in (make_body(b"{}", purpose="batch"), make_body(filename="b.jsonl", purpose="batch")):
        other = upload(cast, changed, **{"idempotency-key": "k"})
        assert (await other.read_json())["error"]["code"] == "idempotency_key_reused" and other.status == 422
    # its process died after it had stored the file, and before it had said so
    gone = {"body": None, "status": None, "lease_until": "2026-01-01T00:00:00Z"}
    await on_thread(lambda: IdempotentRequest.objects.update(**gone))
    repeated = await upload(cast, body, **{"idempotency-key": "k"}).read_json()
    assert repeated["id"] == first["id"]
    assert json.loads((await get(cast, "/v1/files"))[1])["data"] == [repeated]
    assert (await get(cast, f"/v1/files/{first['id']}/content"))[1] == b'{"a": 1}\n'
