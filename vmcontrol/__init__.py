"""HostMain and what it is made of: hypervisors, the broker link, the XML-RPC service.

This package also holds the few modules that the guest agent and the wrapper share (`words`, `eventloop`,
`atomicfile`, the STOMP client); it imports neither of them.
"""

__version__ = "0.1.0"
"""Of the whole project."""
