"""The routes of the API.

Knows nothing of who is let in (`admission`) or how a query is answered (`asking`).
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from prometheus_client.metrics_core import Metric
from pydantic import ValidationError

from jobs.serving import bodies
from jobs.serving.admission import item_key
from jobs.serving.asking import answer, item_of, known_key
from jobs.serving.metrics import MEDIA_TYPE, exposition
from jobs.serving.problems import Problem
from jobs.serving.service import Service
from jobs.serving.thumbnails import NoThumbnailError
from pipelines.errors import QueryError
from pipelines.indexes.filters import Condition, parse_condition
from pipelines.indexes.shown import shown
from pipelines.schema import Modality

AllFamilies = Callable[[], Awaitable[Sequence[tuple[str, Sequence[Metric]]]]]


def add_routes(app: FastAPI, service: Service, *, all_families: AllFamilies | None) -> None:
    """Add all routes to an app; `all_families` as in `make_app`."""
    _add_search(app, service)
    _add_items(app, service)
    _add_state(app, service, all_families=all_families)


def _add_search(app: FastAPI, service: Service) -> None:
    async def answered(body: bodies.SearchBody) -> Response:
        found = await answer(
            body,
            opened=service.opened,
            batcher=service.batcher,
            limits=service.config.limits,
            shows_pictures=service.shows_pictures,
        )
        return Response(found, media_type="application/json")

    @app.post(
        "/search",
        summary="Search by texts, images, items and vectors.",
        response_model=bodies.OneAnswerBody | bodies.AnswersBody,
    )
    async def search(body: bodies.SearchBody) -> Response:
        """One query gives its hits, several give `answers` in their order."""
        return await answered(body)

    @app.get(
        "/search",
        summary="Search by a text or an item, from a browser or with curl.",
        response_model=bodies.OneAnswerBody,
    )
    async def search_words(
        text: Annotated[
            str | None,
            Query(
                max_length=bodies.MAX_URL_TEXT_CHARACTERS, description="What to look for, in words."
            ),
        ] = None,
        key: Annotated[str | None, Query(description="Or: something like this item.")] = None,
        k: Annotated[int, Query(ge=1, description="Hits.")] = 10,
        where: Annotated[
            list[str],
            Query(
                max_length=bodies.MAX_CONDITIONS,
                description="Conditions such as `brand=acme`, `price<20`; all hold.",
            ),
        ] = [],  # noqa: B006 - FastAPI copies it
        among: Annotated[
            Modality | None, Query(description="Which embeddings are searched.")
        ] = None,
    ) -> Response:
        if (text is None) == (key is None):
            raise Problem(422, "give either `text` or `key`: /search?text=a+red+ring")
        try:
            conditions = [_condition_body(parse_condition(condition)) for condition in where]
        except ValidationError as error:
            raise Problem(422, f"where: {error.errors()[0]['msg']}") from error
        except QueryError as error:
            raise Problem(422, f"where: {error}") from error
        query = bodies.QueryBody(parts=[bodies.PartBody(text=text, key=key)])
        return await answered(bodies.SearchBody(query=query, k=k, where=conditions, among=among))


def _condition_body(condition: Condition) -> bodies.ConditionBody:
    value = condition.value
    return bodies.ConditionBody(
        column=condition.column,
        operator=condition.operator,
        value=list(value) if isinstance(value, tuple) else value,
    )


def _add_items(app: FastAPI, service: Service) -> None:
    @app.get("/items/{key}", summary="One item: its carried columns.")
    async def item(key: str) -> bodies.ItemBody:
        """A slash within the key is written %2F."""
        return await asyncio.to_thread(
            item_of, service.opened, item_key(key), shows_pictures=service.shows_pictures
        )

    @app.get(
        "/items/{key}/thumbnail",
        summary="The picture of an item, at most 256 pixels a side.",
        response_class=Response,
        responses={
            200: {"content": {"image/jpeg": {}}, "description": "A JPEG."},
            304: {"description": "It is what If-None-Match names."},
        },
    )
    async def thumbnail(key: str, request: Request) -> Response:
        """404 for an item without a picture; 503 while the catalog's keys are being read."""
        thumbnails = service.thumbnails
        known = known_key(service.opened, item_key(key))
        if thumbnails.state == "reading":
            raise Problem(
                503,
                "the keys of the catalog are being read, there are no pictures yet; ask again",
                headers={"Retry-After": "2"},
            )
        try:
            jpeg = await asyncio.get_running_loop().run_in_executor(
                thumbnails.threads, thumbnails.jpeg_of, known
            )
        except NoThumbnailError as error:
            raise Problem(404, f"no picture of {shown(known)}: {error}") from error
        tag = f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": "private, max-age=300"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(jpeg, media_type="image/jpeg", headers=headers)


def _add_state(app: FastAPI, service: Service, *, all_families: AllFamilies | None) -> None:
    @app.get("/columns", summary="What can be asked: columns, embeddings, limits.")
    async def columns() -> bodies.ColumnsBody:
        """Carried columns and their types; what can be searched, the default first."""
        opened = service.opened
        first = next(iter(opened.searchers.values()))
        return bodies.ColumnsBody.model_validate(
            {
                "snapshot": opened.snapshot.number,
                "created_at": opened.snapshot.created_at,
                "key_type": opened.snapshot.key_type,
                "columns": [{"name": name, "type": kind} for name, kind in first.columns.items()],
                "among": [
                    {"among": modality, "num_rows": searcher.num_rows}
                    for modality, searcher in opened.searchers.items()
                ],
                "thumbnails": service.thumbnails.state,
                "max_hits": service.config.limits.max_hits,
                "max_image_bytes": service.config.limits.max_image_bytes,
            }
        )

    @app.get("/health", summary="Whether the process lives.")
    async def health() -> bodies.HealthBody:
        """Always ok, if there is an answer at all."""
        return bodies.HealthBody()

    @app.get("/ready", summary="Whether queries are answered, and from which snapshot.")
    async def ready() -> bodies.ReadyBody:
        """503 until the index and the engine are loaded."""
        return bodies.ReadyBody(
            snapshot=service.opened.snapshot.number,
            failure=service.live.failure,
            thumbnails=service.thumbnails.state,
        )

    @app.get(
        "/metrics",
        summary="Counts for Prometheus.",
        response_class=Response,
        responses={200: {"content": {MEDIA_TYPE: {}}, "description": "Prometheus text."}},
    )
    async def metrics() -> Response:
        """Of all replicas, each with its label."""
        replicas: Sequence[tuple[str, Sequence[Metric]]]
        if all_families is None:
            replicas = [(service.replica, service.metrics.families())]
        else:
            replicas = await all_families()
        return Response(exposition(replicas), media_type=MEDIA_TYPE)
