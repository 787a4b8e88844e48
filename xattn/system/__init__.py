"""The machine: processes, devices, signals and the screen."""
