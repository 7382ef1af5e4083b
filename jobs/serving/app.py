"""The app of one replica: its routes, its page, and who is let in.

Knows nothing of Ray; whatever runs ASGI apps can run it.
"""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from jobs.serving.admission import Admission
from jobs.serving.live import Opener, open_current
from jobs.serving.options import ServiceConfig
from jobs.serving.pages import add_pages
from jobs.serving.problems import MEDIA_TYPE, ProblemBody, add_problems
from jobs.serving.routes import AllFamilies, add_routes
from jobs.serving.service import Service

_DESCRIPTION = """Searches the embeddings of a store by words, pictures, items and vectors. Errors
are problem JSON (RFC 9457): `detail` says what is wrong and what to do."""
_PROBLEMS = {
    400: "The request cannot be read.",
    401: "The token is missing or wrong.",
    403: "It was asked for by another name than those of this machine.",
    404: "There is no such thing.",
    405: "The path does not take this method.",
    413: "The body is too large.",
    422: "This cannot be asked.",
    500: "A fault of the service.",
    503: "Not now; Retry-After says when.",
    504: "Not within the time that a request may take.",
}


def make_app(
    config: ServiceConfig,
    *,
    opener: Opener = open_current,
    replica: str = "0",
    all_families: AllFamilies | None = None,
) -> FastAPI:
    """The app of one replica.

    Args:
        config: Of the service.
        opener: Opens the current snapshot.
        replica: Its name in the metrics.
        all_families: The counts of all replicas by their names; None: this is the only one.
    """
    service = Service(config, opener=opener, replica=replica)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="Clipmill",
        version="1",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        responses={
            status: {
                "description": description,
                "content": {MEDIA_TYPE: {"schema": ProblemBody.model_json_schema()}},
            }
            for status, description in _PROBLEMS.items()
        },
    )
    app.state.service = service
    add_problems(app)
    add_pages(app)
    add_routes(app, service, all_families=all_families)
    app.add_middleware(
        Admission,
        limits=config.limits,
        token=config.token,
        hosts=config.hosts,
        metrics=service.metrics,
    )
    return app
