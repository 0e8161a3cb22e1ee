"""Running a command on several machines at once, through MLX's own launcher (`mlx.launch`)."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from hominem_mlx.errors import InputError, TrainingError
from hominem_mlx.files import read_json

EXAMPLE = '[{"ssh": "127.0.0.1", "ips": ["192.168.0.11"]}, {"ssh": "other-mac.local", "ips": ["192.168.0.12"]}]'
COMMAND = (sys.executable, "-c", "from hominem_mlx.cli import main; main()")


def launch(hosts: Path, words: list[str]) -> None:
    """Run `hominem WORDS` on all machines of a hostfile and wait for its end; what the ranks say is passed on.

    They must have the same Python at the same path and be reached by ssh without a password. `mlx.launch` ends the
    others when one fails.

    Raises: InputError for a file that is no hostfile, TrainingError when a rank failed.
    """
    ports = _free_ports(_check(hosts))
    home = os.environ.get("HOMINEM_HOME")
    command = [
        *(sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"),
        *("--backend", "ring", "--hostfile", str(hosts), "--starting-port", str(ports)),
        *(("--env", f"HOMINEM_HOME={home}") if home else ()),
        *("--", *COMMAND, *words),
    ]
    # Its input is a pipe that says nothing: it would read ours without pause, and make our terminal non-blocking.
    # Its own session, so that one signal reaches all that it started.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stderr is not None
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed window ends the run, not only the one who watches it
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    failed = False
    try:
        for line in process.stderr:
            failed |= b"Node with rank" in line  # its exit code is 0 whatever happened
            click.echo(line, nl=False, err=True)
        failed |= process.wait() != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # nothing of ours is half-written at any moment
            process.wait()
    if failed:
        raise TrainingError(
            "a rank failed, so all were stopped; what they said stands above. Nothing half-written is left, and what "
            "was saved is kept by rank 0: mend the reason, then give the same command again"
        )


def _check(hosts: Path) -> int:
    """How many ports the ranks of a hostfile listen on."""
    value: Any = read_json(hosts)
    entries = value.get("hosts") if isinstance(value, dict) else value
    if not isinstance(entries, list) or len(entries) < 2:
        raise InputError(f"{hosts}: is not a list of two machines or more; a hostfile looks like {EXAMPLE}")
    for number, entry in enumerate(entries):
        known = isinstance(entry, dict) and isinstance(entry.get("ssh"), str)
        if not (known and isinstance(entry.get("ips"), list) and entry["ips"]):
            raise InputError(
                f"{hosts}: machine {number} needs `ssh`, the name to reach it by, and `ips`, a list of its addresses; "
                f"a hostfile looks like {EXAMPLE}"
            )
        if {"0.0.0.0", "::", "*"} & set(entry["ips"]):
            raise InputError(f"{hosts}: machine {number} would listen to anybody; name its address in your network")
    return sum(len(entry["ips"]) for entry in entries)


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on here; MLX would share them with another run."""
    while True:
        with socket.socket() as first:
            first.bind(("", 0))
            port = first.getsockname()[1]
        try:
            for number in range(port, port + count):
                with socket.socket() as each:
                    each.bind(("", number))
        except (OSError, OverflowError):
            continue
        return port
