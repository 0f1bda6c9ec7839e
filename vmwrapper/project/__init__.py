"""Tools for project staff that make job files. Nothing here runs under a BOINC client."""
