"""What a periodic checkpoint costs: the pause that the guest sees, how long it takes, and the bytes written.

    python -m bench.checkpoint [--memory MIB]

A program in a QEMU guest looks at its monotonic clock a hundred times a second and notes the gaps. QEMU stops that
clock with the VM, so the pause shows in what the agent sets the guest's time forward by. The bytes are those that the
QEMU process had written to disk before and after each snapshot (/proc/PID/io, write_bytes).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

from guest.image.cache import guest_image
from tests.support.client_vm import HOST_CONFIG, qemu_of
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot

ROOT = Path(__file__).parents[1]
SECONDS, INTERVAL_S = 40, 8
PROGRAM = f"""#!/usr/bin/env python3
import time
end, last, gaps = time.monotonic() + {SECONDS}, time.monotonic(), []
while last < end:
    time.sleep(0.01)
    now = time.monotonic()
    gaps.append(now - last)
    last = now
print(*(f"{{gap:.3f}}" for gap in sorted(gaps)[-8:]), "median", f"{{sorted(gaps)[len(gaps) // 2]:.3f}}")
"""


def written(pid: int) -> int:
    """Bytes that a process has caused to be written to disk."""
    return int(re.findall(r"^write_bytes: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.M)[0])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="of a guest (%(default)s)")
    memory_mb = parser.parse_args().memory
    with tempfile.TemporaryDirectory() as folder:
        slot = TestSlot(Path(folder))
        slot.write("HostConfig.cfg", HOST_CONFIG.decode())
        slot.write("program", PROGRAM, executable=True)
        slot.write("guest.vdi", f"<soft_link>{guest_image(ROOT / '.cache' / 'guest-image')}</soft_link>\n")
        slot.job(
            HOST_MAIN_TASK,
            "<task><virtualmachine>one</virtualmachine><image>guest.vdi</image><hypervisor>qemu</hypervisor>"
            f"<memory_size_mb>{memory_mb}</memory_size_mb><application>program</application><copy_app_to_VM/>"
            "<stdout_filename>gaps</stdout_filename>"
            f"<minimum_checkpoint_interval>{INTERVAL_S}</minimum_checkpoint_interval></task>",
        )
        client = PlayedClient(slot)
        log = (slot.folder / "stderr.txt").open("wb")
        try:
            process = slot.start(program=[sys.executable, "-m", "vmwrapper"], stderr=log)
            history: list[tuple[float, int]] = []
            count = 0
            while process.poll() is None:
                time.sleep(0.1)
                found = re.findall(r"snapshot (\S+) of VM \S+ in ([\d.]+) s", slot.text("stderr.txt"))
                try:
                    now = written(qemu_of(slot.folder).pid)
                except (AssertionError, OSError, IndexError):
                    continue
                history.append((time.monotonic(), now))
                if len(found) > count:
                    count, name, took = len(found), found[-1][0], float(found[-1][1])
                    before = next(n for at, n in reversed(history) if at < time.monotonic() - took - 1)
                    print(f"{name}: {took} s, {(now - before) / 1e6:.1f} MB written")
            print(f"{memory_mb} MiB; longest gaps by the guest's own clock, s: {slot.text('gaps').strip()}")
            console = (slot.folder / "guest_console.log").read_text(errors="replace")
            print("its clock was set forward by, s:", *re.findall(r"guest\.clock: clock: (\S+) s", console))
        finally:
            del client
            log.close()
            slot.clean()
    return 0


if __name__ == "__main__":
    sys.exit(main())
