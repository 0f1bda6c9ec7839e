"""Containers in the guest: the root helper that runs them, and the agent's end of it."""
