"""Hosts on one machine: network namespaces, each with an address of its own, joined by a bridge. Needs root and `ip`.

python -m tests.hosts 2 -- COMMAND runs the command on each; {rank}, {address} and {first} in it are filled in.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
NAMES = Path("/etc/netns")  # of `ip netns exec`


@dataclass(frozen=True)
class Host:
    """A namespace, the end of its cable at the bridge, its address."""

    name: str
    cable: str
    address: str

    def command(self, *words: object) -> list[str]:
        """Words that run a command there, where the machine has a name of its own."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.name, *named, *map(str, words)]

    def cut_off(self) -> None:
        """Take its cable out: what it sends is lost, and nobody is told."""
        ip("link", "set", self.cable, "down")


def ip(*words: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def possible() -> bool:
    """Whether this machine lets us make namespaces."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        return False
    name = f"kozero{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        ip("netns", "del", name)
    return made


@contextmanager
def hosts(num: int) -> Iterator[list[Host]]:
    """Some hosts, gone afterwards with all that still runs there."""
    bridge, made = f"kz{os.getpid()}", []
    ip("link", "add", bridge, "type", "bridge")
    try:
        ip("link", "set", bridge, "up")
        for k in range(num):
            host = Host(f"{bridge}-{k}", f"{bridge}.{k}", f"10.77.0.{k + 1}")
            ip("netns", "add", host.name)
            made.append(host)
            ip("link", "add", host.cable, "type", "veth", "peer", "name", INTERFACE, "netns", host.name)
            ip("link", "set", host.cable, "master", bridge, "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                ip("-n", host.name, "link", "set", interface, "up")
        names = "".join(f"{host.address} {host.name}\n" for host in made)
        for host in made:
            (NAMES / host.name).mkdir(parents=True)
            (NAMES / host.name / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        yield made
    finally:
        for host in made:
            told = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True)
            for pid in told.stdout.split():
                subprocess.run(["kill", "-9", pid], capture_output=True)
            shutil.rmtree(NAMES / host.name, ignore_errors=True)
        # The cables first: with its namespace a cable goes later, when its name may be wanted again. Each is tried.
        left = [["link", "del", host.cable] for host in made] + [["netns", "del", host.name] for host in made]
        for words in [*left, ["link", "del", bridge]]:
            subprocess.run(["ip", *words], capture_output=True)


def main() -> None:
    """The command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    num, _, *words = sys.argv[1:]
    with hosts(int(num)) as made:
        runs = [
            subprocess.Popen(
                host.command(*(word.format(rank=k, address=host.address, first=made[0].address) for word in words))
            )
            for k, host in enumerate(made)
        ]
        sys.exit(max(run.wait() for run in runs))


if __name__ == "__main__":
    main()
