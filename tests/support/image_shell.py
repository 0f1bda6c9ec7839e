"""Runs in the guest in the agent's place, for tests of the image alone: a shell on the agent's port.

Each line that comes in is a command for /bin/sh; its output goes back, then a line "STATUS n".
"""

import socketserver
import subprocess


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            done = subprocess.run(["/bin/sh", "-c", line.decode()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.wfile.write(done.stdout + b"\nSTATUS %d\n" % done.returncode)


if __name__ == "__main__":
    server = socketserver.ThreadingTCPServer(("0.0.0.0", 4616), Handler)
    print("shell is there", flush=True)
    server.serve_forever()
