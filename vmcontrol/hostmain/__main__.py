"""HostMain, the agent on the host: `python -m vmcontrol.hostmain [HostConfig.cfg]`."""

from vmcontrol.hostmain.main import program

if __name__ == "__main__":
    program()
