"""The API without a server: routes, limits, problems, the token."""

import base64
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.images import ImageLimits, image_size
from jobs import serve
from jobs.demo.catalog import sample_rows
from jobs.serving.options import ServiceLimits
from tests.serving import Shop, shop_rows
from tests.waiting import WAIT_SECONDS

RING = {"query": {"parts": [{"text": "red ring"}]}, "k": 2}
PNG = sample_rows(1)[0].image


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def client(shop: Shop) -> Iterator[TestClient]:
    with TestClient(shop.app(limits=ServiceLimits(max_body_bytes=100_000))) as found:
        yield found


def detail(response: Any, status: int) -> str:
    """What a problem says, after a check that it is one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail"}
    assert body["status"] == status
    return body["detail"]


def keys(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    return [hit["key"] for hit in response.json()["hits"]]


def image_part(content: bytes) -> dict[str, Any]:
    return {"query": {"parts": [{"image": base64.b64encode(content).decode()}]}, "k": 1}


def test_a_query_gives_hits_with_scores_columns_and_links(client: TestClient):
    answer = client.post("/search", json=RING).json()
    assert answer["snapshot"] == 1
    assert answer["among"] == "image"
    assert answer["hits"][0] == {
        "key": "k0000",
        "score": 1.0,
        "columns": {"name": "red ring", "price": 5.0, "stock": 0, "new": True},
        "item": "/items/k0000",
        "thumbnail": None,
    }
    assert len(answer["hits"]) == 2


def test_parts_are_weighed_together(client: TestClient):
    parts = [{"key": "k0000"}, {"text": "cup", "weight": 2}, {"image": image_text()}]
    answer = client.post("/search", json={"query": {"parts": parts}, "k": 1})
    assert keys(answer) == ["k0004"]  # a red cup: half of k0000's words, and twice a cup
    assert answer.json()["hits"][0]["score"] == pytest.approx(2.5)


def image_text() -> str:
    return base64.b64encode(PNG).decode()


def test_several_queries_are_answered_in_their_order(client: TestClient):
    queries = [{"parts": [{"text": text}]} for text in ("green lamp", "blue cup")]
    body = client.post("/search", json={"queries": queries, "k": 1}).json()
    assert [answer["hits"][0]["columns"]["name"] for answer in body["answers"]] == [
        "green lamp",
        "blue cup",
    ]


def test_conditions_hold_for_every_hit(client: TestClient):
    where = [
        {"column": "price", "operator": "lt", "value": 9},
        {"column": "new", "operator": "eq", "value": True},
    ]
    assert keys(client.post("/search", json={**RING, "k": 9, "where": where})) == ["k0000", "k0002"]
    where = [{"column": "name", "operator": "in", "value": ["blue cup", "red cup"]}]
    assert keys(client.post("/search", json={**RING, "k": 9, "where": where})) == ["k0004", "k0001"]


def test_get_does_the_same(client: TestClient):
    assert keys(client.get("/search", params={"text": "red ring", "k": 2})) == ["k0000", "k0003"]
    liked = client.get("/search?key=k0001&k=1&where=stock>=5&where=stock<=6")
    assert keys(liked) == ["k0005"]
    assert "either `text` or `key`" in detail(client.get("/search"), 422)
    assert "where" in detail(client.get("/search?text=a&where=nonsense"), 422)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "either `query` or `queries`"),
        ({**RING, "queries": [RING["query"]]}, "either `query` or `queries`"),
        ({"query": {"parts": []}}, "body.query.parts"),
        ({"query": {"parts": [{}]}}, "exactly one of"),
        ({"query": {"parts": [{"text": "a", "key": "b"}]}}, "exactly one of"),
        ({"query": {"parts": [{"text": "a", "weight": 0}]}}, "weight"),
        ({"query": {"parts": [{"text": "a", "weight": -1}]}}, "be near to"),
        ({"query": {"parts": [{"text": "  "}]}}, "query text is empty"),
        ({"query": {"parts": [{"image": "no base64!"}]}}, "no base64"),
        (image_part(b"no picture"), "not_an_image"),
        ({"query": {"parts": [{"key": "nobody"}]}}, "key 'nobody' is not in the store"),
        ({**RING, "k": 0}, "body.k"),
        ({**RING, "k": 1001}, "k=1001: more than 1000"),
        ({**RING, "among": "text"}, "among=text"),
        ({"queries": [RING["query"]] * 65}, "65 at once, more than 64"),
        ({**RING, "where": [{"column": "colour", "operator": "eq", "value": 1}]}, "'colour'"),
        ({**RING, "where": [{"column": "name", "operator": "like", "value": 1}]}, "operator"),
        ({**RING, "unknown": 1}, "unknown"),
        ({"query": {"parts": [{"text": "a"}] * 33}}, "at most 32 items"),
        ({"query": {"parts": [{"text": "a" * 8_001}]}}, "at most 8000 characters"),
        ({"query": {"parts": [{"vector": [1.0] * 8_193}]}}, "at most 8192 items"),
        ({**RING, "where": [{"column": "a", "operator": "eq", "value": 1}] * 101}, "at most 100"),
        ({**RING, "where": [{"column": "a", "operator": "in", "value": [1] * 1001}]}, "1000 items"),
        ({"queries": [{"parts": [{"text": "a"}] * 13}] * 10}, "130 parts, more than 128"),
        ({"queries": [RING["query"]] * 11, "k": 1000}, "more than 10000 hits at once"),
    ],
)
def test_what_cannot_be_asked_says_why(client: TestClient, body: dict, says: str):
    assert says in detail(client.post("/search", json=body), 422)


def test_long_values_are_cut_in_problems(client: TestClient):
    long = "x" * 5_000
    operator = {"operator": "eq", "value": 1}
    bodies: list[dict[str, Any]] = [
        {"query": {"parts": [{"key": long}]}},
        {**RING, "where": [{"column": long, **operator}]},
        {**RING, "where": [{"column": "price", "operator": "in", "value": long}]},
        {**RING, long: 1},
    ]
    for body in bodies:
        assert len(detail(client.post("/search", json=body), 422)) < 300
    for path in (f"/items/{long}", f"/items/{long}/thumbnail", f"/search?text=a&where={long}"):
        said = detail(client.get(path), 422 if "search" in path else 404)
        assert len(said) < 300


def test_a_body_that_is_no_json_is_a_problem(client: TestClient):
    headers = {"Content-Type": "application/json"}
    assert "not JSON" in detail(client.post("/search", content=b"{", headers=headers), 422)
    detail(client.post("/search", content=b"\xff\xfe{}", headers=headers), 422)
    deep = b"[" * 50_000 + b"]" * 40_000
    assert "read as JSON" in detail(client.post("/search", content=deep, headers=headers), 400)


def test_a_large_body_is_refused_however_it_comes(client: TestClient):
    assert "100,000 bytes" in detail(client.post("/search", content=b"x" * 100_001), 413)
    pieces = (b"x" * 50_000 for _ in range(3))  # without a length
    assert "100,000 bytes" in detail(client.post("/search", content=pieces), 413)


def test_an_image_beyond_the_limits_is_refused_before_it_is_decoded(shop: Shop):
    limits = ServiceLimits(max_image_pixels=100, max_image_bytes=10**6)
    with TestClient(shop.app(limits=limits)) as client:
        assert "max_image_pixels is 100" in detail(
            client.post("/search", json=image_part(PNG)), 422
        )
    with TestClient(shop.app(limits=ServiceLimits(max_image_bytes=9))) as client:
        assert "max_image_bytes is 9" in detail(client.post("/search", json=image_part(PNG)), 422)


def test_the_pixels_of_all_images_of_a_request_are_bounded(shop: Shop):
    width, height = image_size(PNG, limits=ImageLimits())
    limits = ServiceLimits(max_image_pixels=width * height)
    with TestClient(shop.app(limits=limits)) as client:
        query = image_part(PNG)["query"]
        assert client.post("/search", json={"queries": [query] * 4}).status_code == 200
        said = detail(client.post("/search", json={"queries": [query] * 5}), 422)
        assert f"{5 * width * height:,} pixels together" in said


@pytest.mark.parametrize(
    "query",
    ["text=a" + "&where=price<9" * 101, "text=" + "a" * 1_001, "text=a&where=name=" + "a|" * 1001],
)
def test_a_get_that_asks_for_too_much_is_no_fault_of_the_service(client: TestClient, query: str):
    detail(client.get(f"/search?{query}"), 422)


def test_queries_are_read_while_other_requests_are_answered(shop: Shop, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()

    def slowly(*args: Any, **options: Any) -> Any:
        entered.set()
        assert go_on.wait(WAIT_SECONDS)
        return image_size(*args, **options)

    monkeypatch.setattr("jobs.serving.asking.image_size", slowly)
    with TestClient(shop.app()) as client, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(client.post, "/search", json=image_part(PNG))
        assert entered.wait(WAIT_SECONDS)
        assert client.get("/health").status_code == 200
        go_on.set()
        assert answer.result().status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("DELETE", "/search", 405), ("GET", "/search/", 404)],
)
def test_other_paths_and_methods_are_problems(client: TestClient, method, path, status):
    assert "/docs lists what" in detail(client.request(method, path), status)


def test_a_bug_is_a_problem_that_gives_nothing_away(client: TestClient, caplog):
    body = {"query": {"parts": [{"text": "boom"}]}}
    said = detail(client.post("/search", json=body), 500)
    assert "a bug" not in said
    assert "RuntimeError: a bug" in caplog.text


def test_items_are_found_by_any_key(tmp_path: Path):
    shop = Shop(tmp_path)
    strange = ["a/b", "ü ?#%", "a%2Fb", "x/thumbnail", "日本", " "]
    rows = dict(zip(strange, shop_rows(len(strange)).values(), strict=True))
    shop.commit(rows)
    with TestClient(shop.app()) as client:
        for hit in client.get("/search?text=ring").json()["hits"]:
            item = client.get(hit["item"]).json()
            assert item["key"] == hit["key"]
            assert item["columns"] == rows[hit["key"]]
        assert "no item 'b'" in detail(client.get("/items/b"), 404)
        assert "not UTF-8" in detail(client.get("/items/%ff"), 404)


def test_integer_keys_stay_integers_and_may_come_as_text(tmp_path: Path):
    shop = Shop(tmp_path)
    large = 2**63 - 1
    shop.commit(dict(zip([7, large], shop_rows(2).values(), strict=True)), key_type="int64")
    with TestClient(shop.app()) as client:
        hits = client.get("/search?text=blue").json()["hits"]
        assert [hit["key"] for hit in hits] == [large, 7]
        assert client.get(f"/items/{large}").json()["key"] == large
        for key in (7, "7"):
            body = {"query": {"parts": [{"key": key}]}}
            assert keys(client.post("/search", json=body)) == [large]
        assert "integers of 64 bits" in detail(client.get("/items/seven"), 404)
        assert "not in the store" in detail(client.get(f"/search?key={2**63}"), 422)


def test_columns_say_what_can_be_asked(client: TestClient):
    body = client.get("/columns").json()
    assert body["columns"][:2] == [
        {"name": "name", "type": "string"},
        {"name": "price", "type": "number"},
    ]
    assert body["among"] == [{"among": "image", "num_rows": 12}]
    assert body["key_type"] == "string"


def test_a_token_is_wanted_where_something_is_told(shop: Shop):
    with TestClient(shop.app(token="s3cret")) as client:
        for path in ("/health", "/ready", "/", "/docs", "/openapi.json", "/favicon.svg"):
            assert client.get(path).status_code == 200
        for path in ("/columns", "/search?text=a", "/items/k0000", "/metrics", "/nothing"):
            response = client.get(path)
            assert "Authorization: Bearer TOKEN" in detail(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer wrong", "Basic s3cret", "s3cret", "Bearer"):
            assert client.get("/columns", headers={"Authorization": wrong}).status_code == 401
        right = {"Authorization": "Bearer s3cret"}
        assert client.get("/columns", headers=right).status_code == 200


def test_a_name_that_is_not_of_this_machine_is_refused(shop: Shop):
    hosts = ("localhost", "127.0.0.1", "[::1]")
    with TestClient(shop.app(hosts=hosts)) as client:
        for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]", "LOCALHOST"):
            assert client.get("/columns", headers={"Host": host}).status_code == 200
        for host in ("evil.example:8000", "evil.example", "127.0.0.1.evil.example", "", "[::2]:80"):
            assert "a token" in detail(client.get("/columns", headers={"Host": host}), 403)
            assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("localhost", "localhost"), ("127.0.0.9",) * 2],
)
def test_on_this_machine_alone_its_names_are_checked(host: str, own: str):
    assert {own, "localhost"} <= set(serve._hosts(host) or ())
    assert serve._hosts("0.0.0.0") is None
    assert serve._hosts("search.example") is None


def test_a_slow_answer_is_a_504_and_others_go_on(tmp_path: Path):
    shop = Shop(tmp_path)
    shop.searchers[1].may_end.clear()
    with TestClient(shop.app(limits=ServiceLimits(max_seconds=0.1))) as client:
        assert "no answer within 0.1 s" in detail(client.post("/search", json=RING), 504)
        assert client.get("/health").status_code == 200
        shop.searchers[1].may_end.set()


def test_more_requests_than_may_be_are_asked_to_come_again(tmp_path: Path):
    shop = Shop(tmp_path)
    shop.searchers[1].may_end.clear()
    limits = ServiceLimits(max_concurrent=2, max_seconds=WAIT_SECONDS)
    with (
        TestClient(shop.app(limits=limits)) as client,
        ThreadPoolExecutor(6) as threads,
    ):
        asked = [threads.submit(client.post, "/search", json=RING) for _ in range(6)]
        refused = [done.result() for done in itertools.islice(as_completed(asked), 4)]
        shop.searchers[1].may_end.set()
        assert [response.status_code for response in refused] == [503] * 4
        assert sorted(done.result().status_code for done in asked) == [200] * 2 + [503] * 4
        assert refused[0].headers["retry-after"] == "1"
        assert "2 requests are being answered already" in detail(refused[0], 503)
        assert client.get("/health").status_code == 200


def test_answers_carry_what_browsers_are_to_heed(client: TestClient):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "'sha256-" in policy
    for response in (page, client.get("/health"), client.get("/nothing")):
        assert response.headers["x-content-type-options"] == "nosniff"
