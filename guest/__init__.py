"""VMMain, the agent inside the virtual machine, and the recipe of a guest image."""

from guest.files.emulation import prefer_plain_sha256

prefer_plain_sha256()  # here, as it has to come before whatever imports hashlib
