"""Run the job of a folder under a real BOINC client, without a project: for development, by hand.

    tools/run_under_client examples/worker --input guest.vdi=/path/to/guest.vdi

Every file of the folder becomes an input file of the job, linked into the slot as a project would do it (those named by
--copy are copied). What job.xml makes comes back in RESULTS. The client has a folder and a port of its own; one that
this user runs already is not touched. While it runs these words can be typed:

    suspend  resume  abort            as the BOINC Manager does it
    quit                              the client ends in order, as at a shutdown; `start` starts it again
    kill                              kill -9 of the client alone; `start`
    term                              TERM to the client and all its descendants, as systemd does it; `start`
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.support import boinc_client
from tests.support.boinc_client import BoincClient, Job, JobFile
from vmwrapper.job import parse
from vmwrapper.job.model import Job as JobFileModel

ROOT = Path(__file__).parents[1]
NAME = "job"


def outputs_of(job: JobFileModel) -> list[str]:
    """Logical names of everything that the tasks of a job file make."""
    names: list[str] = []
    for task in job.tasks:
        names += [task.stdout_filename, task.stderr_filename]
        if task.guest is not None:
            names += task.guest.copy_files_from_vm
    if job.zip_output is not None:
        names.append(job.zip_output.zipfilename)
    return [name for name in dict.fromkeys(names) if name and "/" not in name]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run_under_client", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path, help="folder with job.xml and the input files")
    parser.add_argument("--job", default="job.xml", help="name of the job file in it")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=FILE", help="one more input file")
    parser.add_argument(
        "--copy", action="append", default=["HostConfig.cfg"], metavar="NAME", help="copied, not linked"
    )
    parser.add_argument("--runtime", choices=("auto", "library", "python"), default="auto", help="BOINC runtime")
    parser.add_argument("--arguments", default="", help="command line of the wrapper")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the output files go")
    options = parser.parse_args(words)
    if not boinc_client.AVAILABLE:
        print(boinc_client.WHY_NOT, file=sys.stderr)
        return 1
    files = {path.name: path for path in options.folder.iterdir() if path.is_file()}
    files |= {name: Path(path) for name, _, path in (pair.partition("=") for pair in options.input)}
    files["job.xml"] = options.folder / options.job
    model = parse.parse(files["job.xml"].read_bytes(), options.job)
    inputs = [
        JobFile(name, path.resolve(), copied=name in options.copy, executable=path.stat().st_mode & 0o100 != 0)
        for name, path in files.items()
    ]
    main_program = (
        f'#!/bin/sh\nexport PYTHONPATH="{ROOT}" VMWRAPPER_BOINC_RUNTIME={options.runtime}\n'
        f'exec "{sys.executable}" -m vmwrapper "$@"\n'
    )
    job = Job(NAME, main_program.encode(), options.arguments, inputs, outputs_of(model), memory_bound=1e8)
    folder = Path(tempfile.mkdtemp(prefix="boinc-client-"))
    print(f"the client's folder: {folder}")
    try:
        return _run(folder, job, options.results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, job: Job, results: Path) -> int:
    with BoincClient(folder, [job], checkpoint_period_s=60) as client:
        over = threading.Event()
        running = [True]
        threading.Thread(target=_obey, args=(client, running), daemon=True).start()
        shown = ""
        while not over.wait(1):
            if not running[0]:
                continue
            try:
                result = client.result(NAME)
            except (OSError, AssertionError):
                continue
            text = (
                f"fraction done {result.fraction_done:.4f}, CPU time {result.current_cpu_time:.1f} s, "
                f"at the checkpoint {result.checkpoint_cpu_time:.1f} s {result.wait_reason}"
            )
            if text != shown:
                print(shown := text, flush=True)
            if result.ready_to_report:
                over.set()
        running[0] = False
        client.quit()
        print("--- stderr.txt\n" + client.stderr_of(NAME))
        results.mkdir(exist_ok=True)
        for output in job.outputs:
            if client.output(NAME, output).exists():
                shutil.copy(client.output(NAME, output), results / output)
        print(f"exit status {result.exit_status}; output files in {results}/")
        return 0 if result.state == boinc_client.RESULT_FILES_UPLOADED else 1


def _obey(client: BoincClient, running: list[bool]) -> None:
    """Words from the keyboard."""
    for line in sys.stdin:
        word = line.strip()
        try:
            if word in ("suspend", "resume", "abort"):
                getattr(client, word)(NAME)
            elif word in ("quit", "kill", "term"):
                running[0] = False
                {"quit": client.quit, "kill": client.kill_alone, "term": client.terminate_group}[word]()
                print(f"the client has ended ({word}); type start")
            elif word == "start":
                client.start()
                running[0] = True
            elif word:
                print("suspend, resume, abort, quit, kill, term or start")
        except (OSError, AssertionError, KeyError) as error:
            print(f"{word}: {error}")


if __name__ == "__main__":
    sys.exit(main())
