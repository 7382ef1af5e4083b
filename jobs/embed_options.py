"""The options of a run that embeds, for all commands that do.

Knows nothing of what a command adds to them, or of how a run is done.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import get_args

from engine.backends.choice import WANTED
from engine.images import ImageLimits
from engine.manifest import Precision
from engine.registry import default_engines_uri
from jobs.command import CommandParser
from jobs.fetch_options import add_fetch_options, fetch_policy_from
from pipelines.catalog import CatalogConfig
from pipelines.cluster.placement import Placement
from pipelines.cluster.resources import Resources
from pipelines.decode import RowLimits
from pipelines.embedding import EmbedConfig
from pipelines.engines import EngineChoice
from pipelines.schema import WANTED_DECODERS


def embed_config_from(options: Namespace, *, command: Sequence[str]) -> EmbedConfig:
    """The configuration that the options describe; ValueError for one out of bounds.

    Args:
        options: Of a parser with `add_embed_options`.
        command: The command line that they were given by, for the record.
    """
    return EmbedConfig(
        catalog=CatalogConfig(
            uri=options.catalog,
            key_column=options.key_column,
            image_column=options.image_column,
            text_column=options.text_column,
            version_column=options.version_column,
            carry_columns=tuple(options.carry),
        ),
        store_uri=options.store,
        engine=EngineChoice(
            checkpoint=options.checkpoint,
            revision=options.revision,
            engine_id=options.engine,
            precision=options.precision,
            backend=options.backend,
            decoder=options.decode,
            engines_uri=options.engines,
        ),
        dtype=options.dtype,
        limits=RowLimits(
            image=ImageLimits(
                max_image_bytes=options.max_image_bytes, max_image_pixels=options.max_image_pixels
            ),
            fetch=fetch_policy_from(options),
            max_text_chars=options.max_text_chars,
            max_reject_share=options.max_reject_share,
        ),
        resources=Resources(
            num_encoders=options.num_encoders,
            encoder_threads=options.encoder_threads,
            batch_rows=options.batch_rows,
            rows_per_file=options.rows_per_file,
            encoder_cpus=options.encoder_cpus,
            encoder_gpus=options.encoder_gpus,
            decode_cpus=options.decode_cpus,
            placement=Placement(
                max_encoders=options.max_encoders,
                accelerator_type=options.accelerator_type,
                warn_seconds=options.placement_warning,
                fail_seconds=options.placement_timeout,
            ),
        ),
        retry=tuple(options.retry),
        command=tuple(command),
    )


def add_embed_options(parser: CommandParser) -> None:
    """Give a parser all options of a run."""
    limits, images, resources = RowLimits(), ImageLimits(), Resources()
    placement = resources.placement
    what = parser.add_argument_group("what")
    what.add_argument("--catalog", required=True, metavar="URI", help="Parquet file or folder")
    what.add_argument("--store", required=True, metavar="URI", help="output folder")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--checkpoint", metavar="ID_OR_DIR", help="the model: its promoted engine, or else fp32"
    )
    model.add_argument("--engine", metavar="ID", help="one engine, by its id")
    what.add_argument("--revision", help="hub branch, tag or commit of the checkpoint")
    what.add_argument(
        "--precision", choices=get_args(Precision), help="that the promoted engine must have"
    )
    what.add_argument("--backend", default="auto", choices=WANTED, help="what executes the engine")
    what.add_argument(
        "--decode",
        default="auto",
        choices=WANTED_DECODERS,
        help="where JPEGs are decoded: auto takes the GPU that runs the engine, if it can",
    )
    what.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    what.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    columns = parser.add_argument_group("columns of the catalog")
    columns.add_argument("--key-column", default="key", metavar="NAME")
    columns.add_argument(
        "--image-column", metavar="NAME", help="'image' if there is one; 'none' to leave out"
    )
    columns.add_argument(
        "--text-column", metavar="NAME", help="'text' if there is one; 'none' to leave out"
    )
    columns.add_argument("--version-column", metavar="NAME", help="changes when the row does")
    columns.add_argument(
        "--carry", nargs="*", default=[], metavar="NAME", help="columns passed through"
    )
    bounds = parser.add_argument_group("limits")
    bounds.add_argument("--max-image-bytes", type=int, default=images.max_image_bytes)
    bounds.add_argument("--max-image-pixels", type=int, default=images.max_image_pixels)
    bounds.add_argument("--max-text-chars", type=int, default=limits.max_text_chars)
    bounds.add_argument(
        "--max-reject-share", type=float, default=limits.max_reject_share, metavar="SHARE"
    )
    bounds.add_argument(
        "--retry", nargs="*", default=[], metavar="REASON", help="try rows rejected for it again"
    )
    add_fetch_options(parser)
    where = parser.add_argument_group("resources")
    where.add_argument("--address", help="of a Ray cluster; otherwise Ray is started here")
    where.add_argument(
        "--metrics-port",
        type=int,
        help="where the Ray that is started here can be scraped; a cluster has its own",
    )
    where.add_argument(
        "--num-encoders",
        type=int,
        help="if left out one for every two CPUs, or for each GPU; with an autoscaler from one on, "
        "as the backlog asks",
    )
    where.add_argument(
        "--max-encoders", type=int, help="as many as the backlog may ask for, from --num-encoders"
    )
    where.add_argument(
        "--accelerator-type",
        metavar="NAME",
        help="of the encoders' GPUs, as Ray names it: L4, H100",
    )
    where.add_argument("--encoder-threads", type=int, default=resources.encoder_threads)
    where.add_argument("--encoder-cpus", type=float, default=resources.encoder_cpus)
    where.add_argument("--encoder-gpus", type=float, default=resources.encoder_gpus)
    where.add_argument("--decode-cpus", type=float, default=resources.decode_cpus)
    where.add_argument(
        "--batch-rows",
        type=int,
        help="if left out 32 on CPUs, 256 on GPUs, 1,024 on GPUs that decode",
    )
    where.add_argument("--rows-per-file", type=int, default=resources.rows_per_file)
    where.add_argument(
        "--placement-warning",
        type=float,
        default=placement.warn_seconds,
        metavar="SECONDS",
        help="workers without a place for so long: say what they wait for",
    )
    where.add_argument(
        "--placement-timeout",
        type=float,
        default=placement.fail_seconds,
        metavar="SECONDS",
        help="after so long the run ends; what was embedded is kept",
    )
