"""`clipmill submit`: runs a command as a job on a Ray cluster, and follows it until it ends.

Knows nothing of what the command does. It needs `ray[default]` alone: neither models nor datasets.
"""

import json
import os
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import ClipmillError
from jobs.command import CommandParser, run, say
from jobs.submission.following import follow
from jobs.submission.naming import base_name, next_id, target_of
from jobs.submission.packing import pack
from jobs.submission.server import (
    ADDRESS_VARIABLES,
    EntrypointResources,
    JobServer,
    SubmittedJob,
    TakenIdError,
)
from jobs.submission.words import SUBMITTABLE, CommandWords, command_words, read_config

_NUM_ID_TRIES = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code of what was submitted."""
    parser = _parser()
    options, words = parser.parse_known_args(argv)
    config = Path(options.config) if options.config else None
    if options.json:
        words.append("--json")
    command = command_words(words, config=config)
    env_vars = _env_vars(options.env)
    entrypoint = _entrypoint(options)
    said = read_config(config).get("address") if config else None
    server = JobServer(job_server_address(options.address or said))
    running = _running(server, command)
    if running is None:
        job_id = _submit(server, command, env_vars=env_vars, entrypoint=entrypoint)
        say(f"submitted {job_id} to {server.address}")
    elif options.attach:
        job_id = running.job_id
        say(f"{job_id} runs already: {running.command}")
    else:
        raise ClipmillError(_refusal(running))
    if options.detach:
        say(*_how_to_find(job_id))
        print(job_id)
        return 0
    return attach(server, job_id)


def add_address(parser: CommandParser) -> None:
    """Give a parser the option of all that ask a job server."""
    parser.add_argument(
        "--address",
        metavar="URL",
        help="of the head's dashboard, http://HEAD:8265; $RAY_ADDRESS if that is one",
    )


def job_server_address(said: str | None) -> str:
    """The address that was said, or that the environment names; ValueError if none is a URL."""
    found = [said, *(os.environ.get(name) for name in ADDRESS_VARIABLES)]
    for address in filter(None, found):
        if str(address).startswith(("http://", "https://")):
            return str(address)
        if address == said:
            raise ValueError(
                f"--address {said}: expected the URL of the head's dashboard, http://HEAD:8265"
            )
    raise ValueError(
        "--address: say where, as http://HEAD:8265 ($RAY_ADDRESS does, too); without `submit` the "
        "command runs on this machine"
    )


def attach(server: JobServer, job_id: str) -> int:
    """Follow a job until it ends; returns the exit code of its command.

    A job that was stopped, or lost its driver, has 1. Ctrl-C leaves it running, with 130.
    """
    try:
        job = follow(server, job_id, out=sys.stdout, err=sys.stderr)
    except KeyboardInterrupt:
        say("", f"{job_id} goes on without being watched", *_how_to_find(job_id))
        return 130
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        say(f"clipmill: {job_id} was stopped; submit the same again to go on")
        return 1
    if job.exit_code is None or job.exit_code < 0:
        say(f"clipmill: {job_id} failed: {job.message}; submit the same again to go on")
        return 1
    return job.exit_code


def _parser() -> CommandParser:
    parser = CommandParser(
        "submit",
        description="Run a command as a job on a Ray cluster, with this code, and follow it. "
        f"COMMAND is one of {', '.join(SUBMITTABLE)}; --json, --config and all that is not named "
        "below are its options (clipmill COMMAND --help). Where it runs, relative paths are none "
        "of this machine.",
    )
    parser.usage = "clipmill submit COMMAND [its options] --address URL [options]"
    add_address(parser)
    running = parser.add_mutually_exclusive_group()
    running.add_argument(
        "--detach", action="store_true", help="print the job's id and leave it running"
    )
    running.add_argument(
        "--attach",
        action="store_true",
        help="if a job works on the store already, follow that one",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="a variable of this environment that all of the job's processes get; repeatable. Who "
        "reaches the job server can read it",
    )
    where = parser.add_argument_group("what the driver reserves; with nothing it runs on the head")
    where.add_argument("--entrypoint-num-cpus", type=float, default=0.0, metavar="N")
    where.add_argument("--entrypoint-num-gpus", type=float, default=0.0, metavar="N")
    where.add_argument("--entrypoint-memory", type=int, default=0, metavar="BYTES")
    where.add_argument(
        "--entrypoint-resources", metavar="JSON", help="custom ones: '{\"driver\": 1}'"
    )
    return parser


def _entrypoint(options: Namespace) -> EntrypointResources:
    resources: Any = None
    if options.entrypoint_resources is not None:
        try:
            resources = json.loads(options.entrypoint_resources)
        except json.JSONDecodeError:
            resources = None
        numbers = resources.values() if isinstance(resources, dict) else ("",)
        if not all(isinstance(number, int | float) and number > 0 for number in numbers):
            raise ValueError(
                f"--entrypoint-resources {options.entrypoint_resources}: expected a JSON object of "
                'names and numbers, as {"driver": 1}'
            )
    return EntrypointResources(
        num_cpus=options.entrypoint_num_cpus,
        num_gpus=options.entrypoint_num_gpus,
        memory_bytes=options.entrypoint_memory,
        resources=resources,
    )


def _env_vars(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if "=" in name:
            # Not repeated: it may be a secret.
            raise ValueError(
                f"--env {name.split('=', 1)[0]}: a name alone; its value is read from this "
                "environment, so that no list of processes shows it"
            )
        if name not in os.environ:
            raise ValueError(f"--env {name}: not set here; export it, or leave the option out")
    return {name: os.environ[name] for name in names}


def _running(server: JobServer, command: CommandWords) -> SubmittedJob | None:
    target = target_of(command)
    return next((job for job in server.jobs() if job.target == target and not job.is_over), None)


def _submit(
    server: JobServer,
    command: CommandWords,
    *,
    env_vars: Mapping[str, str],
    entrypoint: EntrypointResources,
) -> str:
    with tempfile.TemporaryDirectory(prefix="clipmill-submit-") as folder:
        pack(command, Path(folder))
        for _ in range(_NUM_ID_TRIES):
            # In this order: one that came meanwhile is seen to run, one that comes now has that id.
            ids = server.ids()
            running = _running(server, command)
            if running is not None:
                raise ClipmillError(_refusal(running))
            job_id = next_id(base_name(command), ids=ids)
            try:
                server.submit(
                    command,
                    job_id=job_id,
                    folder=Path(folder),
                    env_vars=env_vars,
                    entrypoint=entrypoint,
                )
            except TakenIdError:
                continue
            return job_id
    raise ClipmillError(f"others keep submitting {base_name(command)}; see `clipmill jobs list`")


def _refusal(running: SubmittedJob) -> str:
    since = "" if running.started_at is None else f" since {running.started_at}"
    return (
        f"{running.job_id} works on it already{since} ({running.status}): {running.command}; "
        f"--attach follows it, `clipmill jobs stop {running.job_id}` ends it"
    )


def _how_to_find(job_id: str) -> tuple[str, str]:
    quoted = shlex.quote(job_id)
    return (
        f"  clipmill jobs attach {quoted}   follows it again",
        f"  clipmill jobs stop {quoted}     ends it",
    )


if __name__ == "__main__":
    run(main, sys.argv[1:])
