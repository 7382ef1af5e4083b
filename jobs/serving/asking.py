"""Turns the JSON of a request into queries of the open snapshot, and its answers into JSON.

Knows nothing of routes; what a caller can cause is a Problem. What takes long is done in threads,
so that the event loop goes on.
"""

import asyncio
from collections.abc import Sequence
from urllib.parse import quote

from engine.images import ImageRejected, image_size
from jobs.serving.batching import Asked, Batcher
from jobs.serving.bodies import (
    AnswerBody,
    AnswersBody,
    HitBody,
    ItemBody,
    OneAnswerBody,
    SearchBody,
    stored_key,
)
from jobs.serving.live import Opened
from jobs.serving.options import ServiceLimits
from jobs.serving.problems import Problem
from pipelines.errors import QueryError
from pipelines.indexes.filters import conditions_from_json
from pipelines.indexes.queries import Query
from pipelines.indexes.shown import shown
from pipelines.schema import Modality
from pipelines.search import Answer, Searcher


async def answer(
    body: SearchBody,
    *,
    opened: Opened,
    batcher: Batcher,
    limits: ServiceLimits,
    shows_pictures: bool,
) -> bytes:
    """Answer one query or several; Problem 422 for what cannot be asked.

    Returns:
        The JSON of a OneAnswerBody, or of an AnswersBody for several.
    """
    modality = _modality(opened, body.among)
    searcher = opened.searchers[modality]
    try:
        asked = await asyncio.to_thread(_asked, body, searcher=searcher, limits=limits)
        answers = await batcher.ask(asked)
    except (QueryError, ImageRejected) as error:
        raise Problem(422, str(error)) from error
    return await asyncio.to_thread(
        _answer_json,
        answers,
        modality=modality,
        are_several=body.queries is not None,
        shows_pictures=shows_pictures,
    )


def item_of(opened: Opened, key_text: str, *, shows_pictures: bool) -> ItemBody:
    """An item by its key as text; Problem 404 if it is not in the store."""
    key = known_key(opened, key_text)
    for searcher in opened.searchers.values():
        columns = searcher.columns_of(key)
        if columns is not None:
            return ItemBody(
                key=key,
                columns=dict(columns),
                thumbnail=thumbnail_path(key) if shows_pictures else None,
                snapshot=opened.snapshot.number,
            )
    raise Problem(
        404, f"no item {shown(key)} in snapshot {opened.snapshot.number}; search for what there is"
    )


def known_key(opened: Opened, key_text: str) -> str | int:
    """A key of the store's type; Problem 404 if the text is none."""
    try:
        return stored_key(key_text, key_is_int=_key_is_int(opened))
    except QueryError as error:
        raise Problem(404, f"no such item: {error}") from error


def item_path(key: str | int) -> str:
    """Where an item is."""
    return f"/items/{quote(str(key), safe='')}"


def thumbnail_path(key: str | int) -> str:
    """Where an item's picture is."""
    return f"{item_path(key)}/thumbnail"


def _key_is_int(opened: Opened) -> bool:
    return opened.snapshot.key_type == "int64"


def _modality(opened: Opened, among: Modality | None) -> Modality:
    if among is None:
        return next(iter(opened.searchers))
    if among not in opened.searchers:
        there = ", ".join(opened.searchers)
        raise Problem(422, f"among={among}: this service searches {there} alone")
    return among


def _asked(body: SearchBody, *, searcher: Searcher, limits: ServiceLimits) -> Asked:
    """What the batcher is to ask; Problem or ValueError for what cannot be asked."""
    bodies = [query for query in [body.query, *(body.queries or ())] if query is not None]
    if len(bodies) > limits.max_queries:
        raise Problem(
            422,
            f"queries: {len(bodies)} at once, more than {limits.max_queries}; send them in several "
            "requests",
        )
    if body.k > limits.max_hits:
        raise Problem(422, f"k={body.k}: more than {limits.max_hits}; ask for fewer hits")
    if len(bodies) * body.k > limits.max_total_hits:
        raise Problem(
            422,
            f"k={body.k} for {len(bodies)} queries: more than {limits.max_total_hits} hits at "
            "once; ask for fewer, or send the queries in several requests",
        )
    num_parts = sum(len(query.parts) for query in bodies)
    if num_parts > limits.max_parts:
        raise Problem(
            422,
            f"the queries have {num_parts} parts, more than {limits.max_parts}; send them in "
            "several requests",
        )
    queries = tuple(Query(parts=tuple(part.part() for part in query.parts)) for query in bodies)
    _check_images(queries, limits=limits)
    # Here and not in a batch alone, whose other queries would be asked again one by one.
    searcher.check(queries)
    return Asked(
        searcher=searcher,
        queries=queries,
        num_hits=body.k,
        where=conditions_from_json([condition.model_dump() for condition in body.where]),
    )


def _check_images(queries: Sequence[Query], *, limits: ServiceLimits) -> None:
    num_pixels = 0
    for query in queries:
        for part in query.parts:
            if part.image is not None:
                width, height = image_size(part.image, limits=limits.image)
                num_pixels += width * height
    if num_pixels > limits.max_total_pixels:
        raise Problem(
            422,
            f"the images have {num_pixels:,} pixels together, more than "
            f"{limits.max_total_pixels:,}; send smaller ones, or several requests",
        )


def _answer_json(
    answers: Sequence[Answer], *, modality: Modality, are_several: bool, shows_pictures: bool
) -> bytes:
    found = [_answer_body(answer, shows_pictures=shows_pictures) for answer in answers]
    number = answers[0].snapshot
    body: OneAnswerBody | AnswersBody
    if are_several:
        body = AnswersBody(answers=found, snapshot=number, among=modality)
    else:
        (one,) = found
        body = OneAnswerBody(hits=one.hits, notes=one.notes, snapshot=number, among=modality)
    return body.model_dump_json().encode()


def _answer_body(answer: Answer, *, shows_pictures: bool) -> AnswerBody:
    hits = [
        HitBody(
            key=hit.key,
            score=hit.score,
            columns=dict(hit.columns),
            item=item_path(hit.key),
            thumbnail=thumbnail_path(hit.key) if shows_pictures else None,
        )
        for hit in answer.hits
    ]
    return AnswerBody(hits=hits, notes=list(answer.notes))
