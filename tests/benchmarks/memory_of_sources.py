"""How much memory a data source takes: opened, and with all its rows read, for two numbers of pairs. Linux only.

    python tests/benchmarks/memory_of_sources.py                          # 1,000 and 100,000 pairs in tars
    python tests/benchmarks/memory_of_sources.py --kind folder --pairs 1000 20000

Pairs of a 1 x 1 PNG and a caption are written to a temporary folder. Each measurement has a process of its own, and
the number that counts is the largest resident set (VmHWM) above that of a process that has opened ten pairs.
"""

import argparse
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from io import BytesIO
from pathlib import Path

SHARD = 10_000  # pairs in a tar
ROOT = Path(__file__).resolve().parent.parent.parent


def png(number: int) -> bytes:
    """A picture of one pixel, whose colour is the number."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(b"\0" + number.to_bytes(3, "big"))), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pairs(count: int):
    for number in range(count):
        yield f"{number:08d}.png", png(number)
        yield f"{number:08d}.txt", f"a picture of the number {number}\n".encode()


def make(folder: Path, kind: str, count: int) -> str:
    """Write the pairs, and return the name of the source."""
    folder.mkdir()
    if kind == "folder":
        for name, content in pairs(count):
            (folder / name).write_bytes(content)
        return str(folder)
    if kind == "csv":
        with open(folder / "list.csv", "w") as listing:
            listing.write("image,text\n")
            for name, content in pairs(count):
                if name.endswith(".png"):
                    (folder / name).write_bytes(content)
                    listing.write(f"{name},")
                else:
                    listing.write(content.decode())
        return str(folder / "list.csv")
    files = pairs(count)
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:04d}.tar", "w") as tar:
            for _ in range(2 * min(SHARD, count - first)):
                name, content = next(files)
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return str(folder)


def measured(name: str) -> dict[str, float]:
    """In a process of its own: the largest resident set so far, MiB, after each step, and seconds for each."""
    command = [sys.executable, __file__, "--measure", name]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout)


def measure(name: str) -> dict[str, float]:
    sys.path.insert(0, str(ROOT))
    from dvae.data import open_source

    def largest() -> float:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    begin = time.monotonic()
    source = open_source(name, size=8)
    opened, seconds = largest(), time.monotonic() - begin
    begin = time.monotonic()
    for index in range(len(source)):
        source.images([index])
        source.captions(index)
    reading = time.monotonic() - begin
    return {"pairs": len(source), "opened": opened, "read": largest(), "opening_s": seconds, "reading_s": reading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("tar", "folder", "csv"), default="tar")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = measured(make(Path(folder, "base"), args.kind, 10))
        print(f"{'pairs':>9}  {'opened':>8}  {'all read':>8}  above ten pairs ({base['read']:.0f} MiB); seconds")
        for count in args.pairs:
            found = measured(make(Path(folder, str(count)), args.kind, count))
            opened, read = (found[step] - base[step] for step in ("opened", "read"))
            print(
                f"{found['pairs']:>9,}  {opened:>4.1f} MiB  {read:>4.1f} MiB  "
                f"opened in {found['opening_s']:.0f} s, read in {found['reading_s']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
