"""What a service is told: which store it answers for, and how much a request may cost.

Knows nothing of HTTP or of Ray.
"""

from dataclasses import dataclass, field, fields

from engine.images import ImageLimits
from pipelines.fetching.fetch_policy import FetchPolicy
from pipelines.schema import Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceLimits:
    """What one request may cost, and how many there may be at once in one replica."""

    max_body_bytes: int = 32 * 2**20
    """Of a request. An image in base64 takes a third more than its bytes."""
    max_hits: int = 1_000
    """For each query."""
    max_queries: int = 64
    """In one request."""
    max_image_bytes: int = 16 * 2**20
    """Encoded, of each image in a query; above any photo that a phone takes."""
    max_image_pixels: int = 50_000_000
    """Width times height, in a query and of a picture that is shown small; 50 million take 0.15 GB
    as RGB."""
    max_seconds: float = 10.0
    """From a request's first byte to its answer's; then 504."""
    max_concurrent: int = 64
    """Requests in one replica; then 503 with Retry-After."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for part in fields(self):
            value = getattr(self, part.name)
            if not value > 0 or (part.type is int and value < 1):
                raise ValueError(f"{part.name}={value}: expected more than 0")

    @property
    def max_parts(self) -> int:
        """Parts of all queries of one request; two of each, on the average."""
        return max(32, 2 * self.max_queries)

    @property
    def max_total_hits(self) -> int:
        """Hits of all queries of one request."""
        return 10 * self.max_hits

    @property
    def max_total_pixels(self) -> int:
        """Of all images of one request; they are decoded one after another."""
        return 4 * self.max_image_pixels

    @property
    def image(self) -> ImageLimits:
        """Of one image in a query."""
        return ImageLimits(
            max_image_bytes=self.max_image_bytes, max_image_pixels=self.max_image_pixels
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """Which store is served, and to whom."""

    store_uri: str
    """A store with an index."""
    engines_uri: str
    """Where its engine is, or will be built."""
    among: tuple[Modality, ...] | None = None
    """Which embeddings are searched; None: all that the store has, and images unless asked."""
    refresh_seconds: float = 5.0
    """Between two looks for a newer snapshot; listing a store of thousands takes less than 1."""
    thumbnails: bool = True
    """Whether pictures of the catalog are shown; they need 16 bytes of memory for each row."""
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    """From where those pictures may be fetched that the catalog names by URI."""
    token: str | None = field(default=None, repr=False)
    """Bearer token that requests must carry; None: anyone may ask."""
    hosts: tuple[str, ...] | None = None
    """Names that requests may ask by (`Host`), without a port; None: any. A page of another site
    can have its own name lead to this machine, and would read what is here."""
    limits: ServiceLimits = ServiceLimits()
    """What a request may cost."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not self.refresh_seconds > 0:
            raise ValueError(f"refresh_seconds={self.refresh_seconds}: expected more than 0")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("token: expected printable ASCII characters alone")
        if self.token is not None and (not self.token or " " in self.token):
            raise ValueError("token: it is empty or has spaces; expected one word")
