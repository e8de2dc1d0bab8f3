"""`perfmodel machines`: those known by name, or all that is known of one."""

from __future__ import annotations

import argparse

from perfmodel.commands.arguments import Parser
from perfmodel.commands.tables import ascii_line, digits, gib, json_text, table
from perfmodel.machine import known_machines, read_machine

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Add a machine's name."""
    parser.add_argument(
        "machine", nargs="?", metavar="NAME", help="print its machine.json, to be edited"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each, or a description. Raises ValueError for a name that is not known."""
    if arguments.machine is not None:
        print(json_text(read_machine(arguments.machine).to_json()))
        return 0
    rows = []
    for name in known_machines():
        machine = read_machine(name)
        drive = machine.drive
        rows.append(
            [
                name,
                ascii_line(f"{machine.devices} x {machine.device.name}"),
                gib(machine.device.memory_bytes),
                gib(machine.host.memory_bytes),
                digits(drive.write_bytes_per_s / 1e9) if drive else "-",
            ]
        )
    print("\n".join(table(("name", "devices", "GiB each", "host GiB", "SSD GB/s"), rows, left=2)))
    return 0
