# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl`` without the time that Python takes to start and import: some 8 s of each command under emulation.

A process in dom0 has already imported everything, and forks for each command. A script that comes first in the search
path passes the command to that process, and returns its output and status. Standard input is not passed on.
"""

from __future__ import annotations

from tests.lab.host import XenHost

_FOLDER = "/run/nvdimmctl"
_SERVER = """\
import logging, os, shlex, signal, sys, traceback
sys.argv[0] = "nvdimmctl"
from importlib import import_module
from importlib.metadata import entry_points
from nvdimm_driver.cmd.nvdimmctl import main

for module in {entry.module for entry in entry_points(group="nvdimm_driver.nvdimmctl")}:
    import_module(module)
main(["list", "-f", "json"])  # imports the rest
sys.stdout.flush()
logging.getLogger().handlers.clear()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.mkfifo("orders")
for line in open(os.open("orders", os.O_RDWR)):
    name, folder, *arguments = shlex.split(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    answer = os.path.abspath(name)
    for descriptor, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(name + ending, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    status = 1
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    with open(answer, "w") as file:
        print(status, file=file)
    os._exit(0)
"""
_CLIENT = f"""\
#!/bin/bash
answer={_FOLDER}/$$
mkfifo $answer && echo "$$ ${{PWD@Q}} ${{*@Q}}" >{_FOLDER}/orders && read -r status <$answer
cat $answer.out
cat $answer.err >&2
rm $answer $answer.out $answer.err
exit ${{status:-1}}
"""


def serve(host: XenHost) -> None:
    """Run ``nvdimmctl`` this way in dom0, where the driver is registered."""
    host.write(f"{_FOLDER}/server.py", _SERVER.encode())
    host.write("/usr/local/bin/nvdimmctl", _CLIENT.encode(), 0o755)
    host.check(
        f"cd {_FOLDER} && setsid python3 server.py >server.log 2>&1 </dev/null & "
        f"for try in $(seq 1000); do [ -p {_FOLDER}/orders ] && exit; kill -0 $! || break; sleep 0.3; done; "
        f"cat {_FOLDER}/server.log >&2; exit 1"
    )
