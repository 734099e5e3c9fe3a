"""Commands of the shell that start quickly: ``flowseg``, ``torchrun``, ``accelerate`` and ``python`` without importing torch.

Each command is a small script that asks a server to fork a process with its arguments, environment, folder and outputs.
The server has imported torch already, which takes each new process seconds. Signals to the script go to the process and its
loader's workers, as a launcher sends them.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time

import torch.distributed.run
from accelerate.commands import accelerate_cli

from flowseg import cli

from .processes import forget_accelerate

COMMANDS = ("flowseg", "torchrun", "accelerate", "python")

#: The script behind each command. It gets the process's number, then its status, and ends in the same way.
SCRIPT = """#!{python} -SE
import json, os, signal, socket, sys
request = dict(argv=[os.path.basename(sys.argv[0]), *sys.argv[1:]], env=dict(os.environ), cwd=os.getcwd())
signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"x"], [1, 2])
lines = server.makefile("rw")
print(json.dumps(request), file=lines, flush=True)
process = int(lines.readline())
def hand_over(number, frame):
    try:
        os.killpg(process, number)
    except ProcessLookupError:
        pass
for number in signals:
    signal.signal(number, hand_over)
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
status = int(lines.readline())
if status < 0:
    if -status in signals:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def quick_commands(folder):
    """Write the commands to ``folder`` and serve them; give the environment in which they are found first."""
    folder.mkdir()
    address = str(folder / "server")
    (folder / "started").touch()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(16)
    for name in COMMANDS:
        (folder / name).write_text(SCRIPT.format(python=sys.executable, address=address))
        (folder / name).chmod(0o755)
    server = os.fork()
    if not server:
        _serve(listening, folder / "started")
    listening.close()
    try:
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        yield {**os.environ, "PATH": path, "PYTHON_EXEC": str(folder / "python"), "OMP_NUM_THREADS": "1"}
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def started(folder):
    """The processes that were started so far: their number, arguments, rank and local world size, oldest first."""
    return [json.loads(line) for line in (folder / "started").read_text().splitlines()]


def _serve(listening, started):
    """Fork a process for each request, and one that waits for it, until this process is killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listening.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            _keep(connection, started)
            os._exit(0)
        connection.close()


def _keep(connection, started):
    """Start the process of one request and report how it ends. Kill it if the script is killed."""
    _, outputs, *_ = socket.recv_fds(connection, 1, 2)
    lines = connection.makefile("rw")
    request = json.loads(lines.readline())
    process = os.fork()
    if not process:
        os.setsid()
        _become(request, outputs)
    with started.open("a") as file:
        variables = {name.lower(): request["env"].get(name) for name in ("RANK", "LOCAL_WORLD_SIZE")}
        file.write(json.dumps({"process": process, "argv": request["argv"], **variables}) + "\n")
    print(process, file=lines, flush=True)
    connection.setblocking(False)
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        with contextlib.suppress(BlockingIOError):
            if not connection.recv(1):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    connection.setblocking(True)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(ended[1]))


def _become(request, outputs):
    """Run the command of a request in this process."""
    for target, handle in zip((1, 2), outputs):
        os.dup2(handle, target)
    sys.stdout, sys.stderr = (os.fdopen(handle, "w", buffering=1) for handle in (1, 2))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    forget_accelerate()
    name, *sys.argv[1:] = request["argv"]
    sys.argv[0] = name
    status = 1
    try:
        if name == "python":
            # Launchers give `-u -m module arguments`.
            place = sys.argv.index("-m") + 1
            name, sys.argv[1:] = sys.argv[place], sys.argv[place + 1 :]
        if name == "flowseg":
            cli.main()
        elif name == "torchrun":
            torch.distributed.run.main()
        else:
            accelerate_cli.main()
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
