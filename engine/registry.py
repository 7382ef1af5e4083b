"""Engines by content: an engine is built once, published whole, and found by its id.

Knows nothing of what executes an engine.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from engine.checkpoint import Checkpoint
from engine.errors import EngineError
from engine.manifest import (
    IMAGE_ONNX,
    RECIPE_VERSION,
    TEXT_ONNX,
    TOKENIZER_FILE,
    Manifest,
    Precision,
    file_digest,
    read_manifest,
    verify_files,
)

PRECISION: Precision = "fp32"


def default_engines_dir() -> Path:
    """`$CLIPMILL_ENGINES`, or a folder in the user's cache."""
    named = os.environ.get("CLIPMILL_ENGINES")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(cache) / "clipmill" / "engines"


def engine_id_of(checkpoint: Checkpoint) -> str:
    """The id that an engine of this checkpoint has, whether it is built or not.

    Same id, same embeddings: it hashes the checkpoint's files, the precision and the form of
    the export.
    """
    recipe = f"{checkpoint.digest} {PRECISION} recipe-{RECIPE_VERSION}"
    return f"{PRECISION}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"


def find_engine(engine_id: str, *, engines_dir: Path) -> Manifest | None:
    """The manifest of a whole engine; None if it is not built, or a file fails its checksum."""
    directory = engines_dir / engine_id
    try:
        manifest = read_manifest(directory)
        verify_files(manifest, directory)
    except EngineError:
        return None
    return manifest


def load_or_build(checkpoint: Checkpoint, *, engines_dir: Path) -> Manifest:
    """Find the engine of a checkpoint, or build it; of all who ask at once on a node, one builds.

    The engine lies in `engines_dir / manifest.engine_id`. A damaged one is built anew.

    Raises:
        CheckpointError: The checkpoint cannot be built from.
        EngineError: The folder cannot be written.
    """
    engine_id = engine_id_of(checkpoint)
    with _lock(engines_dir, engine_id):
        found = find_engine(engine_id, engines_dir=engines_dir)
        if found is not None:
            return found
        shutil.rmtree(engines_dir / engine_id, ignore_errors=True)
        with _published(engine_id, engines_dir=engines_dir) as building:
            return _build(checkpoint, engine_id=engine_id, building=building)


@contextmanager
def _lock(engines_dir: Path, engine_id: str) -> Iterator[None]:
    # The operating system drops an flock with its process, so a killed builder holds nobody up.
    try:
        engines_dir.mkdir(parents=True, exist_ok=True)
        handle = (engines_dir / f".{engine_id}.lock").open("w")
    except OSError as error:
        raise EngineError(
            f"engines folder {engines_dir} cannot be written ({error.strerror}); name another "
            "with --engines or $CLIPMILL_ENGINES"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _published(engine_id: str, *, engines_dir: Path) -> Iterator[Path]:
    """A folder to fill, which becomes the engine's own once all is in it, or goes."""
    for left_by_a_killed_builder in engines_dir.glob(f".{engine_id}.building-*"):
        shutil.rmtree(left_by_a_killed_builder)
    building = Path(tempfile.mkdtemp(prefix=f".{engine_id}.building-", dir=engines_dir))
    try:
        yield building
        building.chmod(0o755)  # mkdtemp makes it private; other users' actors may share the folder
        building.rename(engines_dir / engine_id)
    except BaseException:
        shutil.rmtree(building)
        raise


def _build(checkpoint: Checkpoint, *, engine_id: str, building: Path) -> Manifest:
    # torch and transformers are needed to build an engine, not to find or run one.
    from engine.export import export_image_tower, export_text_tower, export_tokenizer
    from engine.model import load_model

    model = load_model(checkpoint)
    export_image_tower(
        model.image_tower,
        height=model.preprocessing.height,
        width=model.preprocessing.width,
        path=building / IMAGE_ONNX,
    )
    text = None
    if model.text_tower is not None and model.token_rules is not None:
        export_text_tower(model.text_tower, path=building / TEXT_ONNX)
        text = export_tokenizer(checkpoint, rules=model.token_rules, path=building / TOKENIZER_FILE)
    manifest = Manifest(
        engine_id=engine_id,
        checkpoint=checkpoint.name,
        revision=checkpoint.revision,
        checkpoint_digest=checkpoint.digest,
        precision=PRECISION,
        embedding_dim=model.embedding_dim,
        preprocessing=model.preprocessing,
        text=text,
        files={path.name: file_digest(path) for path in sorted(building.iterdir())},
        versions={name: version(name) for name in ("clipmill", "torch", "transformers", "onnx")},
    )
    manifest.write(building)
    return manifest
