"""Pictures of items, small and the right way up, from real catalogs; and why there is none."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from jobs.serving import thumbnails
from jobs.serving.options import ServiceLimits
from jobs.serving.thumbnails import NoThumbnailError, Thumbnails
from pipelines.catalog_rows import CatalogRows
from pipelines.errors import CatalogError
from pipelines.fetching.fetch_policy import FetchPolicy
from tests.catalogs import write_rows
from tests.serving import Shop
from tests.test_catalog_rows import record
from tests.waiting import WAIT_SECONDS, wait_until


def png(width: int, height: int, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


ROWS: list[dict[str, Any]] = [
    {"key": "k0000", "image": png(800, 400)},
    {"key": "k0001", "image": png(20, 10, "blue")},
    {"key": "k0002", "image": b"no picture"},
    {"key": "k0003", "image": None},
]


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "catalog", ROWS)


def picture(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    assert image.format == "JPEG"
    return image


def test_pictures_are_at_most_256_pixels_a_side_and_kept(catalog: Path, tmp_path: Path):
    shop = Shop(tmp_path, catalog=catalog)
    with TestClient(shop.app()) as client:
        wait_until(lambda: client.get("/ready").json()["thumbnails"] == "ready")
        response = client.get("/items/k0000/thumbnail")
        assert response.headers["content-type"] == "image/jpeg"
        image = picture(response.content)
        assert image.size == (256, 128)
        red, green, blue = image.convert("RGB").getpixel((9, 9))
        assert red > 240
        assert max(green, blue) < 15
        assert picture(client.get("/items/k0001/thumbnail").content).size == (20, 10)
        tag = {"If-None-Match": response.headers["etag"]}
        assert client.get("/items/k0000/thumbnail", headers=tag).status_code == 304
        for key, says in (
            ("k0002", "cannot be shown: not_an_image"),
            ("k0003", "has no image of it"),
            ("nobody", "has no image of it"),
        ):
            response = client.get(f"/items/{key}/thumbnail")
            assert response.status_code == 404
            assert says in response.json()["detail"]
        hit = client.get("/search?text=ring&k=1").json()["hits"][0]
        assert hit["thumbnail"] == "/items/k0000/thumbnail"


def test_pictures_by_uri_are_fetched_within_the_policy(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png(20, 10))
    rows = [{"key": "k0000", "image": str(tmp_path / "a.png")}]
    shop = Shop(tmp_path, catalog=write_rows(tmp_path / "catalog", rows))
    for fetch, status in ((FetchPolicy(), 404), (FetchPolicy(allow=(str(tmp_path),)), 200)):
        with TestClient(shop.app(fetch=fetch)) as client:
            wait_until(lambda: client.get("/ready").json()["thumbnails"] == "ready")
            response = client.get("/items/k0000/thumbnail")
            assert response.status_code == status
            assert status == 200 or "--fetch-allow" in response.json()["detail"]


def test_until_the_keys_are_read_pictures_are_to_be_asked_for_again(catalog: Path, tmp_path: Path):
    go_on = threading.Event()

    def slowly(of: Any) -> CatalogRows:
        assert go_on.wait(WAIT_SECONDS)
        return CatalogRows(of)

    shop = Shop(tmp_path, catalog=catalog)
    app = shop.app()
    app.state.service.thumbnails._open_rows = slowly
    with TestClient(app) as client:
        response = client.get("/items/k0000/thumbnail")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"
        assert client.get("/search?text=ring").status_code == 200
        go_on.set()
        wait_until(lambda: client.get("/items/k0000/thumbnail").status_code == 200)


def test_a_catalog_that_is_gone_costs_the_pictures_alone(tmp_path: Path):
    shop = Shop(tmp_path, catalog=tmp_path / "gone")
    with TestClient(shop.app()) as client:
        wait_until(lambda: client.get("/ready").json()["thumbnails"] == "failed")
        assert client.get("/items/k0000/thumbnail").status_code == 404
        assert client.get("/search?text=ring").json()["hits"][0]["thumbnail"] is None


def test_a_catalog_that_cannot_be_read_for_a_while_is_read_then(catalog: Path, monkeypatch):
    monkeypatch.setattr(thumbnails, "RETRY_SECONDS", 0.01)
    tries: list[Any] = []

    def at_third(of: Any) -> CatalogRows:
        tries.append(of)
        if len(tries) < 3:
            raise CatalogError("its store does not answer")
        return CatalogRows(of)

    found = Thumbnails(open_rows=at_third)
    found.follow(record(catalog))
    wait_until(lambda: found.state == "ready")
    assert len(tries) == 3
    assert found.failure is None
    found.close()


def test_a_catalog_that_is_replaced_while_it_is_read_is_not_shown(catalog: Path, tmp_path: Path):
    go_on, is_done = threading.Event(), threading.Event()

    def slowly(of: Any) -> CatalogRows:
        assert go_on.wait(WAIT_SECONDS)
        rows = CatalogRows(of)
        is_done.set()
        return rows

    found = Thumbnails(open_rows=slowly)
    found.follow(record(catalog))
    found.follow(record(catalog, image=None))
    go_on.set()
    assert is_done.wait(WAIT_SECONDS)
    found._reader.shutdown()
    assert found.state == "none"
    with pytest.raises(NoThumbnailError):
        found.jpeg_of("k0000")
    found.close()


def test_pictures_that_are_shown_keep_to_the_limits_of_the_service(catalog: Path, tmp_path: Path):
    limits = ServiceLimits(max_image_pixels=1000)
    with TestClient(Shop(tmp_path, catalog=catalog).app(limits=limits)) as client:
        wait_until(lambda: client.get("/ready").json()["thumbnails"] == "ready")
        assert "max_image_pixels is 1000" in client.get("/items/k0000/thumbnail").json()["detail"]
        assert client.get("/items/k0001/thumbnail").status_code == 200


def test_pictures_can_be_done_without(catalog: Path, tmp_path: Path):
    with TestClient(Shop(tmp_path, catalog=catalog).app(thumbnails=False)) as client:
        assert client.get("/ready").json()["thumbnails"] == "none"
        assert client.get("/items/k0000/thumbnail").status_code == 404


def test_what_is_kept_is_bounded(catalog: Path, monkeypatch):
    reads: list[Any] = []

    class Counted(CatalogRows):
        def image_of(self, key: Any, *, max_bytes: int) -> Any:
            reads.append(key)
            return super().image_of(key, max_bytes=max_bytes)

    found = Thumbnails(open_rows=Counted)
    found.follow(record(catalog))
    wait_until(lambda: found.state == "ready")
    size = len(found.jpeg_of("k0000"))
    found.jpeg_of("k0000")
    assert reads == ["k0000"]
    monkeypatch.setattr(thumbnails, "MAX_CACHE_BYTES", size)
    found.jpeg_of("k0001")
    found.jpeg_of("k0000")
    assert reads == ["k0000", "k0001", "k0000"]
    found.close()


def test_a_new_catalog_takes_over_once_it_is_read(catalog: Path, tmp_path: Path):
    found = Thumbnails()
    found.follow(record(catalog))
    wait_until(lambda: found.state == "ready")
    with pytest.raises(NoThumbnailError):
        found.jpeg_of("new")
    found.jpeg_of("k0000")
    other = write_rows(tmp_path / "other", [{"key": "new", "image": png(9, 9)}])
    found.follow(record(other))
    wait_until(lambda: found._rows is not None and found._rows._catalog.config.uri == str(other))
    assert picture(found.jpeg_of("new")).size == (9, 9)
    with pytest.raises(NoThumbnailError):
        found.jpeg_of("k0000")
    found.close()
