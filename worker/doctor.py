"""Checks of one machine before a run: configuration, keys, disk, ports, libraries, kernel settings. Reads only.

The way to the coordinator is in `doctor_network`; printing and the exit code in `diloco.doctor`.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from diloco.comms.address import is_loopback, parse_address
from diloco.comms.revocation import read_revoked
from diloco.comms.tls import REVOKED, SOON_DAYS, Keys, day, load_keys
from diloco.config import RunConfig, check_distributed, warnings
from diloco.errors import ConfigError, DilocoError
from diloco.worker.corpus import source_files
from diloco.worker.finding import Finding, failed, ok, warn
from diloco.worker.inner import pick_device

PROC = Path("/proc/sys/net/ipv4")
GIB = 1 << 30
LEAST_FREE, GOOD_FREE = GIB, 10 * GIB
SLOW_FSYNC_S = 0.05  # each commit of the coordinator waits for one
FEW_FILES = 1024
SMALL_BUFFER = 1 << 20


def examine(
    role: str,
    path: str,
    overrides: Sequence[str] = (),
    *,
    coordinator: str | None = None,
    listen: str = "127.0.0.1:7700",
    keys: Path | None = None,
    proc: Path = PROC,
) -> list[Finding]:
    """Everything that can be found out about `role` ("worker" or "coordinator") with these arguments, here and now."""
    from diloco.worker.doctor_network import network

    found: list[Finding] = []
    config = _configuration(path, overrides, found)
    own = _keys(role, keys, found)
    if config is not None and role == "worker":
        found += [_device(config), _data(config)]
    if role == "coordinator":
        found += _listen(listen, keys)
    found += _disk(Path("runs"))
    found += [_libraries(), _fork_support(), _open_files(), *kernel_settings(proc)]
    if coordinator is not None:
        found += network(coordinator, config, own, keys_given=keys is not None, proc=proc)
    return found


def _configuration(path: str, overrides: Sequence[str], found: list[Finding]) -> RunConfig | None:
    try:
        config = RunConfig.load(path, overrides)
        check_distributed(config)
    except ConfigError as error:
        found.append(failed("configuration", str(error), "correct the file or the flag", ConfigError))
        return None
    found.append(
        ok("configuration", f"run {config.run.run_id!r}, {config.run.inner_steps_total} inner steps")
    )
    found += [warn("configuration", text, "keep it if it is meant so") for text in warnings(config)]
    return config


def _keys(role: str, folder: Path | None, found: list[Finding]) -> Keys | None:
    if folder is None:
        found.append(
            warn("keys", "none: whoever reaches the port may take part", "diloco keys init, then --keys DIR")
        )
        return None
    now = time.time()
    try:
        own = load_keys(folder, [role], now)
        if role == "coordinator":
            read_revoked(folder / REVOKED)
    except DilocoError as error:
        found.append(failed("keys", str(error), "see docs/security.md", type(error)))
        return None
    left = (own.identity.ends - now) / 86400
    words = f"{own.identity}, until {day(own.identity.ends)}"
    if left < SOON_DAYS:
        found.append(warn("keys", f"{words}: {left:.0f} days", "renew it with diloco keys ... --renew"))
    else:
        found.append(ok("keys", words))
    if role == "coordinator" and (folder / "ca.key").exists():
        found.append(
            warn("keys", "ca.key, which makes certificates, lies on this machine", "keep it offline")
        )
    return own


def _device(config: RunConfig) -> Finding:
    import torch

    try:
        device = pick_device(config.train.device)
        torch.empty(1, device=device)
    except (ConfigError, RuntimeError, AssertionError) as error:
        words = f"train.device = {config.train.device!r} does not work here: {str(error).splitlines()[0]}"
        return failed("device", words, "use 'auto', or install the driver and a torch build for it")
    return ok("device", f"{device}, {torch.get_num_threads()} threads")


def _data(config: RunConfig) -> Finding:
    if config.data.source == "stdlib":
        return ok("data", "Python's own standard library")
    try:
        files = source_files(config.data.source)
        with files[0].open("rb") as first:
            first.read(1)
    except ConfigError as error:
        return failed("data", str(error), "correct data.source", ConfigError)
    except OSError as error:
        return failed("data", f"{str(files[0])!r}: {error.strerror}", "make it readable")
    return ok("data", f"{len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")


def _listen(listen: str, keys: Path | None) -> list[Finding]:
    try:
        host, port = parse_address(listen)
    except ValueError as error:
        return [failed("listen", f"--listen: {error}", "write for example 0.0.0.0:7700", ConfigError)]
    found = []
    if keys is None and not is_loopback(host):
        found.append(
            failed("listen", f"{listen} can be reached from elsewhere and there are no keys", "give --keys")
        )
    if is_loopback(host):
        found.append(warn("listen", f"{host} is reachable from this machine alone", "--listen 0.0.0.0:7700"))
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        words = f"cannot listen on {listen}: {error.strerror or error}"
        return [*found, failed("listen", words, "stop what holds the port (ss -ltnp), or choose another")]
    return [*found, ok("listen", f"{listen} is free")]


def _disk(folder: Path) -> list[Finding]:
    try:
        folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            times = [_synced(file.fileno()) for _ in range(9)]
    except OSError as error:
        words = f"cannot write in {str(folder.resolve())!r}: {error.strerror or error}"
        return [failed("disk", words, "free space, or start in a folder that can be written")]
    words = f"{free / GIB:.1f} GiB free in {str(folder.resolve())!r}"
    fix = "checkpoints and journal need a few times the model; free space"
    if free < LEAST_FREE:
        space = failed("disk", words, fix)
    else:
        space = ok("disk", words) if free >= GOOD_FREE else warn("disk", words, fix)
    median = statistics.median(times)
    words = f"fsync takes {1e3 * median:.1f} ms"
    if median > SLOW_FSYNC_S:
        return [
            space,
            warn("fsync", words, "every commit waits for one: a local SSD, or topology.journal on one"),
        ]
    return [space, ok("fsync", words)]


def _synced(descriptor: int) -> float:
    began = time.monotonic()
    os.write(descriptor, bytes(4096))
    os.fsync(descriptor)
    return time.monotonic() - began


def _libraries() -> Finding:
    try:
        wanted = importlib.metadata.requires("diloco") or []
    except importlib.metadata.PackageNotFoundError:
        return warn("libraries", "diloco is not installed, versions are not checked", "pip install -e .")
    seen, old = [f"python {sys.version.split()[0]}"], []
    for line in wanted:
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*>=\s*([0-9.]+)", line)
        if match is None or "extra ==" in line:
            continue
        name, least = match.groups()
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            old.append(f"{name} is missing")
            continue
        seen.append(f"{name} {have}")
        if _numbers(have) < _numbers(least):
            old.append(f"{name} {have} is older than {least}")
    if old:
        return failed("libraries", ", ".join(old), "pip install -U diloco")
    return ok("libraries", ", ".join(seen))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _fork_support() -> Finding:
    value = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "0")
    if value.lower() not in ("0", "false"):
        words = f"GRPC_ENABLE_FORK_SUPPORT = {value}: forked data loaders crash a process with open channels"
        return failed("fork", words, "unset it, or set it to 0")
    return ok("fork", "GRPC_ENABLE_FORK_SUPPORT is off")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        return warn("open files", f"at most {hard}", "ulimit -n 4096, or LimitNOFILE= in the unit")
    return ok("open files", f"{soft} now, up to {hard}")


def kernel_settings(proc: Path = PROC) -> list[Finding]:
    """TCP settings that decide what a long path carries; nothing where they cannot be read."""
    found = []
    control = read_setting(proc / "tcp_congestion_control")
    if control and control != "bbr":
        fix = "sysctl -w net.ipv4.tcp_congestion_control=bbr on senders, or diloco worker --connections 8"
        found.append(warn("tcp", f"congestion control is {control}: slow on lossy paths", fix))
    elif control:
        found.append(ok("tcp", "congestion control is bbr"))
    if read_setting(proc / "tcp_slow_start_after_idle") == "1":
        fix = "sysctl -w net.ipv4.tcp_slow_start_after_idle=0"
        found.append(warn("tcp", "each round begins with a slow start, as rounds are minutes apart", fix))
    largest = largest_buffer(proc)
    if largest is not None and largest < SMALL_BUFFER:
        fix = 'sysctl -w net.ipv4.tcp_wmem="4096 16384 33554432"'
        found.append(warn("tcp", f"send buffers end at {largest} bytes", fix))
    return found


def largest_buffer(proc: Path) -> int | None:
    """The most bytes that may be on their way on one connection."""
    words = read_setting(proc / "tcp_wmem").split()
    return int(words[2]) if len(words) == 3 and words[2].isdigit() else None


def read_setting(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
