"""Artifacts on a root that all nodes reach: fetched whole, published by one exclusive create.

Knows nothing of what an artifact is, or of who should build it.

    ROOT/
      fp8-0011223344556677/       an engine; the record lies where it would on a disk
        manifest.json             created last
        files/CHECKSUM-NAME       the files, by content
        plans/PLAN/               plan.json, files/

Any number of builders may publish the same artifact at once, whatever leases they think they hold.
Files are named by content, so none overwrites another's with anything else; the record is created
last and exclusively, so one builder's files are the artifact, and whoever comes second takes those.
A builder that is killed leaves files without a record, which nobody reads.
"""

from pathlib import Path, PurePosixPath

from engine.errors import DamagedError
from engine.publishing.artifacts import Artifact
from engine.publishing.folders import Folder

FILES_DIR = "files"


def stored_name(name: str, digest: str) -> str:
    """What a file is called on the root; the end is for people."""
    return f"{digest[:32]}-{PurePosixPath(name).name}"


def read_record(root: Folder, artifact: Artifact) -> bytes | None:
    """The content of an artifact's record, None if it is not published; EngineError."""
    return root.read_if_there(f"{artifact.path}/{artifact.record}")


def missing_files(root: Folder, artifact: Artifact, record: bytes) -> list[str]:
    """Files that a record lists and the root lacks; DamagedError for a malformed record."""
    there = set(root.names(f"{artifact.path}/{FILES_DIR}"))
    files = artifact.files(record, path=root.full_path(f"{artifact.path}/{artifact.record}"))
    return [name for name, digest in files.items() if stored_name(name, digest) not in there]


def pull(root: Folder, artifact: Artifact, *, record: bytes, into: Path) -> None:
    """Fetch an artifact into an empty folder; what comes is not compared with its checksums.

    Raises:
        DamagedError: A file is missing on the root.
        EngineError: The root cannot be read.
    """
    path = root.full_path(f"{artifact.path}/{artifact.record}")
    missing = missing_files(root, artifact, record)
    if missing:
        raise DamagedError(f"{path}: {missing[0]} is missing")
    for name, digest in artifact.files(record, path=path).items():
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        root.download(f"{artifact.path}/{FILES_DIR}/{stored_name(name, digest)}", target)
    (into / artifact.record).write_bytes(record)


def push(root: Folder, artifact: Artifact, built: Path, *, damaged: bytes | None) -> bool:
    """Publish a built artifact; False if another builder was first, whose artifact now counts.

    Args:
        root: Where all nodes find it.
        artifact: Its name.
        built: A whole folder of it.
        damaged: The record on the root whose files turned out damaged, None if there was none.
            Plans and reports below it go with it, since they were made from other files.

    Raises:
        EngineError: The root cannot be written.
    """
    path = f"{artifact.path}/{artifact.record}"
    record = (built / artifact.record).read_bytes()
    for name, digest in artifact.files(record, path=str(built / artifact.record)).items():
        root.upload(built / name, f"{artifact.path}/{FILES_DIR}/{stored_name(name, digest)}")
    if damaged is not None and read_record(root, artifact) == damaged:
        for folder in root.names(artifact.path):
            if folder not in (artifact.record, FILES_DIR):
                root.remove(f"{artifact.path}/{folder}")
        root.publish(path, record)
        return True
    try:
        root.create(path, record)
    except FileExistsError:
        return False
    return True
