"""VMMain, the agent inside the virtual machine, and the recipe of a guest image."""
