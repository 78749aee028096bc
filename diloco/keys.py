"""`diloco keys`: the command line of a run's certificate authority, which is in `diloco.comms.authority`."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

DAYS = 365


def add_command(commands: Any) -> None:
    """`commands` is what `ArgumentParser.add_subparsers` returned."""
    keys = commands.add_parser("keys", help="make, list and revoke the certificates of a run")
    verbs = keys.add_subparsers(dest="verb", required=True, metavar="VERB")
    texts = {
        "init": "a certificate authority, and the coordinator's certificate",
        "worker": "a certificate for one worker, to be copied to its site",
        "operator": "a certificate that may read the status and nothing else",
        "revoke": "shut a worker or operator out, at once",
        "list": "all certificates",
    }
    for verb, text in texts.items():
        parser = verbs.add_parser(verb, help=text)
        parser.add_argument("--keys", required=True, metavar="DIR", type=Path)
        if verb in ("worker", "operator", "revoke"):
            parser.add_argument("name", metavar="NAME")
        if verb in ("init", "worker", "operator"):
            parser.add_argument("--days", type=_days, default=DAYS, help="validity; default %(default)s")
            parser.add_argument("--renew", action="store_true", help="replace the certificate that is there")
            parser.add_argument(
                "--host", action="append", default=[], metavar="NAME|ADDRESS",
                help="a name or address it serves at, apart from localhost; may be repeated",
            )  # fmt: skip
        if verb == "list":
            parser.add_argument("--json", action="store_true")
        parser.set_defaults(run=run)


def _days(text: str) -> int:
    days = int(text)
    if not 1 <= days <= 3650:
        raise argparse.ArgumentTypeError(f"{days} is not between 1 and 3650")
    return days


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from diloco.comms.authority import Authority

    folder: Path = arguments.keys
    authority = Authority(folder, datetime.datetime.now(datetime.UTC))
    match arguments.verb:
        case "init":
            if arguments.renew:
                authority.coordinator(arguments.host, arguments.days, renew=True)
                print(
                    f"renewed {folder / 'coordinator.crt'}; a running coordinator takes it into use by itself"
                )
                return 0
            authority.create(arguments.host, arguments.days)
            print(
                f"made an authority in {folder}. Next: diloco keys worker NAME --keys {folder}, then "
                f"diloco coordinator RUN.toml --listen HOST:PORT --keys {folder}\n"
                f"{folder / 'ca.key'} makes certificates: the coordinator does not need it, keep it in a safe place"
            )
        case "worker" | "operator" as role:
            made = authority.member(
                role, arguments.name, arguments.host, arguments.days, renew=arguments.renew
            )
            use = f"worker RUN.toml --id {arguments.name}" if role == "worker" else "status"
            print(
                f"made {made}: copy that folder to the {role}'s machine over a safe way (scp -rp), there\n"
                f"diloco {use} --coordinator HOST:PORT --keys {made.name}"
            )
        case "revoke":
            for identity in authority.revoke(arguments.name):
                print(f"revoked {identity}, serial {identity.serial:x}")
            print(
                f"{folder / 'revoked.json'} takes effect where the coordinator's --keys has it, within seconds"
            )
        case _:
            _list(authority, arguments.json)
    return 0


def _list(authority: Any, as_json: bool) -> None:
    from diloco.comms.tls import day

    rows = [
        {
            "role": found.identity.role,
            "name": found.identity.name,
            "serial": f"{found.identity.serial:x}",
            "begins": day(found.identity.begins),
            "ends": day(found.identity.ends),
            "revoked": found.revoked,
        }
        for found in authority.issued()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = "revoked" if row["revoked"] else f"until {row['ends']}"
        print(f"{row['role']:<12} {row['name'] or '-':<24} {state:<28} {row['serial']}")
