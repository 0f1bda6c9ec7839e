"""VMMain, the agent in the guest: `python -m guest.agent VMConfig.cfg`."""

from guest.agent.main import program

if __name__ == "__main__":
    program()
